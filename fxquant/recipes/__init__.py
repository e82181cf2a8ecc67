"""Published mixed-precision methods as rows of one table: `fxquant.quantize(..., recipe="hawq-v3")`.

`RECIPES` maps name -> `Recipe`; `table()` is what `fxquant recipes` prints. A row that another package registers works
everywhere its name is taken.
"""

from __future__ import annotations

from fxquant.recipes import published
from fxquant.recipes.listed import COLUMNS, described, listing, table
from fxquant.recipes.recipe import RECIPES, Recipe, settings_of
