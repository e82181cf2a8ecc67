"""Write the tables of `docs/recipes.md` (the rows of `fxquant.recipes`) and `docs/recipes-measured.md` (figures).

`python -m benchmarks.recipes_page` puts each table between its marks, `<!-- name -->` and `<!-- end of name -->`, which
stand in one of the pages once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.arguments import asked
from benchmarks.recipes_tables import (
    channels_table,
    figure_table,
    ranges_table,
    routed_table,
    table,
    training_table,
)
from benchmarks.report_table import RESULTS
from fxquant.core.errors import FileFormatError
from fxquant.recipes import COLUMNS, listing

FOLDER = Path(__file__).resolve().parents[1] / "docs"
PAGES = tuple(FOLDER / name for name in ("recipes.md", "recipes-measured.md"))


def recipe_table() -> str:
    """Return the table of all recipes with their papers."""
    columns = (*COLUMNS, "what it does", "source")
    rows = [
        (f"`{row['recipe']}`", *(row[name] for name in COLUMNS[1:]), row["about"], row["source"]) for row in listing()
    ]
    return table(columns, rows)


def made() -> dict[str, str]:
    """Return name -> the text between the marks of that name."""
    fixed = {"recipes": recipe_table(), "figures of training": training_table()}
    fixed |= {"figures of new channels": channels_table(), "figures of routed_carn_m": routed_table("carn_m")}
    fixed |= {"figures of activation ranges": ranges_table()}
    results = sorted(path.stem.removeprefix("recipes_") for path in RESULTS.glob("recipes_*.json"))
    return fixed | {f"figures of {name}": figure_table(name) for name in results}


def filled(pages: Mapping[Path, str], tables: Mapping[str, str]) -> dict[Path, str]:
    """Return pages with the tables between their marks.

    Args:
        pages: path -> text.
        tables: name -> table.

    Raises:
        FileFormatError: a mark is missing, occurs twice, or stands before its start; no table belongs to it.
    """
    texts = dict(pages)
    for name, between in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        at = [path for path, text in texts.items() for _ in range(text.count(start))]
        ends = [path for path, text in texts.items() for _ in range(text.count(end))]
        if len(at) != 1 or at != ends or texts[at[0]].index(end) < texts[at[0]].index(start):
            raise FileFormatError(f"the marks of {name!r} must stand in one page once; found {len(at)} and {len(ends)}")
        before, _, rest = texts[at[0]].partition(start)
        texts[at[0]] = f"{before}{start}\n{between}\n\n{end}{rest.partition(end)[2]}"
    return texts


def main() -> None:
    """Write the pages."""
    _ = asked(__doc__)
    for path, text in filled({path: path.read_text(encoding="utf-8") for path in PAGES}, made()).items():
        _ = path.write_text(text, encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
