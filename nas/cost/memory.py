"""Peak memory of a network's inference, by the published rule for MCU-sized budgets."""

from __future__ import annotations

from compofa.networks.kinds import LayerSpec


def peak_elements(layer: LayerSpec) -> int:
    """Return the elements that the most demanding convolution of a layer keeps in memory.

    A convolution keeps its input, its output, its weights, and the input of a residual block that
    is added later: while the depthwise and the project convolution of such a block run. The peak of
    a network is the greatest number of its layers. Left out, as in the published figures, are
    squeeze-and-excitation, the feature mix, pools and the classifier.

    Every operator is counted on its own, so a runtime that fuses operators or works in place needs
    less. The rule is that of memory-optimized once-for-all (MIT), whose published values for
    Once-for-All w1.0 and elastic CompOFA are reproduced exactly. It was published for MobileNetV3;
    the blocks of other families are counted alike.

    Args:
        layer: A layer or block with its shapes.

    Returns:
        Elements, whatever their data type; 0 for the layers that are left out.
    """
    if layer.kind in ("mix", "linear") or layer.name == "mix":
        return 0
    image = layer.in_size**2 * layer.in_channels
    peaks = [0]
    for place, conv in enumerate(conv for conv in layer.convs if not conv.name.startswith("se.")):
        side = layer.in_size if conv.stride > 1 else conv.size
        kept = image if layer.residual and place else 0
        ins, outs = side**2 * conv.in_channels, conv.size**2 * conv.out_channels
        peaks.append(ins + outs + conv.weights + kept)
    return max(peaks)


def float32_bytes(layer: LayerSpec) -> int:
    """Return :func:`peak_elements` in bytes of a network in float32."""
    return 4 * peak_elements(layer)
