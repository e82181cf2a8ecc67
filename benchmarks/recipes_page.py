"""Write the tables of `docs/recipes.md`: the rows of `fxquant.recipes`, and the figures of `benchmarks.recipes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arguments import asked
from benchmarks.report_table import RESULTS
from fxquant.core.storage import read_json
from fxquant.recipes import COLUMNS, RECIPES, listing

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"

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
    cells = [(bits, which) for bits in budgets for which in ("own", "gptq")]
    columns = ["recipe", "own rounding", *(f"{bits:g} bits{', GPTQ' * (which == 'gptq')}" for bits, which in cells)]
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        # A rounding that takes long may not have been measured yet.
        one = next(row for row in rows if row["recipe"] == name)
        own = "+".join(RECIPES[name].rounding) if name in RECIPES else one["rounding"]
        figures = [_figure(found.get((name, *cell))) for cell in cells]
        shown = f"`{name}`" if name in RECIPES else name
        lines.append([shown, own, *figures, f"{one['bytes'] / 1000:.1f}", f"{one['processor s']:.0f}"])
    made = table([*columns, f"kB at {budgets[0]:g}", "processor s"], lines)
    return f"Float: {_figure(first)}.\n\n{made}"


def _figure(row: Row | None) -> str:
    """Return accuracy in per cent with the KL behind it, or perplexity; in brackets what was rejected."""
    if row is None:
        return ""
    if "perplexity" in row:
        text = f"{row['perplexity']:.1f}"
    else:
        text = f"{row['accuracy %']:.1f}" + (f" ({row['KL']:.3f})" if "KL" in row else "")
    return f"[{text}]" if row.get("rejected") else text


def made() -> dict[str, str]:
    """Return name -> the text of the page between the marks of that name."""
    results = sorted(path.stem.removeprefix("recipes_") for path in RESULTS.glob("recipes_*.json"))
    return {"recipes": recipe_table()} | {f"figures of {name}": figure_table(name) for name in results}


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
