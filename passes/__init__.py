"""fxquant.passes: graph in, graph or fact out; one pass, one file."""

# Importing this folder by its top-level name would create a second, unequal copy of every class.
if not __name__.startswith("fxquant."):
    raise ImportError("import fxquant.passes, not passes: the top-level folder is only where the package lives")

from fxquant.passes.allocate_bits import AllocateBits, uniform_plans
from fxquant.passes.base import Pass
from fxquant.passes.calibrate import Calibrate
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.equalization import EqualizeChannels, scaled
from fxquant.passes.estimate_cost import EstimateCost
from fxquant.passes.find_edges import FindEdges
from fxquant.passes.find_sites import FindSites
from fxquant.passes.fold_affine import FoldAffine
from fxquant.passes.fold_batchnorm import FoldBatchnorm
from fxquant.passes.fold_constants import FoldConstants
from fxquant.passes.insert_fake_quant import InsertFakeQuant, group_bits
from fxquant.passes.insert_observers import CollectRanges, InsertObservers, without_observers
from fxquant.passes.measure_latency import CHOSEN_RATIOS, MeasureLatency, chosen_plans, mixed_plans
from fxquant.passes.measure_sensitivity import MeasureSensitivity
from fxquant.passes.meter import Meter, is_better, measured_loss
from fxquant.passes.rewrite_activations import RewriteActivations
from fxquant.passes.rewrite_transposed import RewriteTransposed
from fxquant.passes.rewrite_volumes import RewriteVolumes
from fxquant.passes.scale_weights import EVEN, ScaleWeights, channel_axes
from fxquant.passes.separate_norms import SeparateNorms
from fxquant.passes.simulation import simulate, site_passes, widest_plan
from fxquant.passes.tie_edges import TieEdges, UnionFind
from fxquant.passes.verify_and_refine import VerifyAndRefine
