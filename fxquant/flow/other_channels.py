"""Choose how many channels layers have together with their formats, before the network is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.fx import GraphModule

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Budget, Settings, Target
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Choice, Program, Site, Sites, fork, put_tensor, tensor_at
from fxquant.core.run import CalibrationSet, judging_images, loss_of, model_outputs
from fxquant.core.storage import ScoreStore, tensor_digest, text_digest
from fxquant.flow.pipeline import find_sites, run
from fxquant.flow.score import loss_in_use
from fxquant.flow.stages import RESHAPE
from fxquant.passes import EstimateCost
from fxquant.passes.reshaping import (
    Chosen,
    Layer,
    Pair,
    Variant,
    chosen_shapes,
    layers_of,
    pairs_of,
    reshaped,
    variants_of,
)

COUNTED = ("average_bits", "size_mb", "size_ratio", "bops", "bops_ratio")
"""Limits whose cost follows from the numbers of channels."""
PLACE = "channels"
"""Folder of finished measurements, beside those of other scores."""
SCORED = 64
"""Images that variants are measured on at most: there are many."""


@dataclass(frozen=True)
class NewChannels:
    """A network with other channels, to be captured again.

    Args:
        module: the float network.
        budget: the limits, those against the network's own size restated for the new one.
        notes: what was changed, in words.
    """

    module: GraphModule
    budget: Budget
    notes: tuple[str, ...]


def changes_channels(settings: Settings) -> bool:
    """Whether the settings ask for layers with more or fewer channels."""
    return bool(settings.expand or settings.prune)


def check_channels(settings: Settings, budget: Budget | None) -> None:
    """Fail before the work where channels are to change within limits that do not follow from them.

    Raises:
        OptionError: no budget, or a limit of another kind.
    """
    if not changes_channels(settings):
        return
    asked = {} if budget is None else {**budget.limits, **budget.quality}
    others = [name for name in asked if name not in COUNTED]
    if others or not asked:
        raise OptionError(
            f"expand and prune choose channels within limits on {', '.join(COUNTED)}; "
            f"{'no budget was given' if not asked else f'{others[0]} is none of them'}"
        )


def new_channels(
    captured: Program,
    budget: Budget,
    settings: Settings,
    images: CalibrationSet,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> NewChannels:
    """Return the network whose layers have the channels of least summed loss within the budget.

    Every layer in every format, with every ratio of `settings.expand` and `settings.prune`, is put into the float
    network by itself and measured; one integer program chooses.

    Args:
        captured: as captured.
        budget: limits on costs of `COUNTED`.
        settings: of the search.
        images: calibration images.
        folder: keeps finished measurements, from which a killed run resumes; None keeps none.
        reporter: shows progress.

    Raises:
        InfeasibleBudgetError: no formats and ratios keep the limits.
        FileFormatError: the folder holds measurements of something else; the message names what.
    """
    reporter.stage(RESHAPE)
    program = find_sites(captured, settings)
    program = run(program, EstimateCost(program[Target]))
    settings = program[Settings]
    layers = layers_of(program, images, reporter)
    pairs = pairs_of(program, layers, images) if settings.prune else ()
    variants = _variants(layers, pairs, settings)
    losses = _losses(program, variants, images, folder, reporter)
    asked = settings.solver, settings.time_limit, settings.seed
    chosen = chosen_shapes(program, variants, losses, pairs, budget.limits, *asked)
    notes = _notes(chosen)
    for note in notes:
        reporter.say(note)
    restated = Budget.of(chosen.restated)
    return NewChannels(reshaped(program, chosen.variants, pairs), restated, notes)


def _variants(layers: Mapping[str, Layer | Site], pairs: Sequence[Pair], settings: Settings) -> list[Variant]:
    """Return the variants of all sites: pruned ones where a pair allows it, one precision for those in groups."""
    readers, found = {pair.consumer for pair in pairs}, list[Variant]()
    for layer in layers.values():
        if isinstance(layer, Site):
            found += [Variant(layer.name, choice) for choice in _widest_inputs(layer)]
            continue
        prune = settings.prune if layer.site.name in readers else ()
        rounds = settings.scoring_rounding != "nearest"
        found += variants_of(layer, _widest_inputs(layer.site), settings.expand, prune, rounds)
    return found


def _widest_inputs(site: Site) -> list[Choice]:
    """Return each weight format once, with the widest activations: those are chosen later."""
    best: dict[object, Choice] = {}
    for choice in site.choices:
        known = best.get(choice.weight)
        best[choice.weight] = choice if known is None or choice.activation_bits > known.activation_bits else known
    return list(best.values())


def _losses(
    program: Program,
    variants: Sequence[Variant],
    images: CalibrationSet,
    folder: Path | None,
    reporter: Reporter,
) -> list[float]:
    """Return the loss of the float network with each variant's weight in it; 0 for those that keep their weight."""
    loss = loss_in_use(program, images)
    scored = images if len(images) <= SCORED else images.take([k * len(images) // SCORED for k in range(SCORED)])
    scored = judging_images(scored, loss, program[Settings].seed)
    module, paths = fork(program.module), {site.name: site.weight for site in program[Sites].sites}
    known = {
        "model": tensor_digest(dict(program.module.named_parameters())) + text_digest(str(module.graph)),
        "data": tensor_digest({f"input {i}": tensor for i, tensor in enumerate(scored.inputs)}),
        "settings": text_digest(f"{[(v.site, v.choice.label, v.split, v.dropped) for v in variants]} {loss}"),
    }
    place = None if folder is None else folder / PLACE
    store, found = ScoreStore(place, known if place is not None else {}), list[float]()
    with torch.no_grad():
        reference = model_outputs(module, scored.inputs)
        for number, variant in enumerate(reporter.track(list(variants), "measure formats and shares", len(variants))):
            cell = store.get(f"variant-{number}")
            if cell is None and variant.effective is not None:
                path = paths[variant.site]
                put_tensor(module, path, variant.effective)
                outputs = model_outputs(module, scored.inputs)
                put_tensor(module, path, tensor_at(program.module, path))
                lost = float(loss_of(loss)(reference, outputs, scored.labels).mean())
                cell = store.put(f"variant-{number}", {"loss": lost})
            found.append(0.0 if cell is None else float(cell["loss"]))
    return found


def _notes(chosen: Chosen) -> tuple[str, ...]:
    more = {s: len(v.split) / v.inputs for s, v in chosen.variants.items() if v.split}
    less = {s: len(v.dropped) / v.inputs for s, v in chosen.variants.items() if v.dropped}
    used = ", ".join(f"{name} {value:.4g}" for name, value in chosen.used.items())
    said = []
    for word, shares in (("split", more), ("left out", less)):
        if shares:
            listed = ", ".join(f"{site} {100 * share:.0f} %" for site, share in shares.items())
            said.append(f"input channels {word}: {listed}")
    done = "; ".join(said) or "no channel was split or left out"
    return (f"{done}. Planned {used} of the network as it was given; limits below are restated for the new one",)


def noted(program: Program, notes: tuple[str, ...]) -> Program:
    """Return a program whose plan holds these notes, before its own."""
    plan = program[BitAllocation]
    return program.with_facts(replace(plan, notes=(*notes, *plan.notes))) if notes else program
