"""Plain networks of named layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
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
