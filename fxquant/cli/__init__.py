"""The command line: arguments in, the API called, results printed."""

from __future__ import annotations

from fxquant.cli.arguments import HELP, build_parser, forbidden, image_options, pins, rounding_options
from fxquant.cli.commands import COMMANDS, INTERRUPTED, main
from fxquant.cli.inputs import ImageOptions, load_calibration, load_model, read_image
from fxquant.cli.inspect_onnx import SHOWN, as_text, inspect
from fxquant.cli.interrupts import stopped_in_order

__all__ = [
    "COMMANDS",
    "HELP",
    "INTERRUPTED",
    "SHOWN",
    "ImageOptions",
    "as_text",
    "build_parser",
    "forbidden",
    "image_options",
    "inspect",
    "load_calibration",
    "load_model",
    "main",
    "pins",
    "read_image",
    "rounding_options",
    "stopped_in_order",
]
