"""Tables of `docs/recipes-measured.md`, made from the JSON of the recipes' benchmarks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report_table import RESULTS
from fxquant.core.storage import read_json
from fxquant.recipes import RECIPES

WIDTH = 120
"""Characters of a line that is no table."""
ROUNDINGS = ("own", "nearest", "gptq")
CLEAR = 2.0
"""Standard errors that a difference must have to be called one."""
SCORED = 0.75
"""Share of the calibration images that layers are scored on; the others are held out."""
ERROR = "KL s.e."

Row = Mapping[str, Any]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _document(name: str) -> Mapping[str, Any]:
    return read_json(RESULTS / f"{name}.json", "benchmark", 1)


def figure_table(network: str) -> str:
    """Return the measured figures of one network: a line for each recipe, a column for each budget and rounding."""
    document = _document(f"recipes_{network}")
    first, *rows = document["rows"]
    found = {(row["recipe"], row["budget, bits"], row["which"]): row for row in rows}
    budgets = sorted({row["budget, bits"] for row in rows})
    asked_for = [which for which in ROUNDINGS if any(row["which"] == which for row in rows)]
    cells = [(bits, which) for bits in budgets for which in asked_for]
    columns = ["recipe", "own rounding", *(f"{bits:g} bits, {which}" for bits, which in cells)]
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        # A rounding that takes long may not have been measured yet.
        one = next(row for row in rows if row["recipe"] == name)
        own = "+".join(RECIPES[name].rounding) if name in RECIPES else _own_rounding(rows, name)
        figures = [_figure(found.get((name, *cell))) for cell in cells]
        passes = one.get("passes", math.nan) / _images(document, name)
        spent = [f"{one['bytes'] / 1000:.1f}", f"{one.get('processor s', math.nan):.0f}", f"{passes:.3g}"]
        lines.append([_shown(name), own, *figures, *(text.replace("nan", "") for text in spent)])
    made = table([*columns, f"kB at {budgets[0]:g}", "processor s", "passes"], lines)
    before = f"{_conditions(document)} Float: {_figure(first)}."
    return "\n\n".join([_wrapped(before), made, *map(_wrapped, _compared(rows, budgets))])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _own_rounding(rows: Sequence[Row], name: str) -> str:
    chains = [row["rounding"] for row in rows if row["recipe"] == name and row["which"] == "own"]
    return str(chains[0]) if chains else ""


def _images(document: Mapping[str, Any], name: str) -> int:
    """Return how many images a contestant was scored on; 1 where the document does not say."""
    meta = document["meta"]
    held_in = SCORED * meta.get("calibration images", 1 / SCORED)
    return int(meta.get("fewer images", {}).get(name, held_in))


def _conditions(document: Mapping[str, Any]) -> str:
    """Return what the figures of one network were measured with, and how far chance moves an accuracy."""
    meta, first = document["meta"], document["rows"][0]
    if "evaluation images" not in meta:
        return f"Perplexity on {meta['words']} words." if "words" in meta else ""
    count, share = meta["evaluation images"], first["accuracy %"] / 100
    error = 100 * (share * (1 - share) / count) ** 0.5
    text = f"{meta['calibration images']} calibration images, {count} evaluation images (one standard error of an "
    given, present = meta.get("fewer images", {}), {row["recipe"] for row in document["rows"]}
    fewer = ", ".join(f"`{name}` {images}" for name, images in given.items() if name in present)
    text += f"accuracy: {error:.1f})." + f" Scored on fewer images: {fewer}." * bool(fewer)
    learning = meta.get("learning", {})
    learned = any(row["which"] == "own" and RECIPES[name].learned for name, row in _published(document["rows"]))
    steps, batch = learning.get("iterations"), learning.get("batch", 32)
    return text + f" Learned roundings: {steps} steps of {batch} images for each unit." * (learned and bool(steps))


def _published(rows: Iterable[Row]) -> list[tuple[str, Row]]:
    return [(row["recipe"], row) for row in rows if row["recipe"] in RECIPES]


def _compared(rows: Sequence[Row], budgets: Sequence[float]) -> list[str]:
    """Return for each budget who has clearly less KL than our default, and who is within the noise of it."""
    lines = []
    for bits in budgets:
        near: dict[str, list[str]] = {"less": [], "like": []}
        for row in rows:
            if row["budget, bits"] != bits or not row.get("its s.e."):
                continue
            distance = row["KL above default"] / row["its s.e."]
            if distance <= CLEAR:
                name = f"{_shown(row['recipe'])} ({row['which']}, {row['KL above default']:+.3f}, {distance:+.1f})"
                near["less" if distance < -CLEAR else "like"].append(name)
        if any("KL above default" in row for row in rows):
            texts = {key: ", ".join(names) or "none" for key, names in near.items()}
            lines.append(
                f"At {bits:g} bits, KL above our default's, paired image by image, and in standard errors: clearly "
                f"less (by more than {CLEAR:g}): {texts['less']}; within the noise: {texts['like']}; all others more."
            )
    return lines


def _shown(name: str) -> str:
    return f"`{name}`" if name in RECIPES else name


def training_table() -> str:
    """Return the measured figures of recipes that train, before and after training."""
    first, *rows = _document("training_recipes")["rows"]
    columns = ("contestant", "bits", "before", "after", "kB", "processor s", "widths of the layers")
    lines = []
    for row in rows:
        bits = f"{row['average bits']:.2f}"
        if "AP %" in row:
            before, after = (
                f"AP {row[f'AP %{when}']:.1f}, AP50 {row[f'AP50 %{when}']:.1f}" for when in (" before", "")
            )
            named = f"{row['contestant']}, {row['runs in']} (float AP {row['AP % float']:.1f})"
            lines.append([named, bits, before, _kept(row, after), "", f"{row['processor s']:.0f}", ""])
            continue
        before = f"{row['accuracy % before']:.1f} ({row['KL before']:.3f})"
        size, seconds = f"{row['bytes'] / 1000:.1f}", f"{row['processor s']:.0f}"
        lines.append([row["contestant"], bits, before, _figure(row), size, seconds, row["widths"]])
    return f"Float: {_figure(first)}.\n\n{table(columns, lines)}"


def channels_table() -> str:
    """Return the figures of networks with channels split or left out."""
    columns = ("network", "top-1 % (KL)", "weights kB", "file kB", "million MACs", "ms")
    lines = []
    for row in _document("new_channels")["rows"]:
        if "bytes" in row:
            sizes = [f"{row['weight bits kB']:.1f}", f"{row['bytes'] / 1000:.1f}", f"{row['million MACs']:.1f}"]
            lines.append([row["network"], _figure(row), *sizes, f"{row['ms']:.2f}"])
    return table(columns, lines)


def routed_table(network: str) -> str:
    """Return the figures of a router between two plans, next to one plan of the same mean bit operations."""
    first, *rows = _document(f"routed_{network}")["rows"]
    found = {(row["limit"], row["network"]): row for row in rows}
    columns = ("limit on BOPs", "one plan", "one plan, as many BOPs", "routed", "best possible", "hard patches")
    lines = []
    for limit in dict.fromkeys(row["limit"] for row in rows):
        one, like, routed, best = (
            found[limit, name] for name in ("one plan", "one plan of the routed BOPs", "routed", "oracle")
        )
        shown = [_decibels(one), f"{_decibels(like)}, {like['mean BOPs ratio']:.4f}"]
        shown += [f"{_decibels(routed)}, {routed['mean BOPs ratio']:.4f}", f"{best['PSNR dB']:.2f}"]
        sizes = f"{one['bytes'] / 1000:.0f} and {routed['bytes'] / 1000:.0f}"
        lines.append([f"{limit:.4f} ({128 * limit:g} bits)", *shown, f"{100 * routed['hard share']:.0f} %", sizes])
    return f"Float: {_decibels(first)}.\n\n{table([*columns, 'file kB, one plan and routed'], lines)}"


def _decibels(row: Row) -> str:
    return f"{row['PSNR dB']:.2f} ({row['PSNR dB, Urban100']:.2f})"


def ranges_table() -> str:
    """Return what each observer of activations leaves of super-resolution with all layers at W4A4."""
    rows = [row for row in _document("activation_ranges")["rows"] if "W4A4" in row["network"]]
    observers = list(dict.fromkeys(row["ranges"] for row in rows))
    found = {(row["network"], row["ranges"]): row for row in rows}
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        kept = [found[network, observer] for observer in observers]
        figures = [f"{row['float'] - row['lost']:.1f}" for row in kept]
        alone = [f"{row['float'] - row['lost, activations']:.1f}" for row in kept]
        lines.append([network, f"{kept[0]['float']:.1f}", *figures])
        lines.append([f"{network}, activations alone", "", *alone])
    return table(["PSNR in dB", "float", *(f"`{name}`" for name in observers)], lines)


def _figure(row: Row | None) -> str:
    """Return accuracy in per cent with the KL behind it, or perplexity; in square brackets what was rejected."""
    if row is None:
        return ""
    if "perplexity" in row:
        text = f"{row['perplexity']:.1f}"
    else:
        text = f"{row['accuracy %']:.1f}"
        if "KL" in row:
            text += f" ({row['KL']:.3f}{f' ± {row[ERROR]:.3f}' if row.get(ERROR) else ''})"
    return _kept(row, text)


def _kept(row: Row, text: str) -> str:
    return f"[{text}]" if row.get("rejected") else text
