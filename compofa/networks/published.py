"""The specialised networks that Once-for-All published, as a table of their choices.

The ids are those of its table; each says the device, the measured latency (or multiply-accumulates)
there, ImageNet top-1 and the epochs of fine-tuning. Choices and image sizes were read from the
published ``net.config`` and ``run.config`` files (github.com/han-cai/files, folder
ofa/ofa_specialized); the ids of :data:`RESNETS` are from the README of
github.com/mit-han-lab/once-for-all, and their configurations come with their weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from compofa.errors import SpaceError, unknown_name
from compofa.networks.backbone import Backbone
from compofa.networks.families import backbone
from compofa.networks.layout import layout
from compofa.networks.network_spec import FixedNetwork
from compofa.space.subnet import Subnet

_SUPERNETS = {  # backbone, width multiplier, dropout
    "w1.0": ("mobilenet_v3", 1.0, 0.1),
    "w1.2": ("mobilenet_v3", 1.2, 0.2),
    "p1.3": ("proxyless", 1.3, 0.0),
}

# Supernet, image size, and one digit per block, stage by stage: kernel sizes, then expand ratios.
_TABLE = """
flops@595M_top1@80.0_finetune@75         w1.2 236 353-5535-7535-3573-3353   343-4463-6634-6664-6663
flops@482M_top1@79.6_finetune@75         w1.2 224 533-5353-5533-5735-7333   333-4443-4633-6664-6663
flops@389M_top1@79.1_finetune@75         w1.2 224 33-553-553-5533-3373      33-363-443-6444-6663
note10_lat@64ms_top1@80.2_finetune@75    w1.2 260 333-5335-5537-5333-3353   363-4633-6644-6664-6663
note10_lat@50ms_top1@79.7_finetune@75    w1.2 220 533-5335-7735-7533-333    366-4663-6644-6666-666
note10_lat@41ms_top1@79.3_finetune@75    w1.2 220 33-733-7333-3533-3333     34-446-6634-6664-6663
note10_lat@30ms_top1@78.4_finetune@75    w1.2 224 33-533-553-333-3333       33-434-443-644-6643
note10_lat@22ms_top1@76.6_finetune@25    w1.0 224 33-533-755-533-3333       33-344-444-464-6663
note10_lat@16ms_top1@75.5_finetune@25    w1.0 192 33-5533-553-553-3753      33-3443-443-443-6443
note10_lat@11ms_top1@73.6_finetune@25    w1.0 176 33-53-53-333-355          33-44-44-433-444
note10_lat@8ms_top1@71.4_finetune@25     w1.0 160 33-33-333-33-35           33-34-433-34-44
LG-G8_lat@24ms_top1@76.4_finetune@25     w1.0 220 33-753-555-375-5733       33-433-643-443-6664
LG-G8_lat@16ms_top1@74.7_finetune@25     w1.0 176 33-753-555-375-5733       33-433-643-443-6664
LG-G8_lat@11ms_top1@73.0_finetune@25     w1.0 156 33-537-53-535-575         33-344-43-443-664
LG-G8_lat@8ms_top1@71.1_finetune@25      w1.0 144 33-55-533-37-37           33-43-333-64-64
s7edge_lat@88ms_top1@76.3_finetune@25    w1.0 192 53-533-755-5535-3733      34-664-463-6644-6664
s7edge_lat@58ms_top1@74.7_finetune@25    w1.0 192 33-53-7533-333-355        33-34-4343-443-644
s7edge_lat@41ms_top1@73.1_finetune@25    w1.0 160 33-53-75-333-3533         33-34-44-443-6433
s7edge_lat@29ms_top1@70.5_finetune@25    w1.0 144 33-53-53-55-35            33-34-44-44-63
note8_lat@65ms_top1@76.1_finetune@25     w1.0 204 73-353-733-533-5553       33-443-664-664-6443
note8_lat@49ms_top1@74.9_finetune@25     w1.0 176 53-537-773-333-3535       34-444-434-464-6664
note8_lat@31ms_top1@72.8_finetune@25     w1.0 152 53-55-335-357-3355        33-43-444-434-6333
note8_lat@22ms_top1@70.4_finetune@25     w1.0 140 33-55-73-53-37            33-33-43-34-66
pixel1_lat@143ms_top1@80.1_finetune@75   w1.2 240 533-5535-7533-5353-3353   363-6663-6664-6664-6663
pixel1_lat@132ms_top1@79.8_finetune@75   w1.2 228 53-5535-7535-5555-3353    36-4663-6664-6664-6663
pixel1_lat@79ms_top1@78.7_finetune@75    w1.2 224 33-53-753-5333-3333       33-34-443-6443-6663
pixel1_lat@58ms_top1@76.9_finetune@75    w1.0 220 33-753-555-375-5733       33-433-643-443-6664
pixel1_lat@40ms_top1@74.9_finetune@25    w1.0 172 53-537-773-333-3535       34-444-434-464-6664
pixel1_lat@28ms_top1@73.3_finetune@25    w1.0 160 33-733-73-35-3333         34-364-36-64-6436
pixel1_lat@20ms_top1@71.4_finetune@25    w1.0 152 33-55-73-53-37            33-33-43-34-66
pixel2_lat@62ms_top1@75.8_finetune@25    w1.0 208 33-753-555-375-5733       33-433-643-443-6664
pixel2_lat@50ms_top1@74.7_finetune@25    w1.0 208 33-33-35-57-3575          34-33-36-64-6343
pixel2_lat@35ms_top1@73.4_finetune@25    w1.0 160 33-333-77-5337-7775       33-346-44-4333-4633
pixel2_lat@25ms_top1@71.5_finetune@25    w1.0 144 33-55-73-773-53           33-64-43-434-64
1080ti_gpu64@27ms_top1@76.4_finetune@25  p1.3 188 33-3533-535-535-3573-7    33-6644-634-644-6636-6
1080ti_gpu64@22ms_top1@75.3_finetune@25  p1.3 188 33-53-353-337-355-3       33-36-446-464-644-4
1080ti_gpu64@15ms_top1@73.8_finetune@25  p1.3 144 33-333-35-3533-3773-5     44-664-33-3436-6646-3
1080ti_gpu64@12ms_top1@72.6_finetune@25  p1.3 128 33-355-557-3733-7575-3    33-644-633-4364-6433-6
v100_gpu64@11ms_top1@76.1_finetune@25    p1.3 192 33-55-737-7537-3553-3     33-63-334-4434-6646-4
v100_gpu64@9ms_top1@75.3_finetune@25     p1.3 188 33-53-353-337-355-3       33-36-446-464-644-4
v100_gpu64@6ms_top1@73.0_finetune@25     p1.3 144 33-53-373-553-353-3       34-34-633-346-643-4
v100_gpu64@5ms_top1@71.6_finetune@25     p1.3 128 33-53-353-337-355-3       33-36-446-464-644-4
tx2_gpu16@96ms_top1@75.8_finetune@25     p1.3 172 333-75-3555-5773-3353-5   346-34-4443-4336-6664-3
tx2_gpu16@80ms_top1@75.4_finetune@25     p1.3 188 33-53-353-337-355-3       33-36-446-464-644-4
tx2_gpu16@47ms_top1@72.9_finetune@25     p1.3 144 33-53-373-553-353-3       34-34-633-346-643-4
tx2_gpu16@35ms_top1@70.3_finetune@25     p1.3 128 33-37-55-53-53-5          43-66-63-34-64-4
cpu_lat@17ms_top1@75.7_finetune@25       p1.3 208 33-53-373-553-353-3       34-34-633-346-643-4
cpu_lat@15ms_top1@74.6_finetune@25       p1.3 188 33-33-73-533-53-7         33-46-64-466-63-6
cpu_lat@11ms_top1@72.0_finetune@25       p1.3 144 55-37-537-57-33-5         43-33-443-44-64-4
cpu_lat@10ms_top1@71.1_finetune@25       p1.3 144 53-33-737-55-53-3         43-33-333-34-34-4
"""

RESNETS = (
    "resnet50D_MAC@4.1B_top1@79.8",
    "resnet50D_MAC@3.7B_top1@79.7",
    "resnet50D_MAC@3.0B_top1@79.3",
    "resnet50D_MAC@2.4B_top1@79.0",
    "resnet50D_MAC@1.8B_top1@78.3",
    "resnet50D_MAC@1.2B_top1@77.1_finetune@25",
    "resnet50D_MAC@0.9B_top1@76.3_finetune@25",
    "resnet50D_MAC@0.6B_top1@75.0_finetune@25",
)
"""Specialised ResNet50D networks: ids alone, for their configurations are downloaded."""

_ID = re.compile(
    r"(?P<target>.+)@(?P<value>[\d.]+)(?P<unit>ms|M|B)_top1@(?P<top1>[\d.]+)(_finetune@(?P<epochs>\d+))?"
)


@dataclass(frozen=True)
class Specialised:
    """A row of the table.

    Attributes:
        net_id: Its id.
        supernet: What it is a subnet of; empty where its configuration comes with its weights.
        resolution: Side of its images in pixels.
        kernels: Kernel sizes, one digit per block, stage by stage.
        expands: Expand ratios, likewise.
    """

    net_id: str
    supernet: str = ""
    resolution: int = 224
    kernels: str = ""
    expands: str = ""

    @property
    def network(self) -> FixedNetwork | None:
        """Its definition; ``None`` where that comes with its weights."""
        subnet, table = self.subnet, self.backbone
        if subnet is None or table is None:
            return None
        dropout = _SUPERNETS[self.supernet][2]
        layers = layout(table, subnet)
        return FixedNetwork(layers, dropout, table.bn_eps, table.bn_momentum, backbone=table.name)

    @property
    def backbone(self) -> Backbone | None:
        """Its backbone; ``None`` where the definition comes with the weights."""
        return backbone(*_SUPERNETS[self.supernet][:2]) if self.supernet else None

    @property
    def subnet(self) -> Subnet | None:
        """Its choices; ``None`` where the definition comes with the weights."""
        table = self.backbone
        if table is None:
            return None
        stages = tuple(
            tuple(zip(map(int, kernels), map(int, expands), strict=True))
            for kernels, expands in zip(
                self.kernels.split("-"), self.expands.split("-"), strict=True
            )
        )
        return Subnet(self.resolution, stages, format=table.config_format)

    @property
    def folder(self) -> str:
        """Its folder among the published files."""
        return self.net_id.replace("@", "-")

    @property
    def top1(self) -> float:
        """Published ImageNet top-1, in percent."""
        return float(self._part("top1"))

    @property
    def finetuned_epochs(self) -> int:
        """Epochs it was fine-tuned for, beyond the supernet's training; 0 where the id has none."""
        return int(self._part("epochs") or 0)

    @property
    def target(self) -> str:
        """What it was searched for, such as ``8 ms on note10``."""
        if not self.device:
            return f"{self._part('value')}{self._part('unit')} MACs"
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.value:g} ms on {self.device}{batch}"

    @property
    def device(self) -> str:
        """The device it was searched for; empty where it was searched for multiply-accumulates."""
        target = re.sub(r"_(lat|MAC|gpu\d+)$", "", self._part("target"))
        return target if self._part("unit") == "ms" else ""

    @property
    def batch(self) -> int:
        """Images per batch on its device."""
        match = re.search(r"_gpu(\d+)$", self._part("target"))
        return int(match[1]) if match else 1

    @property
    def value(self) -> float:
        """Published latency on its device in ms; without a device, multiply-accumulates."""
        scale = {"ms": 1.0, "M": 1e6, "B": 1e9}[self._part("unit")]
        return round(float(self._part("value")) * scale, 3)

    def _part(self, name: str) -> str:
        match = _ID.fullmatch(self.net_id)
        assert match is not None, self.net_id
        return match[name]


def specialised(net_id: str) -> Specialised:
    """Return the row of an id, spelled with ``@`` or, as the published folders are, with ``-``.

    Raises:
        SpaceError: There is none; the message has the ids most like it.
    """
    row = SPECIALISED.get(net_id.replace("@", "-"))
    if row is None:
        known = [row.net_id for row in SPECIALISED.values()]
        expected = f"expected one of the {len(known)} ids that python -m compofa zoo lists"
        raise SpaceError(unknown_name("specialised network", net_id, known, expected))
    return row


def zoo_devices() -> dict[str, list[Specialised]]:
    """Return the specialised networks by the device that they were searched for."""
    found: dict[str, list[Specialised]] = {}
    for row in SPECIALISED.values():
        if row.device:
            found.setdefault(row.device, []).append(row)
    return found


def _rows() -> dict[str, Specialised]:
    lines = (line.split() for line in _TABLE.split("\n")[1:-1])
    rows = [Specialised(n, s, int(r), kernels, expands) for n, s, r, kernels, expands in lines]
    rows += [Specialised(net_id) for net_id in RESNETS]
    return {row.folder: row for row in rows}


SPECIALISED = _rows()
"""The specialised networks by their folders."""
