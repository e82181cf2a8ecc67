"""Write the tables of `docs/recipes.md`: the rows of `fxquant.recipes`, and the figures of the recipes' benchmarks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arguments import asked
from benchmarks.report_table import RESULTS
from fxquant.core.storage import read_json
from fxquant.recipes import COLUMNS, RECIPES, listing

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
WIDTH = 120
"""Characters of a line of prose."""

WIDTH = 120
"""Of lines that are no tables."""
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


def recipe_table() -> str:
    """Return the table of all recipes with their papers."""
    columns = (*COLUMNS, "what it does", "source")
    rows = [
        (f"`{row['recipe']}`", *(row[name] for name in COLUMNS[1:]), row["about"], row["source"]) for row in listing()
    ]
    return table(columns, rows)


def figure_table(network: str) -> str:
    """Return the measured figures of one network: a line for each recipe, a column for each budget and rounding."""
    document = read_json(RESULTS / f"recipes_{network}.json", "benchmark", 1)
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
    return f"{text}accuracy: {error:.1f})." + f" Scored on fewer images: {fewer}." * bool(fewer)


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
                name = f"{_shown(row['recipe'])} ({row['which']}, {row['KL above default']:+.3f})"
                near["less" if distance < -CLEAR else "like"].append(name)
        if any("KL above default" in row for row in rows):
            texts = {key: ", ".join(names) or "none" for key, names in near.items()}
            said = (
                f"At {bits:g} bits, KL against our default's, paired image by image: clearly less (by more than "
                f"{CLEAR:g} standard errors): {texts['less']}; within the noise: {texts['like']}; all others more."
            )
            lines.append(textwrap.fill(said, WIDTH, break_long_words=False, break_on_hyphens=False))
    return lines


def _shown(name: str) -> str:
    return f"`{name}`" if name in RECIPES else name


def training_table() -> str:
    """Return the measured figures of recipes that train, before and after training."""
    first, *rows = read_json(RESULTS / "training_recipes.json", "benchmark", 1)["rows"]
    columns = ("contestant", "bits", "before", "after", "kB", "processor s", "widths of the layers")
    lines = []
    for row in rows:
        bits = f"{row['average bits']:.2f}"
        if "AP %" in row:
            before, after = (
                f"AP {row[f'AP %{when}']:.1f}, AP50 {row[f'AP50 %{when}']:.1f}" for when in (" before", "")
            )
            named = f"{row['contestant']}, {row['runs in']} (float AP {row['AP % float']:.1f})"
            lines.append([named, bits, before, after, "", f"{row['processor s']:.0f}", ""])
            continue
        before = f"{row['accuracy % before']:.1f} ({row['KL before']:.3f})"
        size, seconds = f"{row['bytes'] / 1000:.1f}", f"{row['processor s']:.0f}"
        lines.append([row["contestant"], bits, before, _figure(row), size, seconds, row["widths"]])
    return f"Float: {_figure(first)}.\n\n{table(columns, lines)}"


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
    return f"[{text}]" if row.get("rejected") else text


def made() -> dict[str, str]:
    """Return name -> the text of the page between the marks of that name."""
    results = sorted(path.stem.removeprefix("recipes_") for path in RESULTS.glob("recipes_*.json"))
    fixed = {"recipes": recipe_table(), "figures of training": training_table()}
    return fixed | {f"figures of {name}": figure_table(name) for name in results}


def filled(text: str) -> str:
    """Return the page with the text between `<!-- name -->` and `<!-- end of name -->` made again."""
    for name, text_between in made().items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{text_between}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Write the page."""
    _ = asked(__doc__)
    _ = PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
