"""Recipes shown to people: a row for each, and all that is known of one."""

from __future__ import annotations

import json

from fxquant.recipes.recipe import RECIPES, Recipe

COLUMNS = ("recipe", "scores", "allocation", "rounding", "widths", "needs")
"""What a table on a terminal of 100 columns holds of each recipe."""
GAP = 2


def listing(name: str | None = None) -> list[dict[str, str]]:
    """Return a row of texts for each recipe, in the order of the table.

    Args:
        name: of one recipe; None for all.

    Returns:
        rows with the keys `COLUMNS`, and `ends`, `observer`, `training`, `about` and `source`.

    Raises:
        OptionError: there is no recipe of that name.
    """
    return [_row(recipe) for recipe in (RECIPES.values() if name is None else [RECIPES[name]])]


def _row(recipe: Recipe) -> dict[str, str]:
    settings = recipe.settings
    return {
        "recipe": recipe.name,
        "scores": recipe.estimator or "–",
        "allocation": recipe.allocator,
        "rounding": "+".join(recipe.rounding),
        "widths": " ".join(map(str, settings.bits)) if settings.bits else "of the target",
        "needs": ", ".join(recipe.needs) or "images",
        "ends": "8 bits" if settings.pin_ends else "as all layers",
        "observer": settings.observer,
        "training": ", ".join((*recipe.learned, *([recipe.training] if recipe.training else []))) or "none",
        "about": recipe.about,
        "source": recipe.source,
    }


def table() -> str:
    """Return all recipes as plain text, at most 100 columns wide."""
    rows = [{name: name for name in COLUMNS}, *listing()]
    widths = {name: max(len(row[name]) for row in rows) for name in COLUMNS}
    lines = ["".join(row[name].ljust(widths[name] + GAP) for name in COLUMNS).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def described(name: str) -> str:
    """Return all that is known of one recipe as plain text: what it is, its source, and its settings.

    Raises:
        OptionError: there is no recipe of that name.
    """
    recipe = RECIPES[name]
    (known,) = listing(name)
    lines = [f"{name}: {recipe.about}", f"  source: {recipe.source}", f"  needs: {known['needs']}", "  settings:"]
    settings = recipe.settings.to_json()
    lines += [f"    {option} = {json.dumps(settings[option])}{_fixed(recipe, option)}" for option in recipe.options]
    return "\n".join(lines)


def _fixed(recipe: Recipe, option: str) -> str:
    return "  (makes the method; other values are refused)" if option in recipe.essence else ""
