"""The command line's arguments: what can be said, and how texts become values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from fxquant.backends import BACKENDS
from fxquant.backends.onnx import BLOCK_SIZES
from fxquant.backends.onnx import RUNTIMES as LAYOUTS
from fxquant.bench import ROUNDS
from fxquant.cli.inputs import ImageOptions
from fxquant.core.errors import OptionError
from fxquant.core.facts import CONTEXTS, EFFORTS
from fxquant.core.ir import Choice
from fxquant.parity import RUNTIMES
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.sensitivity import ESTIMATORS

Refuse = Callable[[str], NoReturn]

HELP = {
    "demo": "quantize the shipped digits network and compare it with float and uniform plans",
    "quantize": "choose bits within a budget; write plan, model and report",
    "analyze": "only score the layers, under torchrun in several processes; `allocate` chooses from the scores later",
    "reconstruct": "round a saved result's plan better: scales and rounding against the prediction difference",
    "allocate": "choose bits for another budget from saved scores",
    "pareto": "choose bits for several budgets from saved scores, one plan each",
    "export": "write a saved result as ONNX, on request with an edited plan",
    "bench": "time the float and the quantized model of a saved result, interleaved",
    "check": "compare simulation, exact reference and runtimes of a saved result, edge by edge",
    "report": "write the report of a saved result again",
    "inspect": "show what an ONNX file holds, whoever made it: precision of operators and weights, what runs in float",
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments as one line, like every other error."""

    refuse: Refuse

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        type(self).refuse(f"{message}; see {self.prog} --help")


