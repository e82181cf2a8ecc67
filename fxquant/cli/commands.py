"""`fxquant`: arguments in, the API called, results printed. Nothing is computed here.

Exit codes: 0 done, 1 the work failed, 2 bad input, 3 no plan keeps the budget, 4 a runtime does not
compute what the plan says, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from fxquant import api
from fxquant.backends import backends
from fxquant.bench import bench
from fxquant.cli.arguments import build_parser, export_options
from fxquant.cli.flags import given
from fxquant.cli.inputs import ImageOptions, load_calibration, load_loss, load_model
from fxquant.cli.inspect_onnx import as_json, as_text, inspect
from fxquant.cli.interrupts import stopped_in_order
from fxquant.core.errors import FxquantError, OptionError
from fxquant.core.facts import Budget, Settings, Target
from fxquant.core.host import Shards, memory_named, printable
from fxquant.core.storage import check_writable
from fxquant.flow import most_images
from fxquant.outputs import (
    ROUNDING,
    SCORES,
    add_to_report,
    check_packages,
    export,
    known_extras,
    output_folder,
    write_outputs,
    write_reports,
)
from fxquant.parity import as_json as parity_json
from fxquant.parity import check
from fxquant.recipes import described, listing, settings_of, table
from fxquant.report import comparison, runtime_text, speed_table
from fxquant.result import Result

INTERRUPTED = 130
GO_ON = {
    "quantize": "--resume goes on from there",
    "analyze": "--resume goes on from there",
    "reconstruct": "the same command goes on from there",
}
"""Command that keeps what it has finished -> how to go on with it."""
LESS_MEMORY = "give fewer or smaller calibration images, or a lower --effort"
ROUNDING_IMAGES = 1024
"""Images of a calibration set that `reconstruct` takes at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not debug:
        logging.getLogger("torch").setLevel(logging.ERROR)
    args, stopped = argparse.Namespace(), False
    try:
        build_parser(COMMANDS, _refuse).parse_args(arguments, args)
        with warnings.catch_warnings():
            # A user of the command line can do nothing about torch's warnings on its own code.
            warnings.simplefilter("ignore")
            # torchrun stops the other processes when one dies; they report it as a stop by hand.
            shared = Shards.from_environment().world_size > 1
            with stopped_in_order(terminate=shared), memory_named(args.command, LESS_MEMORY):
                COMMANDS[args.command](args)
    except KeyboardInterrupt:
        stopped = True
    except FxquantError as error:
        return _failed(str(error), error.exit_code, debug)
    except Exception as error:
        return _failed(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1, debug)
    if stopped:
        # Printed last: interrupted stages print how far they came when the interrupt's traceback is gone.
        print(printable(f"fxquant: stopped; {_kept(args)}"), file=sys.stderr)
        return INTERRUPTED
    return 0


def _kept(args: argparse.Namespace) -> str:
    """Return what a stopped command leaves, and how to go on."""
    command = getattr(args, "command", None)
    if command not in GO_ON:
        return "what was there before is as it was"
    place: Path = getattr(args, "workdir", None) or args.output or args.folder
    count = sum(1 for name in (SCORES, ROUNDING) for _ in (place / name).rglob("[!.]*.npz"))
    return f"{count} finished parts are kept in {place}: {GO_ON[command]}" if count else "nothing was finished yet"


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"fxquant: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _refuse(message: str) -> NoReturn:
    raise OptionError(message)


def _image_options(args: argparse.Namespace) -> ImageOptions:
    return ImageOptions.of(given(ImageOptions, args))


def _scored(args: argparse.Namespace, budget: Budget | None) -> None:
    """Run the pipeline on a model and fill the output folder; under torchrun the first process does so."""
    shards = Shards.from_environment()
    quiet = args.quiet or not shards.is_first
    with ExitStack() as held:
        folder = held.enter_context(output_folder(args.output, args.resume, shards.is_first))
        if args.workdir is not None:
            # Two runs may share it: they measure the same, and the last one's file stays.
            held.enter_context(output_folder(args.workdir, resume=True, writer=False))
        asked = given(Settings, args)
        # As they were typed, so that a recipe knows its own parts from the user's.
        given_settings = {**asked, "distributed": True, "loss": load_loss(asked.get("loss"))}
        settings = settings_of(given_settings)
        check_packages(settings.target)
        most = most_images(budget, settings)
        images = load_calibration(args.calibration, _image_options(args), most)
        result = api.quantize(
            load_model(args.model),
            images,
            budget if shards.is_first else None,
            workdir=args.workdir or folder,
            progress=not quiet,
            options=given_settings,
        )
        if shards.is_first:
            _tell(args, result, write_outputs(result, folder))


def _tell(args: argparse.Namespace, result: Result, written: list[Path]) -> None:
    if not args.quiet:
        print(result.summary())
        print("\nwrote " + ", ".join(map(str, written)))


def _quantize(args: argparse.Namespace) -> None:
    _scored(args, Budget.of(args.budget))


