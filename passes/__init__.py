"""fxquant.passes: graph in, graph or fact out; one pass, one file."""

# Importing this folder by its top-level name would create a second, unequal copy of every class.
if not __name__.startswith("fxquant."):
    raise ImportError("import fxquant.passes, not passes: the top-level folder is only where the package lives")
