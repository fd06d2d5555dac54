"""Plain networks of named layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compofa.networks.kinds import LayerSpec
from compofa.nn.blocks import build_layers


class LayeredNetwork(nn.Module):
    """Named layers in the order of a layout: stem, stages, head, pool and classifier.

    Args:
        specs: What the layers are, in the order they run; those of stage i have the names
            ``stages.i.0``, ``stages.i.1``, … and a stage may have none.
        layers: Their modules, by name.
        dropout: Probability before the classifier, in training.
    """

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...  # noqa: D102

    def __init__(
        self, specs: tuple[LayerSpec, ...], layers: Mapping[str, nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.specs = specs
        stages: list[list[nn.Module]] = []
        for spec in specs:
            name, *position = spec.name.split(".")
            if not position:
                if name == "classifier":
                    self.dropout = nn.Dropout(dropout)
                self.add_module(name, layers[name])
                continue
            self.add_module("stages", None)  # its place among the layers; filled below
            stages += [[] for _ in range(len(stages), int(position[0]) + 1)]
            stages[int(position[0])].append(layers[spec.name])
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)

    def _run(self, images: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        """Run ``layers`` in place of the network's own; the last is the classifier."""
        *before, classifier = layers
        x = images
        for layer in before:
            x = layer(x)
        return classifier(self.dropout(x.flatten(1)))


class StaticNetwork(LayeredNetwork):
    """A plain network made of layers: no elasticity.

    It has timm's methods for backbones: :meth:`forward_features`, :meth:`forward_head`,
    :meth:`reset_classifier`, :attr:`num_features`. For feature maps at several scales see
    :class:`compofa.nn.features.FeatureExtractor`.

    Args:
        specs: Its layers, in the order they run.
        dropout: Probability before the classifier, in training.
        eps: Epsilon of its batch normalisations.
        momentum: Momentum of its batch normalisations.
        layers: Their modules by name; built with torch's default weights when left out.

    Attributes:
        specs: The layers it was built from, in order; each is reachable as
            ``network.get_submodule(spec.name)``.
    """

    def __init__(
        self,
        specs: tuple[LayerSpec, ...],
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        layers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(specs, layers or build_layers(specs, eps, momentum), dropout)
        self._pool = [spec.name for spec in specs].index("pool")

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(len(blocks) for blocks in self.stages)

    def units(self) -> list[nn.Module]:
        """Return the modules up to the pool in the order they run, each taking one tensor."""
        return [self.get_submodule(spec.name) for spec in self.specs[: self._pool]]

    @property
    def num_features(self) -> int:
        """Channels of :meth:`forward_features`."""
        return self.specs[self._pool].in_channels

    @property
    def head_hidden_size(self) -> int:
        """Inputs of the classifier: features of ``forward_head(..., pre_logits=True)``."""
        return self.specs[-1].in_channels

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 without one."""
        return self.specs[-1].out_channels

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one with torch's default weights.

        Args:
            num_classes: Its outputs, at least 0. With 0 there is none, and :meth:`forward` returns
                the features [n, head_hidden_size].

        Raises:
            ValueError: The number is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes: expected at least 0, got {num_classes}")
        weight = next(self.parameters())
        classifier = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.classifier = classifier.to(weight.device, weight.dtype).train(self.training)
        self.specs = (*self.specs[:-1], replace(self.specs[-1], out_channels=num_classes))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature maps before the pool.

        Args:
            images: Normalised images [n, 3, h, w]; h and w may differ.

        Returns:
            [n, num_features, h / s, w / s], rounded up, with the total stride s of the network.
        """
        x = images
        for layer in self.units():
            x = layer(x)
        return x

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify feature maps.

        Args:
            features: What :meth:`forward_features` returns.
            pre_logits: Return the features that the classifier takes, [n, head_hidden_size].

        Returns:
            Logits [n, num_classes].
        """
        x = features
        for spec in self.specs[self._pool : -1]:
            x = self.get_submodule(spec.name)(x)
        x = self.dropout(x.flatten(1))
        return x if pre_logits else self.classifier(x)

    def __prepare_scriptable__(self) -> nn.Sequential:
        """Return the same modules in a row, which ``torch.jit.script`` compiles in place of this.

        It cannot compile a look-up of modules by name.
        """
        *names, last = [spec.name for spec in self.specs]
        row = OrderedDict({name.replace(".", "_"): self.get_submodule(name) for name in names})
        row.update(flatten=nn.Flatten(), dropout=self.dropout)
        row[last] = self.classifier
        scriptable = nn.Sequential(row)
        scriptable.training = self.training  # that of its layers stays theirs
        return scriptable

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [n, 3, r, r], normalised; returns logits [n, classes]."""
        return self._run(images, [self.get_submodule(spec.name) for spec in self.specs])