def _analyze(args: argparse.Namespace) -> None:
    _scored(args, None)


def _allocate(args: argparse.Namespace) -> None:
    budget = Budget.of(args.budget)
    known = Result.load(args.folder, load_loss(args.loss))
    with output_folder(args.output or args.folder, resume=args.output is None) as folder:
        result = api.resolve(known, budget, progress=not args.quiet)
        _tell(args, result, write_outputs(result, folder))


def _reconstruct(args: argparse.Namespace) -> None:
    known = Result.load(args.folder, load_loss(args.loss))
    with output_folder(args.output or args.folder, resume=args.output is None) as folder:
        images = load_calibration(args.calibration, _image_options(args), ROUNDING_IMAGES)
        result = api.reconstruct(
            known,
            images,
            **({"rounding": args.rounding} if args.rounding else {}),
            options=given(Settings, args).get("rounding_options"),
            feedback=args.feedback,
            workdir=folder,
            progress=not args.quiet,
        )
        _tell(args, result, write_outputs(result, folder))


def _pareto(args: argparse.Namespace) -> None:
    budgets = [Budget.of(text) for text in args.budget]
    if args.output is not None:
        check_writable(args.output)
    with output_folder(args.folder, resume=True):
        known = Result.load(args.folder, load_loss(args.loss))
        plans = api.pareto(known, budgets)
        joined = known.with_curve(plans)
        _ = joined.save(args.folder)
        add_to_report(joined, args.folder, {})
    for number, (budget, plan) in enumerate(zip(budgets, plans, strict=True), start=1):
        if args.output is not None:
            plan.to_json(args.output / f"plan_{number}.json")
        if not args.quiet:
            print(f"{budget}: {plan.summary()}")


def _export(args: argparse.Namespace) -> None:
    result = Result.load(args.folder)
    if args.plan is not None:
        result = result.with_plan(args.plan)
    runtime, options = export_options(args, result.program[Target])
    assert runtime.export is not None
    path = args.output or args.folder / runtime.export.file
    check_writable(path.parent)
    measured = export(result, runtime, path, options)
    if not args.quiet:
        kernels = measured.get("kernels", {})
        integer = sum(not kernel.startswith("float") for kernel in kernels.values())
        ran = f"; {integer} of {len(kernels)} layers on integer kernels" if kernels else ""
        print(f"wrote {path}, {measured['bytes_on_disk']} bytes{ran}")


def _bench(args: argparse.Namespace) -> None:
    result = Result.load(args.folder)
    check_writable(args.folder)
    speeds = bench(result, args.threads, args.rounds)
    extras = known_extras(result, args.folder)
    extras["comparison"] = comparison(extras.get("comparison", []), speeds)
    extras["runtime"] = runtime_text(result.program, args.threads)
    write_reports(result, args.folder, extras)
    print(speed_table(extras["comparison"]))


def _check(args: argparse.Namespace) -> None:
    result = Result.load(args.folder)
    given = None
    if args.data is not None:
        given = load_calibration(args.data, _image_options(args), args.images, "--data")
    # Of the folder's own files the runtimes read those that they export.
    files = {args.folder / found.export.file for found in backends().values() if found.export is not None}
    models = sorted(path for path in files if path.is_file()) if args.onnx is None else [args.onnx]
    parity = check(result, given, args.against, models, args.threads, args.images)
    if args.json:
        print(parity_json(parity))
    elif not args.quiet:
        print(parity.summary())
    # The report is about the folder's own model, not about another file.
    if args.onnx is None:
        try:
            add_to_report(result, args.folder, {"check": parity.to_json()})
        except FxquantError as error:
            # The findings are printed even if the report cannot hold them.
            print(printable(f"fxquant: the report was not updated: {error}"), file=sys.stderr)
    parity.require()


def _report(args: argparse.Namespace) -> None:
    result = Result.load(args.folder)
    folder = args.output or args.folder
    with output_folder(folder, resume=True):
        write_reports(result, folder, known_extras(result, args.folder))
    if not args.quiet:
        print(f"wrote {folder / 'report.html'}, {folder / 'report.json'}")


def _inspect(args: argparse.Namespace) -> None:
    found = inspect(args.file, runtime=not args.no_runtime)
    print(as_json(found) if args.json else as_text(found))


def _recipes(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(listing(args.name), indent=2, ensure_ascii=False))
    else:
        print(table() if args.name is None else described(args.name))


def _demo(args: argparse.Namespace) -> None:
    # Imported here because only the demo needs scikit-learn's digits.
    from fxquant.demo import run_demo

    outcome = run_demo(args.output, args.budget, progress=not args.quiet)
    print(outcome.table)
    if not args.quiet:
        print("\nwrote " + ", ".join(map(str, outcome.written)) + f" in {outcome.seconds:.0f} s")


COMMANDS = {
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
"""Command -> what runs it."""


if __name__ == "__main__":
    sys.exit(main())
