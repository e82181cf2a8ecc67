"""What may be chosen when an ONNX file is written."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.core.errors import OptionError

RUNTIMES = ("onnxruntime", "openvino")
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block lengths for which ONNX Runtime has a kernel."""
LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights that one file may hold: protobuf ends at 2 GiB, and the graph needs some of it."""


@dataclass(frozen=True)
class OnnxOptions:
    """Choices of an export.

    Args:
        runtime: whom the graph is laid out for. For "onnxruntime" stem convolutions run over blocks of pixels, which
            OpenVINO would only be slowed down by. For "openvino" biases are nodes of their own, without which it may
            answer wrongly, and weights of 2 bits take 4; ONNX Runtime answers alike, but slower.
        weight_only: shell patterns of layer names, for example `("head", "classifier.*")`: linear layers of at most 4
            bits whose weights get one scale per block of inputs and which multiply floats (MatMulNBits). Faster than
            integers for a single row, slower from a few rows on; see docs/deployment.md.
        block_size: inputs per scale of such a layer: 16, 32, 64, 128 or 256.
        external_data: write the weights to `<file>.data` beside the file; done anyway where they are too large for one.
        largest_file: bytes of weights beyond which that is done, at least 1.

    Raises:
        OptionError: a value that is not allowed.
    """

    runtime: str = "onnxruntime"
    weight_only: tuple[str, ...] = ()
    block_size: int = 32
    external_data: bool = False
    largest_file: int = LARGEST_FILE

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise OptionError(f"runtime={self.runtime!r} is unknown; give one of {', '.join(RUNTIMES)}")
        if isinstance(self.weight_only, str) or not all(isinstance(p, str) for p in self.weight_only):
            raise OptionError(f"weight_only={self.weight_only!r} must be a tuple of layer name patterns")
        if self.block_size not in BLOCK_SIZES:
            raise OptionError(f"block_size={self.block_size} has no kernel; give one of {BLOCK_SIZES}")
        if not 1 <= self.largest_file <= LARGEST_FILE:
            raise OptionError(f"largest_file={self.largest_file} is out of range; give 1 to {LARGEST_FILE} bytes")
