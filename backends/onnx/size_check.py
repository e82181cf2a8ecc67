"""Runs a file at other sizes than the traced one before it is written: a size taken for fixed shows nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxquant.backends.onnx.session import open_session, session_options
from fxquant.core.errors import LoweringError, first_line
from fxquant.core.ir import FakeQuantize
from fxquant.core.run import discrete_answers, placeholders, returned

TRIALS = 3
"""Other sizes that a file is run at."""
IMAGES = (3, 1, 4, 2, 5, 1)
"""Numbers of images of the trials."""
LARGER = ((1, 3), (32, 64), (7, 2), (16, 48), (64, 32), (96, 160))
"""Pixels or steps by which the free sizes of a trial are larger than those traced; odd ones first."""
UNLIKE = 0.2
"""Relative error from which answers are others, however exact they are at the traced size: integers flip."""
WORSE = 4.0
"""Times the error at the traced size that another size may have."""

Sizes = Mapping[Any, int]
"""Symbol of a free size -> value."""


def check_sizes(module: GraphModule, file: Path, must_run: bool) -> None:
    """Do nothing where a file answers as PyTorch does at `TRIALS` other sizes of its free axes.

    Sizes that the graph itself does not take are left out.

    Args:
        module: the graph that was written.
        file: what was written.
        must_run: whether ONNX Runtime has to run it; else nothing is checked where it cannot.

    Raises:
        LoweringError: it answers otherwise, or not at all.
    """
    inputs = [node for node in placeholders(module.graph) if isinstance(node.meta.get("val"), Tensor)]
    traced = _traced(inputs)
    if not traced:
        return
    try:
        trial = _Trial(module, file, inputs)
        known = trial.error(traced)
    except LoweringError:
        if must_run:
            raise
        return
    done = 0
    for sizes in _others(traced, inputs) if known is not None else ():
        error = trial.error(sizes)
        done += error is not None
        if error is not None and known is not None and not error <= max(UNLIKE, WORSE * known):
            asked = ", ".join(f"{node.name} {tuple(_shape(node, sizes))}" for node in inputs)
            raise LoweringError(
                f"the file answers otherwise than PyTorch for inputs of another size ({asked}; relative error "
                f"{error:.2g}): an op was written for the traced size; export a model of fixed size "
                "(dynamic_image=False), or keep what depends on the size outside the model"
            )
        if done == TRIALS:
            return


class _Trial:
    """Runs a graph and its file on the same random inputs.

    Args:
        module: the graph.
        file: the file.
        inputs: placeholders of its tensors.

    Raises:
        LoweringError: ONNX Runtime cannot load the file.
    """

    def __init__(self, module: GraphModule, file: Path, inputs: Sequence[Node]) -> None:
        self.module, self.inputs = module, inputs
        options = session_options()
        # Layers in float answer like the simulation, and fusing them takes longer than these runs.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = open_session(file, options)
        self.names = [entry.name for entry in self.session.get_inputs()]
        jumping = discrete_answers(module.graph)
        tensors = [node for node in returned(module.graph) if isinstance(node.meta.get("val"), Tensor)]
        #: outputs whose values are compared; of those that jump, shapes are
        self.smooth = [position not in jumping for position in range(len(tensors))]

    def error(self, sizes: Sizes) -> float | None:
        """Return the largest relative error of an output, None where the graph does not take these sizes.

        Raises:
            LoweringError: the graph takes them, and the file does not.
        """
        generator = torch.Generator().manual_seed(0)
        tensors = [_random(self.module, node, _shape(node, sizes), generator) for node in self.inputs]
        try:
            with torch.no_grad():
                expected = [t for t in tree_leaves(self.module(*tensors)) if isinstance(t, Tensor)]
        except Exception:
            # Sizes that networks take are theirs to say, and they say so with errors of any class.
            return None
        try:
            found = self.session.run(None, {n: t.numpy() for n, t in zip(self.names, tensors, strict=True)})
        except Exception as error:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise LoweringError(
                f"the file does not run on inputs of shape {shapes}, which PyTorch takes ({first_line(error)}); "
                "export a model of fixed size (dynamic_image=False), or keep what depends on the size outside the model"
            ) from error
        pairs = zip(map(torch.from_numpy, map(np.asarray, found)), expected, self.smooth, strict=True)
        return max((_unlike(one, other, smooth) for one, other, smooth in pairs), default=0.0)


def _unlike(found: Tensor, expected: Tensor, smooth: bool) -> float:
    """Return `|found - expected| / |expected - mean|`, infinite for other shapes."""
    if found.shape != expected.shape:
        return math.inf
    if not smooth or not expected.numel():
        return 0.0
    one, other = found.double(), expected.double()
    finite = other.isfinite()
    if not torch.equal(finite, one.isfinite()):
        return math.inf
    one, other = one[finite], other[finite]
    size = float((other - other.mean()).norm()) if other.numel() > 1 else float(other.abs().sum())
    return float((one - other).norm()) / max(size, 1e-3 * float(other.norm()), 1e-6)


def _traced(inputs: Sequence[Node]) -> dict[Any, int]:
    """Return the symbol of each free size -> the value it was traced with."""
    found = dict[Any, int]()
    for node in inputs:
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                symbols = size.node.expr.free_symbols
                alone = len(symbols) == 1 and size.node.expr in symbols
                env = size.node.shape_env
                found |= {s: int(size.node.hint) if alone else int(env.size_hint(s)) for s in symbols if s not in found}
    return found


def _others(traced: Sizes, inputs: Sequence[Node]) -> Iterator[Sizes]:
    """Yield other sizes, each free axis with its own."""
    batches = [size for node in inputs for size in node.meta["val"].shape[:1] if not isinstance(size, int)]
    images = {symbol for size in batches for symbol in size.node.expr.free_symbols}
    rest = [symbol for symbol in traced if symbol not in images]
    for count, larger in zip(IMAGES, LARGER, strict=True):
        grown = {symbol: traced[symbol] + larger[k % len(larger)] for k, symbol in enumerate(rest)}
        yield {**grown, **dict.fromkeys(images, count)}


def _shape(node: Node, sizes: Sizes) -> list[int]:
    shape = node.meta["val"].shape
    return [size if isinstance(size, int) else int(size.node.expr.subs(dict(sizes))) for size in shape]


def _random(module: GraphModule, node: Node, shape: list[int], generator: torch.Generator) -> Tensor:
    """Return values that an input may have: over the grid of its quantizer, zeros and ones of integers."""
    kind = node.meta["val"].dtype
    if not kind.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(kind)
    users = [module.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
    grid = next((user for user in users if isinstance(user, FakeQuantize)), None)
    if grid is None:
        return torch.randn(shape, generator=generator).to(kind)
    low, high = ((end - grid.zero_point) * grid.scale for end in (grid.spec.qmin, grid.spec.qmax))
    return (low + (high - low) * torch.rand(shape, generator=generator)).detach().to(kind)
