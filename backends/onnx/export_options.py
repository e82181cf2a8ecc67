"""The options of an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fxquant.core.facts import Options, rules

LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights that one file may hold: protobuf ends at 2 GiB, and the graph needs some of it."""


@dataclass(frozen=True)
class OnnxOptions(Options):
    """Options of an ONNX file.

    Args:
        runtime: what will read the file. For "onnxruntime" stem convolutions run over blocks of pixels, which
            OpenVINO would only be slowed down by. For "openvino" biases are nodes of their own, without which it may
            answer wrongly; ONNX Runtime answers alike, but slower.
        packed: write weights in their shortest form; without, in a byte each, which loads in less time and memory.
        weight_only: glob over layer names, for example "classifier.*": linear layers of at most 4 bits whose weights
            get one scale per block of inputs and which multiply floats (MatMulNBits). Faster than integers for a single
            row, slower from a few rows on; see docs/deployment.md.
        block_size: inputs per scale of such a layer.
        external_data: write the weights to a second file, named like the first with ".data" at its end; done in any
            case where they are too large for one file.
        largest_file: bytes of weights beyond which that is done.

    Raises:
        OptionError: a value that is not allowed.
    """

    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    packed: bool = True
    weight_only: tuple[str, ...] = ()
    # ONNX Runtime has a kernel for these.
    block_size: Literal[16, 32, 64, 128, 256] = 32
    external_data: bool = False
    largest_file: int = field(default=LARGEST_FILE, metadata=rules(least=1, most=LARGEST_FILE, saved=False))
