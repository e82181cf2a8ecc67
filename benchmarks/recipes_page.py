"""Write the tables of `docs/recipes.md`: the rows of `fxquant.recipes`, and the figures of `benchmarks.recipes`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.arguments import asked
from fxquant.recipes import COLUMNS, listing

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


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


def filled(text: str) -> str:
    """Return the page with what stands between `<!-- name -->` and `<!-- end of name -->` made again."""
    for name, made in {"recipes": recipe_table()}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Write the page."""
    _ = asked(__doc__)
    _ = PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