def build_parser(commands: Iterable[str], refuse: Refuse) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        commands: names of the commands.
        refuse: called with what is wrong with the arguments; must raise.
    """
    kind = type("Parser", (_Parser,), {"refuse": staticmethod(refuse)})
    parser: argparse.ArgumentParser = kind(prog="fxquant", description="Mixed-precision quantization for PyTorch.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    chosen = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in commands:
        sub = chosen.add_parser(name, help=HELP[name], description=f"{HELP[name]}.")
        sub.add_argument("--quiet", action="store_true", help="no progress, no summary")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        _ADDERS[name](sub)
    return parser


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 2,4,8") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.485,0.456,0.406") from error


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 224 or 224x320") from error


def _budget(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--budget",
        action="append",
        required=required,
        metavar="NAME=NUMBER",
        help="size_mb, size_ratio, average_bits, bops, bops_ratio, activation_mb, latency_ms or latency_ratio; loss, "
        "disagreement or accuracy_drop, with minimize=NAME; may be repeated",
    )


def _image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image-size", type=_size, metavar="N|HxW", help="size of the images of a folder")
    add("--mean", type=_numbers, default=(0.0, 0.0, 0.0), metavar="M,M,M", help="subtracted from values 0..1")
    add("--std", type=_numbers, default=(1.0, 1.0, 1.0), metavar="S,S,S", help="values are divided by it")


def _scoring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="SPEC", help="pkg.module:factory, or a .pt2 file")
    add("--calibration", required=True, metavar="SPEC", help=".npz, .npy, image folder, or pkg.module:loader")
    add("--output", required=True, type=Path, metavar="DIR", help="where results go")
    add("--workdir", type=Path, metavar="DIR", help="where finished scores are kept; default the output folder")
    add("--resume", action="store_true", help="go on with the scores in DIR, replace its results")
    _image_options(parser)
    add("--bits", type=_widths, default=(2, 4, 8), metavar="B,B", help="candidate weight bits; 32 is float")
    add("--activation-bits", type=_widths, default=(8,), metavar="B,B", help="candidate activation bits")
    add("--target", default="onnxruntime", metavar="NAME", help=f"{', '.join(BACKENDS)}, or a target file (.json)")
    add("--effort", choices=tuple(EFFORTS), default="default", help="how much is measured")
    add("--context", choices=CONTEXTS, default="float", help="what everything else is while one layer is scored")
    add("--estimators", type=_names, metavar="NAME,NAME", help=f"{', '.join(ESTIMATORS)}; default by effort")
    add("--seed", type=int, default=0, help="same seed, same answer")
    add("--pin", action="append", default=[], metavar="PATTERN=W8A8", help="the only precision of these layers")
    add("--pin-ends", action="store_true", help="pin first and last layer to 8 bits")
    add("--keep-float", action="append", default=[], metavar="PATTERN", help="layers in float: glob, re:.., type:..")
    add("--forbid", action="append", default=[], metavar="PATTERN=W2A8,..", help="what these layers may not have")
    add("--observer", default="mse", help="minmax, mse, moving_average or percentile")
    add("--loss", help="kl, ce (needs labels) or mse; the model's output decides if not given")
    add("--time-limit", type=float, default=60.0, metavar="SECONDS", help="for each solve")
    add("--threads", type=int, help="threads of the runtime")


def _quantize(parser: argparse.ArgumentParser) -> None:
    _budget(parser, required=True)
    _scoring(parser)
    _rounding(parser, None)


def _rounding(parser: argparse.ArgumentParser, default: str | None) -> None:
    names = f"{', '.join(ROUNDERS)}, or several joined by +; default {default or 'by effort'}"
    parser.add_argument("--rounding", default=default, metavar="NAME+NAME", help=names)
    parser.add_argument(
        "--rounding-option", action="append", default=[], metavar="NAME=VALUE", help="for example iterations=300"
    )


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of quantize or analyze")


def _allocate(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    _budget(parser, required=True)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results go; without it they replace DIR's")


def _reconstruct(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    add = parser.add_argument
    add("--calibration", required=True, metavar="SPEC", help="the images that were given to quantize")
    _image_options(parser)
    _rounding(parser, "pdquant")
    add(
        "--feedback", type=int, default=0, metavar="N", help="times the plan is solved anew with what units really cost"
    )
    add("--output", type=Path, metavar="DIR", help="where results go; without it they replace DIR's")


def _pareto(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument(
        "--budget",
        action="append",
        required=True,
        metavar="NAME=NUMBER,..",
        help="one budget, of one or more limits; repeated for each plan",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where plan_1.json, plan_2.json, .. go")


def _export(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan.json edited by hand")
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", help="default DIR/model.onnx")
    add("--runtime", choices=LAYOUTS, default=LAYOUTS[0], help="whom the file is laid out for")
    add("--weight-only", type=_names, default=(), metavar="GLOB,GLOB", help="linear layers of <= 4 bits in blocks")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=32, help="inputs per scale of such a layer")
    add("--external-data", action="store_true", help="write the weights to FILE.data, as files over 2 GB must")


def _bench(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds")
    parser.add_argument("--threads", type=int, help="threads of the runtime")


def _check(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    add = parser.add_argument
    add("--data", metavar="SPEC", help=".npz, .npy, image folder, or pkg.module:loader, labelled or not; default DIR's")
    add("--images", type=int, default=64, metavar="N", help="images to compare on at most")
    _image_options(parser)
    add("--against", type=_names, default=("onnxruntime", "fx_int8"), metavar="NAME,NAME", help=", ".join(RUNTIMES))
    add("--onnx", type=Path, metavar="FILE", help="the file to check; default DIR/model.onnx, else exported anew")
    add("--threads", type=int, help="threads of ONNX Runtime")
    add("--json", action="store_true", help="everything, as JSON")


def _report(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the report goes; default DIR")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="an ONNX model")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--no-runtime", action="store_true", help="only read; do not ask ONNX Runtime for its kernels")


def _demo(parser: argparse.ArgumentParser) -> None:
    _budget(parser, required=False)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="where results go")


_ADDERS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "demo": _demo,
    "quantize": _quantize,
    "analyze": _scoring,
    "allocate": _allocate,
    "reconstruct": _reconstruct,
    "pareto": _pareto,
    "export": _export,
    "bench": _bench,
    "check": _check,
    "report": _report,
    "inspect": _inspect,
}


def image_options(args: argparse.Namespace) -> ImageOptions:
    """Return how images of a folder are read.

    Raises:
        OptionError: a value out of range.
    """
    return ImageOptions(args.image_size, args.mean, args.std)


def pins(texts: Iterable[str]) -> dict[str, Choice]:
    """Read pins written as `glob=W8A8`.

    Raises:
        OptionError: not of that form, or a glob given twice.
    """
    return {pattern: Choice.parse(label) for pattern, label in _by_glob("pin", texts, "GLOB=W8A8").items()}


def forbidden(texts: Iterable[str]) -> dict[str, tuple[Choice, ...]]:
    """Read forbidden precisions written as `glob=W2A8,W2A4`.

    Raises:
        OptionError: not of that form, or a glob given twice.
    """
    found = _by_glob("forbid", texts, "GLOB=W2A8,W2A4")
    return {pattern: tuple(map(Choice.parse, labels.split(","))) for pattern, labels in found.items()}


def rounding_options(texts: Iterable[str]) -> dict[str, object]:
    """Read settings of the reconstruction engine written as `iterations=300`.

    Raises:
        OptionError: not of that form.
    """
    found: dict[str, object] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise OptionError(f"rounding option {text!r} is not understood; write NAME=VALUE")
        try:
            read = json.loads(value)
        except ValueError:
            # A word such as block needs no quotation marks.
            read = value
        found[name] = tuple(read) if isinstance(read, list) else read
    return found


def _by_glob(option: str, texts: Iterable[str], form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        pattern, separator, label = text.rpartition("=")
        if not separator or not pattern:
            raise OptionError(f"{option} {text!r} is not understood; write {form}")
        if pattern in found:
            raise OptionError(f"{option} {pattern!r} is given twice; give it once")
        found[pattern] = label
    return found
