"""The table of published methods; a new one is a new row.

Every part that a paper fixes is a value here; `docs/recipes.md` says what each needs and how it compares. Widths are
the paper's where it names them, else the evenly spaced ones that all integer targets run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxquant.recipes.recipe import RECIPES, Recipe

WIDTHS = (2, 3, 4, 6, 8)
"""Candidate widths of methods that leave them open."""

SOLVED: Mapping[str, Any] = {"choose": "solved", "scoring_rounding": "nearest", "rounding": "nearest"}
"""A method that allocates: scored at nearest rounding, the solver's plan taken as it is."""
LINEAR: Mapping[str, Any] = {**SOLVED, "solver": "linear"}
"""The same with one score for each choice of a layer, and a linear program."""
UNIFORM: Mapping[str, Any] = {
    "choose": "uniform",
    "estimators": ("weight_mse",),
    "solver": "linear",
    "bits": WIDTHS,
    "curve": 0,
    "scoring_rounding": "nearest",
    "rounding": "nearest",
}
"""A method that rounds: one width for all layers, the widest within the limits or whichever loses least."""
TRAINED: Mapping[str, Any] = {**LINEAR, "estimators": ("weight_mse",), "curve": 0}
"""A method that chooses widths in training: the scores are for the plan that it has to beat."""
ENDS: Mapping[str, Any] = {"pin_ends": True}
"""First and last layer at 8 bits."""

