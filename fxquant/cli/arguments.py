"""The parser of the command line: one function for each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NoReturn

from fxquant.backends import Backend, backend, backends, runtimes
from fxquant.bench import ROUNDS
from fxquant.cli.flags import add_flags, given
from fxquant.cli.inputs import ImageOptions
from fxquant.core.facts import LIMIT_TABLES, QUALITIES, Options, Settings, Target
from fxquant.flow import KNOWN_NAMES
from fxquant.outputs import layouts
from fxquant.parity import default_runtimes
from fxquant.passes.rounding import ROUNDERS

Refuse = Callable[[str], NoReturn]

HELP = {
    "demo": "quantize the shipped digits network and compare it with float and uniform plans",
    "quantize": "choose bits within a budget; write plan, model and report",
    "analyze": "only score the layers, under torchrun in several processes; `allocate` chooses from the scores later",
    "reconstruct": "round a saved result's plan better: scales and rounding against the prediction difference",
    "allocate": "choose bits for another budget from saved scores",
    "pareto": "choose bits for several budgets from saved scores, one plan each; they join the curve of DIR's report",
    "export": "write a saved result as ONNX, on request with an edited plan",
    "bench": "time the float and the quantized model of a saved result, interleaved",
    "check": "compare simulation, exact reference and runtimes of a saved result, edge by edge",
    "report": "write the report of a saved result again",
    "recipes": "list the published methods that --recipe takes, and what each needs",
    "inspect": "show what any ONNX file holds: precision of operators and weights, and what runs in float",
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _budget(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--budget",
        action="append",
        required=required,
        metavar="NAME=NUMBER",
        help=f"{', '.join(LIMIT_TABLES)}; {', '.join(QUALITIES)}, with minimize=NAME; may be repeated",
    )


def _scoring(parser: argparse.ArgumentParser, leave: Collection[str] = ()) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="SPEC", help="pkg.module:factory, net.py:factory, or a .pt2 file")
    add("--calibration", required=True, metavar="SPEC", help=".npz, .npy, image folder, or pkg.module:loader")
    add("--output", required=True, type=Path, metavar="DIR", help="where results go")
    add("--workdir", type=Path, metavar="DIR", help="where finished scores are kept; default the output folder")
    add("--resume", action="store_true", help="go on with the scores in DIR, replace its results")
    add_flags(parser, ImageOptions)
    add_flags(parser, Settings, KNOWN_NAMES, leave=leave)


def _analyze(parser: argparse.ArgumentParser) -> None:
    _scoring(parser, leave=("rounding", "rounding_options"))


def _quantize(parser: argparse.ArgumentParser) -> None:
    _budget(parser, required=True)
    _scoring(parser)


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of quantize or analyze")


def _judged_folder(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--loss", metavar="SPEC", help="net.py:function, where one was given to quantize")


def _allocate(parser: argparse.ArgumentParser) -> None:
    _judged_folder(parser)
    _budget(parser, required=True)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results go; without it they replace DIR's")


def _reconstruct(parser: argparse.ArgumentParser) -> None:
    _judged_folder(parser)
    add = parser.add_argument
    add("--calibration", required=True, metavar="SPEC", help="the images that were given to quantize")
    add_flags(parser, ImageOptions)
    add("--rounding", metavar="NAME+NAME", help=f"{', '.join(ROUNDERS)}, or several joined by +; default pdquant")
    add_flags(parser, Settings, only=("rounding_options",))
    text = "times the plan is solved again with the measured cost of rounded units"
    add("--feedback", type=int, default=0, metavar="N", help=text)
    add("--output", type=Path, metavar="DIR", help="where results go; without it they replace DIR's")


def _pareto(parser: argparse.ArgumentParser) -> None:
    _judged_folder(parser)
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
    add("--output", type=Path, metavar="FILE", help="default the runtime's file in DIR, for example model.onnx")
    add("--runtime", choices=tuple(layouts()), help="what will read the file; default the result's target, if it can")
    for kind in _file_options():
        add_flags(parser, kind, leave=("runtime",))


def _bench(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds")
    parser.add_argument("--threads", type=int, help="threads of the runtime")


def _check(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    add = parser.add_argument
    add("--data", metavar="SPEC", help=".npz, .npy, image folder, or pkg.module:loader, labelled or not; default DIR's")
    add("--images", type=int, default=64, metavar="N", help="images to compare on at most")
    add_flags(parser, ImageOptions)
    default = ", ".join(default_runtimes())
    add("--against", type=_names, metavar="NAME,NAME", help=f"{', '.join(runtimes())}; default {default}")
    add("--onnx", type=Path, metavar="FILE", help="the file to check; default the one in DIR, else a new export")
    add("--threads", type=int, help="threads of the runtimes")
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


def _recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show all of one recipe")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


_ADDERS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "demo": _demo,
    "quantize": _quantize,
    "analyze": _analyze,
    "allocate": _allocate,
    "reconstruct": _reconstruct,
    "pareto": _pareto,
    "export": _export,
    "bench": _bench,
    "check": _check,
    "report": _report,
    "inspect": _inspect,
    "recipes": _recipes,
}


def _file_options() -> list[type[Options]]:
    """Return the option classes of the files that backends write."""
    kinds = [found.export.options for found in backends().values() if found.export is not None]
    return list(dict.fromkeys(kind for kind in kinds if kind is not None))


def export_options(args: argparse.Namespace, target: Target) -> tuple[Backend, dict[str, object]]:
    """Return the backend that `fxquant export` writes a file for, and the options of that file which were given.

    Without --runtime it is the result's own target, and ONNX where that has no file.
    """
    known = layouts()
    own = backend(target)
    chosen = known[args.runtime] if args.runtime else own if own.export is not None else next(iter(known.values()))
    options = {
        name: value for kind in _file_options() for name, value in given(kind, args).items() if name != "runtime"
    }
    assert chosen.export is not None
    if args.runtime and chosen.export.layouts:
        options["runtime"] = args.runtime
    return chosen, options
