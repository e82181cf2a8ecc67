"""The command line: arguments in, the API called, results printed."""

from __future__ import annotations

from fxquant.cli.arguments import HELP, build_parser
from fxquant.cli.commands import COMMANDS, INTERRUPTED, main
from fxquant.cli.flags import add_flags, given
from fxquant.cli.inputs import ImageOptions, load_calibration, load_model, read_image
from fxquant.cli.inspect_onnx import SHOWN, as_text, inspect
from fxquant.cli.interrupts import stopped_in_order
