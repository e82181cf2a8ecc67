"""Stem convolutions for ONNX Runtime: stride 2 over an image of few channels becomes stride 1 over blocks of pixels.

The integer convolution gathers its operands one kernel position at a time, and three bytes per gather is what a stem
spends its time on. On blocks of 2x2 pixels the same products need fewer and longer gathers: 0.5 to 0.7 of the time for
3x3 to 7x7 kernels over 1 to 3 channels from 64 pixels on (0.9 at 32), 1.0 or more from 4 channels on
(onnxruntime 1.31, AVX512-VNNI). The numbers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.backends.onnx.rewrites import argument, padded_conv, spread
from fxquant.backends.qdq_ops import dequantize, dequantize_channels, quantize
from fxquant.core.errors import LoweringError
from fxquant.core.ir import finish, tensor_at, traced

aten = torch.ops.aten

BLOCK = 2
"""Stride that is taken into the channels."""
CHANNELS = 3
"""Most input channels for which this is faster."""


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution of stride 2 and of the convolution over blocks that replaces it.

    Args:
        size: pixels, >= 1.
        kernel: taps, >= 1.
        before: zeros in front of the first pixel.
        behind: zeros behind the last.

    Raises:
        LoweringError: the kernel is larger than the padded axis.
    """

    size: int
    kernel: int
    before: int
    behind: int

    def __post_init__(self) -> None:
        if self.kernel > self.size + self.before + self.behind:
            raise LoweringError(f"a kernel of {self.kernel} does not fit into {self.size} padded pixels")

    @property
    def outputs(self) -> int:
        """Length of the result."""
        return (self.size + self.before + self.behind - self.kernel) // BLOCK + 1

    @property
    def missing(self) -> int:
        """Zeros behind the last pixel that complete the last block."""
        return -self.size % BLOCK

    @property
    def lead(self) -> int:
        """Blocks of zeros in front."""
        return -(-self.before // BLOCK)

    @property
    def offset(self) -> int:
        """Taps of weight zero in front of the first."""
        return self.lead * BLOCK - self.before

    @property
    def taps(self) -> int:
        """Kernel size in blocks."""
        return -(-(self.offset + self.kernel) // BLOCK)

    @property
    def tail(self) -> int:
        """Blocks of zeros behind; negative where the last blocks would have to be cut off."""
        return self.outputs + self.taps - 1 - self.lead - (self.size + self.missing) // BLOCK


def space_to_depth(x: Tensor) -> Tensor:
    """Return blocks of 2x2 pixels as channels: (N, C, H, W) -> (N, 4C, H/2, W/2), channel `(2 y + x) C + c`.

    This is SpaceToDepth of ONNX, which counts the positions in the block before the channels.
    """
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // BLOCK, BLOCK, w // BLOCK, BLOCK).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, BLOCK * BLOCK * c, h // BLOCK, w // BLOCK)


def block_weight(weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Return weights (O, C, kh, kw) laid out for blocks: (O, 4C, rows.taps, columns.taps), zeros added around."""
    sides: list[int] = []
    for axis in (columns, rows):
        sides += [axis.offset, axis.taps * BLOCK - axis.offset - axis.kernel]
    return space_to_depth(functional.pad(weight, sides)).contiguous()


def fold_stems(module: GraphModule) -> GraphModule:
    """Rewrite, in place, every stem of an explicit integer graph to blocks of pixels, and return the module.

    A stem is an integer convolution of stride 2 in both directions, neither grouped nor dilated, that alone reads a
    quantizer of at most three channels whose height and width are fixed.
    """
    for node in list(module.graph.nodes):
        if node.target in (aten.conv2d.default, padded_conv):
            _fold(module, node)
    return finish(module)


def _fold(module: GraphModule, conv: Node) -> None:
    source, weight = conv.args[:2]
    quantizer = source.args[0] if isinstance(source, Node) and source.target is dequantize else None
    if not isinstance(quantizer, Node) or quantizer.target is not quantize or not isinstance(weight, Node):
        return
    image, alone = quantizer.args[0], (source, quantizer, weight)
    if weight.target is not dequantize_channels or any(isinstance(n, Node) and len(n.users) > 1 for n in alone):
        return
    axes = _axes(conv, quantizer, weight)
    stored = weight.args[0]
    if axes is None or not isinstance(image, Node) or not isinstance(stored, Node) or len(stored.users) > 1:
        return
    graph = conv.graph
    with graph.inserting_before(quantizer):
        missing = [0, axes[1].missing, 0, axes[0].missing]
        if any(missing):
            padded = graph.call_function(aten.constant_pad_nd.default, (image, missing))
            padded.meta = {**image.meta, "val": traced(lambda x: functional.pad(x, missing), image.meta["val"])}
            image = padded
        blocks = graph.call_function(space_to_depth, (image,))
        blocks.meta = {**image.meta, "val": traced(space_to_depth, image.meta["val"])}
    quantizer.args = (blocks, *quantizer.args[1:])
    for node in (quantizer, source):
        assert isinstance(node, Node)
        node.meta = {**node.meta, "val": blocks.meta["val"].to(node.meta["val"].dtype)}
    _replace_weight(module, stored, axes)
    weight.meta = {**weight.meta, "val": stored.meta["val"].float()}
    pads = [axes[0].lead, axes[1].lead, axes[0].tail, axes[1].tail]
    conv.args = (source, weight, argument(conv, 2, None), [1, 1], pads, [1, 1], 1)
    conv.target = padded_conv


def _axes(conv: Node, quantizer: Node, weight: Node) -> tuple[Axis, Axis] | None:
    """Return the axes of a convolution that is a stem, else None."""
    sizes, kernel = quantizer.meta["val"].shape[2:], weight.meta["val"].shape
    if len(kernel) != 4 or int(kernel[1]) > CHANNELS or not all(isinstance(size, int) for size in sizes):
        return None
    given = [spread(argument(conv, position, 1), 2) for position in (3, 5)]
    if given != [[BLOCK, BLOCK], [1, 1]] or argument(conv, 6, 1) != 1:
        return None
    pads = argument(conv, 4, 0)
    before_behind: Sequence[int] = spread(pads, 4) if conv.target is padded_conv else spread(pads, 2) * 2
    rows, columns = (Axis(sizes[i], int(kernel[2 + i]), before_behind[i], before_behind[i + 2]) for i in range(2))
    return (rows, columns) if rows.tail >= 0 and columns.tail >= 0 else None


def _replace_weight(module: GraphModule, stored: Node, axes: tuple[Axis, Axis]) -> None:
    """Replace the integers by their blocked layout under the old name, by which the file calls the layer."""
    path = str(stored.target)
    laid_out = block_weight(tensor_at(module, path), *axes)
    *parents, leaf = path.split(".")
    setattr(module.get_submodule(".".join(parents)), leaf, laid_out)
    stored.meta = {**stored.meta, "val": laid_out}
