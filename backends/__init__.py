"""fxquant.backends: graph in, something that runs out; one backend, one file."""

# Importing this folder by its top-level name would create a second, unequal copy of every class.
if not __name__.startswith("fxquant."):
    raise ImportError("import fxquant.backends, not backends: the top-level folder is only where the package lives")