ROWS = (
    Recipe(
        "clado",
        "measured loss of every pair of choices, negative eigenvalues clipped, integer quadratic program",
        "arXiv 2307.05657, section 3 and eq. 10",
        {**SOLVED, **ENDS, "estimators": ("pairs",), "loss": "ce", "solver": "iqp", "bits": (2, 4, 8)},
        essence=("estimators",),
        needs=("labels",),
    ),
    Recipe(
        "clado-kl",
        "the same pairs by the divergence from the float network, as measured",
        "arXiv 2307.05657, a variant in the authors' code",
        {**SOLVED, **ENDS, "estimators": ("pairs",), "solver": "iqp", "bits": (2, 4, 8)},
        essence=("estimators",),
    ),
    Recipe(
        "hawq-v2",
        "mean trace of the Hessian times squared rounding error, least sum of the Pareto front",
        "arXiv 1911.03852, eq. 10",
        {**LINEAR, "estimators": ("hawq",), "loss": "ce", "bits": (2, 4, 8)},
        essence=("estimators",),
        needs=("labels", "gradients"),
    ),
    Recipe(
        "hawq-v3",
        "the same scores, integer linear program under size, bit operations or latency, first and last layer at 8 bits",
        "arXiv 2011.10680",
        {**LINEAR, **ENDS, "estimators": ("hawq",), "loss": "ce", "bits": (4, 8)},
        essence=("estimators",),
        needs=("labels", "gradients"),
    ),
    Recipe(
        "mpqco",
        "squared first-order change of each image's log-likelihood, knapsack by Lagrangian greedy",
        "arXiv 2110.06554, eq. 8",
        {**SOLVED, "estimators": ("mpqco",), "loss": "ce", "solver": "greedy", "bits": WIDTHS},
        essence=("estimators",),
        needs=("labels", "gradients"),
    ),
    Recipe(
        "mixquant",
        "smallest width whose weight error is within a factor of that at 8 bits, BRECQ behind it",
        "arXiv 2309.17341",
        {**SOLVED, "estimators": ("weight_mse",), "solver": "threshold", "bits": (2, 3, 4, 5, 6, 7, 8)}
        | {"rounding": "brecq"},
        essence=("estimators", "solver"),
        needs=("training",),
    ),
    Recipe(
        "ompq",
        "orthogonality of the layers' features is the price of a bit, linear program, BRECQ behind it",
        "arXiv 2109.07865",
        {**LINEAR, "estimators": ("orm",), "bits": (2, 3, 4), "rounding": "brecq"},
        essence=("estimators",),
        needs=("training",),
    ),
    Recipe(
        "csmpq",
        "separability of a batch by tf-idf of pooled features is the price of a bit, linear program, BRECQ behind it",
        "arXiv 2212.10220",
        {**LINEAR, "estimators": ("separability_exp",), "bits": (2, 3, 4), "rounding": "brecq"},
        essence=("estimators",),
        needs=("training",),
    ),
    Recipe(
        "limpq",
        "steps of all widths learned jointly are the scores of weights and activations, linear program",
        "arXiv 2203.08368, steps alone trained",
        {**LINEAR, "estimators": ("limpq",), "bits": (2, 3, 4, 5, 6), "activation_bits": (2, 3, 4, 5, 6)},
        essence=("estimators",),
        needs=("gradients",),
    ),
    Recipe(
        "zeroq",
        "divergence of the answer for each choice alone; calibration images in the place of synthesised ones",
        "arXiv 2001.00281",
        {**LINEAR, "estimators": ("diagonal",), "bits": (2, 4, 8)},
        essence=("estimators",),
    ),
    Recipe(
        "fit",
        "trace of the Fisher matrix times the power of rounding noise, weights and activations",
        "arXiv 2210.08502, eq. 7",
        {**LINEAR, "estimators": ("fit",), "bits": (3, 4, 6, 8)},
        essence=("estimators",),
        needs=("gradients",),
    ),
    Recipe(
        "hill",
        "attribution along the path to the quantized network, in a model of a loss that saturates",
        "arXiv 2607.12266",
        {**LINEAR, "estimators": ("path",), "bits": WIDTHS},
        essence=("estimators",),
        needs=("gradients",),
    ),
    Recipe(
        "modelopt",
        "squared gradient times squared shift of each layer's output (AutoQuantize), linear program",
        "NVIDIA ModelOpt, AutoQuantize",
        {**LINEAR, "estimators": ("fisher_out",), "bits": (4, 8)},
        essence=("estimators",),
        needs=("gradients",),
    ),
    Recipe(
        "amp",
        "noise of the answer for each choice alone, layers narrowed in that order until the budget holds",
        "arXiv 2302.05397, section 3 (AIMET)",
        {**SOLVED, "estimators": ("sqnr",), "solver": "flips", "bits": (4, 8)},
        essence=("solver",),
    ),
    Recipe(
        "calibtip",
        "loss of each layer narrowed in a network of 8 bits, weights rounded well first; AdaQuant, bias correction",
        "arXiv 2006.10518",
        {
            **LINEAR,
            "estimators": ("diagonal",),
            "context": "widest",
            "bits": (4, 8),
            "scoring_rounding": "gptq",
            "rounding": "adaround+bias_correction",
            "rounding_options": {"learned": "straight_through", "step_lr": 5e-4},
        },
        essence=("context",),
        needs=("training",),
    ),
    Recipe(
        "kl-lm",
        "divergence of the next word's distribution for each choice alone, per token",
        "arXiv 2112.11438",
        {**LINEAR, "estimators": ("diagonal",), "loss": "kl", "bits": (2, 4, 8)},
        essence=("estimators", "loss"),
    ),
    Recipe(
        "hessian-lm",
        "mean trace of the Hessian of that divergence times squared rounding error, per token",
        "arXiv 2112.11540",
        {**LINEAR, "estimators": ("hawq",), "loss": "kl", "bits": (2, 4, 8)},
        essence=("estimators", "loss"),
        needs=("gradients",),
    ),
    Recipe(
        "uniform",
        "one width for all layers, weights rounded to nearest",
        "the baseline of all papers",
        UNIFORM,
        essence=("choose",),
    ),
    Recipe(
        "dfq",
        "channels of neighbouring layers scaled to like ranges, means restored; no images but for ranges",
        "arXiv 1906.04721, sections 4.1 and 4.2",
        {**UNIFORM, "rounding": "equalize+bias_correction"},
        essence=("rounding",),
    ),
    Recipe(
        "daq",
        "activation steps that suit a Gaussian of the same deviation; channels scaled to like ranges beforehand",
        "arXiv 2012.11230",
        {**UNIFORM, "observer": "gaussian", "activation_bits": (4,), "rounding": "equalize"},
        essence=("observer",),
    ),
    Recipe(
        "gptq",
        "weights rounded one by one, later ones compensate",
        "arXiv 2210.17323, algorithm 1",
        {**UNIFORM, "rounding": "gptq"},
        essence=("rounding",),
    ),
    Recipe(
        "gpfq",
        "greedy path following: each weight also compensates the error of earlier layers",
        "arXiv 2201.11113, algorithm 1",
        {**UNIFORM, "rounding": "gpfq"},
        essence=("rounding",),
    ),
    Recipe(
        "spfq",
        "path following with stochastic rounding",
        "arXiv 2309.10975",
        {**UNIFORM, "rounding": "spfq"},
        essence=("rounding",),
    ),
    Recipe(
        "qronos",
        "GPTQ that follows the float network's outputs",
        "arXiv 2505.11695",
        {**UNIFORM, "rounding": "qronos"},
        essence=("rounding",),
    ),
    Recipe(
        "adaround",
        "up or down learned for each weight, layer by layer",
        "arXiv 2004.10568",
        {**UNIFORM, "rounding": "adaround"},
        essence=("rounding",),
        needs=("training",),
    ),
    Recipe(
        "brecq",
        "up or down and activation steps learned, block by block",
        "arXiv 2102.05426",
        {**UNIFORM, **ENDS, "rounding": "brecq"},
        essence=("rounding",),
        needs=("training",),
    ),
    Recipe(
        "qdrop",
        "BRECQ with activations left unrounded at random",
        "arXiv 2203.05740",
        {**UNIFORM, **ENDS, "rounding": "qdrop"},
        essence=("rounding",),
        needs=("training",),
    ),
    Recipe(
        "pdquant",
        "QDrop with the prediction difference and corrected inputs",
        "arXiv 2212.07048",
        {**UNIFORM, **ENDS, "rounding": "pdquant"},
        essence=("rounding",),
        needs=("training",),
    ),
    Recipe(
        "rmsmp",
        "rows of a layer at powers of two, 4 bits or 8 bits by their output error; the share at 8 bits by layer",
        "arXiv 2111.00153, without its training",
        {**LINEAR, "estimators": ("diagonal",), "bits": ("4s", "4.4s", "5s", "6s")},
        essence=("bits",),
    ),
    Recipe(
        "expand",
        "outlier input channels split in two, exact in float; ratios and widths of all layers by one program",
        "arXiv 1901.09504, the ratio of each layer chosen",
        {**LINEAR, "expand": (0.05, 0.1, 0.25), "estimators": ("diagonal",), "bits": WIDTHS}
        | {"scoring_rounding": "gptq", "rounding": "gptq", "curve": 0},
        essence=("expand",),
    ),
    Recipe(
        "prune",
        "input channels left out, all others reconstructed; ratios and widths of all layers by one program",
        "arXiv 2208.11580 and 2302.04089, no training",
        {**LINEAR, "prune": (0.125, 0.25, 0.5), "estimators": ("diagonal",), "bits": WIDTHS}
        | {"scoring_rounding": "gptq", "rounding": "gptq", "curve": 0},
        essence=("prune",),
    ),
    Recipe(
        "dynamic",
        "one of two plans for each patch, by its gradient magnitude; bit operations are limited in the mean",
        "arXiv 2207.10345, without its training",
        {**LINEAR, "routed": True, "estimators": ("diagonal",), "bits": WIDTHS, "scoring_rounding": "gptq"}
        | {"rounding": "gptq", "curve": 0},
        essence=("routed",),
    ),
    Recipe(
        "uwc",
        "reconstruction over neighbouring layers at once, here two",
        "arXiv 2201.06376",
        {**UNIFORM, "rounding": "brecq", "rounding_options": {"unit": "layers:2"}},
        essence=("rounding",),
        needs=("training",),
    ),
    Recipe(
        "bsq",
        "bit planes trained under a group penalty, dropped until the budget holds; trained on at the widths found",
        "arXiv 2102.10462, section 3",
        {**TRAINED, "bits": (2, 3, 4, 5, 6, 7, 8), "training": "bsq"},
        essence=("training",),
        needs=("training",),
    ),
    Recipe(
        "dropbits",
        "cluster-promoting probabilities, bits dropped at random by learned gates; trained on at the widths found",
        "arXiv 2109.02100",
        {**TRAINED, "bits": (2, 3, 4), "training": "dropbits"},
        essence=("training",),
        needs=("training",),
    ),
    Recipe(
        "aqd",
        "a whole detector at one width, steps learned, batch norms by level; first and last weights at 8 bits",
        "arXiv 2007.06919",
        {**UNIFORM, **ENDS, "bits": (2, 3, 4), "activation_bits": (4,), "training": "aqd"},
        essence=("training",),
        needs=("training",),
    ),
)

for _row in ROWS:
    _ = RECIPES.register(_row.name)(_row)
