"""The supernet: one set of weights, many networks; which one is an argument of ``forward``."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn.blocks import ConvBN, build_layers
from compofa.nn.elastic import ElasticKernel, bind, sliced, twin, viewed
from compofa.nn.extract import build_static, extract
from compofa.nn.static import LayeredNetwork, StaticNetwork
from compofa.seeds import derive_seed
from compofa.space.choose import Values, choose
from compofa.space.subnet import Subnet


class Supernet(LayeredNetwork):
    """The network of the largest subnet, run as any subnet of its space.

    Args:
        spec: Its definition.
        seed: Seed of the initial weights.

    Attributes:
        spec: Its definition.
        specs: Its layers, those of the largest subnet.
        active: The subnet that ``forward`` runs when it is given none; the largest at first.
        largest: The subnet of all its weights.
        kernel_sizes: The kernel sizes that each depthwise convolution of the stages has in some
            subnet, by module path.
    """

    def __init__(self, spec: NetworkSpec, seed: int = 0) -> None:
        table, capacity = spec.backbone, spec.space.free()
        specs = layout(table, capacity.largest, spec.classes)
        layers = build_layers(specs, table.bn_eps, table.bn_momentum)
        super().__init__(specs, layers, spec.dropout)
        self.kernel_sizes = _kernel_sizes(spec)
        for path, kernels in self.kernel_sizes.items() if spec.kernel_transform else ():
            part = self.get_submodule(path)
            if len(kernels) > 1 and isinstance(part, ConvBN):
                self.set_submodule(path, ElasticKernel(part, kernels))
        self.spec = spec
        self.active = spec.space.largest
        self.largest = capacity.largest
        self._capacity = capacity
        self._whole = {layer.name: layer for layer in specs}
        initialise(self, seed)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, subnet: Subnet | None = None) -> Tensor:
        """Classify images.

        Gradients reach the supernet's parameters through the graph, as those of any module. For
        many passes through one subnet, :meth:`bind` is faster.

        Args:
            images: Normalised images [n, 3, r, r], n at least 1. Their side is what counts;
                the subnet's own resolution is not looked at.
            subnet: The network to run: any depth, kernel, expand ratio and width that the
                weights hold, coupled or not. Without it the active one.

        Returns:
            Logits [n, classes].

        Raises:
            SpaceError: The weights hold no such subnet.
        """
        subnet = (self.active if subnet is None else subnet).at(images.shape[-1])
        specs, whole = self._layers_of(subnet), self._whole
        layers = (bind(self.get_submodule(s.name), whole[s.name], s, sliced) for s in specs)
        return self._run(images, layers)

    def bind(self, subnet: Subnet, kept: dict[Hashable, nn.Module] | None = None) -> StaticNetwork:
        """Return a subnet as a plain network over this network's memory.

        Its parameters, their gradients and its BN statistics are views of this network's: training
        the one trains the other, and gradients of several subnets add up in place. They have to be
        cleared in place as well, with ``zero_grad(set_to_none=False)``: a backward pass after they
        were replaced raises :class:`~compofa.errors.TrainingError`. The matrices of elastic
        kernels are the same parameters in both networks. Modules are not shared, their hooks are.

        A bound network does not follow when this one is moved, converted, given other gradients or
        set to another mode: bind again, which takes a few milliseconds at most.

        Under ``torch.no_grad()`` its parameters require no gradient, and none is allocated.

        Args:
            subnet: Any depth, kernel, expand ratio and width that the weights hold.
            kept: Layers bound by earlier calls with the same mapping, which are used again; new
                ones are added. Subnets share layers: a few hundred make up every subnet of a space.

        Returns:
            The network, in the mode of this one.

        Raises:
            SpaceError: The weights hold no such subnet.
        """
        specs, kept = self._layers_of(subnet), {} if kept is None else kept
        layers = {}
        for spec in specs:
            # All that a layer is made of; it is the same at any size of feature maps.
            key = (
                spec.name, spec.in_channels, spec.mid_channels, spec.out_channels, spec.kernel,
                spec.se_channels, spec.expand, spec.residual, spec.downsample, spec.options,
                self.training, torch.is_grad_enabled(),
            )  # fmt: skip
            if key not in kept:
                layer = self.get_submodule(spec.name)
                kept[key] = bind(layer, self._whole[spec.name], spec, viewed)
            layers[spec.name] = kept[key]
        network = StaticNetwork(specs, layers=layers)
        network.dropout = twin(self.dropout)
        for module in (network, network.stages, *network.stages):
            module.training = self.training
        return network

    def _layers_of(self, subnet: Subnet) -> tuple[LayerSpec, ...]:
        self._capacity.require(subnet, resolution=False)
        return layout(self.spec.backbone, subnet, self.spec.classes)

    def set_active_subnet(self, **values: Values) -> Subnet:
        """Choose what ``forward`` runs, as in Once-for-All: ``net.set_active_subnet(ks=5, d=3)``.

        Args:
            values: By key of the family's config format, or name of the choice, one number for all
                or a list: ``ks`` and ``e`` (kernel sizes, expand ratios) one per stage or block
                slot, ``d`` (depths) one per stage, ``w`` (indices of width multipliers) one per
                elastic width. ``r`` is the resolution to note in the subnet, in pixels. In a
                compound space ``e`` follows from ``d`` when left out.

        Returns:
            The subnet chosen. What is left out stays as it was.

        Raises:
            SpaceError: An unknown key or a value outside the space; every fault is listed.
        """
        self.active = choose(self.spec.space, self.active, values)
        return self.active

    def sample_active_subnet(self, rng: np.random.Generator | int | None = None) -> Subnet:
        """Draw the active subnet from the space, uniformly over its genes, and return it.

        Args:
            rng: A NumPy generator or a seed; without it a fresh one from the system.
        """
        self.active = self.spec.space.sample(np.random.default_rng(rng))
        return self.active

    def get_active_subnet(self, preserve_weight: bool = True) -> StaticNetwork:
        """Return the active subnet as a plain, independent network.

        Args:
            preserve_weight: Copy the weights; otherwise they are initialised afresh.
        """
        if preserve_weight:
            return extract(self, self.active)
        network = build_static(self.spec, self.active)
        initialise(network, 0)
        return network.train(self.training)


def _kernel_sizes(spec: NetworkSpec) -> dict[str, tuple[int, ...]]:
    """Return the kernel sizes of each depthwise convolution of the stages, by module path."""
    space, found = spec.space, {}
    largest = space.free().largest
    for place, name in enumerate(space.names):
        for value in sorted({v for stage in space.stages for v in stage.values(name)}):
            stages = tuple(
                tuple(
                    (*block[:place], value, *block[place + 1 :])
                    if value in stage.values(name) else block
                    for block in blocks
                )
                for stage, blocks in zip(space.stages, largest.stages, strict=True)
            )  # fmt: skip
            for layer in layout(spec.backbone, replace(largest, stages=stages), spec.classes):
                for conv in layer.convs if layer.name.startswith("stages.") else ():
                    if conv.groups > 1:
                        path = f"{layer.name}.{conv.name}"
                        found.setdefault(path, set()).add(conv.kernel)
    return {path: tuple(sorted(kernels)) for path, kernels in found.items()}


def initialise(network: nn.Module, seed: int) -> None:
    """Set weights as the published runs do: He normal by fan-out, BN to 1 and 0.

    Linear layers are uniform in +-1/sqrt(fan-in) with zero bias. The last BN of a bottleneck whose
    shortcut is its input begins at 0, so that the block begins as that input (Goyal et al., 2017).
    All draws come from ``seed``.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights"))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "begin_as_input"):
            module.begin_as_input()
