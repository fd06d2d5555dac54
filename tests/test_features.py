"""Subnets as backbones: timm's methods, and feature maps at several scales."""

import pytest
import torch
from torch import nn

from compofa.errors import SpaceError
from compofa.networks.layout import params
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.features import FeatureExtractor, feature_levels
from compofa.nn.supernet import Supernet

NETS = ["compofa", "compofa-small", "ofa-proxyless-small", "ofa-resnet50-small"]


@pytest.fixture(params=NETS)
def network(request):
    spec = network_spec(request.param, classes=5, dropout=0.0)
    return extract(Supernet(spec), spec.space.smallest).eval()


IMAGES = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


def test_features_and_head_make_the_network(network):
    with torch.inference_mode():
        features = network.forward_features(IMAGES)
        hidden = network.forward_head(features, pre_logits=True)
        assert features.shape[1] == network.num_features
        assert hidden.shape == (2, network.head_hidden_size)
        torch.testing.assert_close(network.forward_head(features), network(IMAGES))
        torch.testing.assert_close(network.get_classifier()(hidden), network(IMAGES))


def test_a_new_classifier_counts(network):
    before = params(network.specs)
    network.reset_classifier(9)
    assert network.num_classes == 9 and network(IMAGES).shape == (2, 9)
    assert params(network.specs) - before == 4 * (network.head_hidden_size + 1)
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert params(network.specs) == learned
    network.reset_classifier(0)
    assert isinstance(network.classifier, nn.Identity)
    assert network(IMAGES).shape == (2, network.head_hidden_size)
    with pytest.raises(ValueError, match="num_classes"):
        network.reset_classifier(-1)


def test_scales_have_the_shapes_they_say(network):
    backbone = FeatureExtractor(network)
    with torch.inference_mode():
        maps = backbone(IMAGES)
        torch.testing.assert_close(maps[-1], network.forward_features(IMAGES))
    shapes = [tuple(found.shape[1:]) for found in maps]
    assert shapes == [
        (channels, -(-64 // reduction), -(-48 // reduction))
        for channels, reduction in zip(backbone.channels(), backbone.reduction(), strict=True)
    ]
    assert backbone.reduction() == sorted({*backbone.reduction()})
    two = FeatureExtractor(network, out_indices=(1, -1))
    assert two.levels == (backbone.levels[1], backbone.levels[-1])
    coarse = FeatureExtractor(network, out_indices=(0,))
    assert len(coarse.layers) < len(backbone.layers)


def test_scales_of_mobilenet_v3_are_those_of_timm():
    spec = network_spec("compofa")
    levels = feature_levels(extract(Supernet(spec), spec.space.largest))
    assert [level.channels for level in levels] == [16, 24, 40, 112, 960]
    assert [level.reduction for level in levels] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("indices", [(), (1, 0), (0, 9), (-9,), (1, 1)])
def test_wrong_scales_are_refused(indices):
    spec = network_spec("compofa-small", classes=2)
    network = extract(Supernet(spec), spec.space.smallest)
    with pytest.raises(SpaceError, match="out_indices"):
        FeatureExtractor(network, indices)


def test_a_bound_backbone_trains_the_supernet():
    spec = network_spec("compofa-small", classes=2)
    supernet = Supernet(spec)
    FeatureExtractor(supernet.bind(spec.space.smallest))(IMAGES)[-1].sum().backward()
    assert supernet.get_submodule("stem").conv.weight.grad.abs().sum() > 0
