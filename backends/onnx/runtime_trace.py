"""What ONNX Runtime computes on every quantized edge.

Further outputs of a QDQ model would prevent the fusions to be observed. So the runtime optimizes first: its graph, with
operators fused and integers between them, is written out, gets the edges as outputs, and runs unoptimized. The
last level of optimization is left out, for it only changes the layout and drops the names; that this changes no answer
is checked on every run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from fxquant.backends.exact.edge_trace import Trace, Tracer
from fxquant.backends.onnx import Array, open_session, session_options

ROUNDING = 1e-5
"""What float kernels that are laid out otherwise may differ by, against the largest answer."""


def onnx_tracer(
    model: bytes,
    names: Mapping[str, str],
    threads: int | None = None,
    leading: Mapping[str, str] = MappingProxyType({}),
) -> Tracer:
    """Return what runs a QDQ model and reports its edges, without those whose value the optimizer dropped.

    Args:
        model: the file.
        names: edge -> name of the value with its integers (`edge_trace.value_names`).
        threads: threads of the runtime, None for its default.
        leading: value in front of an answer that jumps -> its name in the file.

    Raises:
        LoweringError: ONNX Runtime refuses the model.
    """
    session = open_session(model, session_options(threads))
    watched, edges, leads = _watched(model, names, leading, threads)
    blocks = _blocked(model, edges)
    entries, results = ([entry.name for entry in ends] for ends in (session.get_inputs(), session.get_outputs()))

    def run(inputs: tuple[Tensor, ...]) -> Trace:
        arrays = {n: t.detach().cpu().contiguous().numpy() for n, t in zip(entries, inputs, strict=True)}
        answers = [np.asarray(answer) for answer in session.run(results, arrays)]
        watched_answers = watched.run([*results, *edges.values(), *leads.values()], arrays)
        # If the answers differ, the names in the fused graph do not describe this run.
        same = all(_alike(one, other) for one, other in zip(answers, watched_answers, strict=False))
        values = [torch.from_numpy(np.asarray(value)) for value in watched_answers[len(results) :]] if same else []
        found, led = dict(zip(edges, values, strict=False)), dict(zip(leads, values[len(edges) :], strict=False))
        for name, size in blocks.items():
            if name in found:
                found[name] = pixels(found[name], size)[..., : inputs[0].shape[-2], : inputs[0].shape[-1]]
        first, *others = (torch.from_numpy(answer).float() for answer in answers)
        return Trace(first, found, tuple(others), led)

    return run


def _alike(one: Array, other: Array) -> bool:
    """Whether two runs gave one answer; float kernels of another layout differ in the last bits."""
    largest = float(np.abs(one).max(initial=0.0)) if one.dtype.kind == "f" else 0.0
    return one.shape == other.shape and np.allclose(one, other, rtol=0.0, atol=ROUNDING * largest, equal_nan=True)


def _watched(
    model: bytes, names: Mapping[str, str], leading: Mapping[str, str], threads: int | None
) -> tuple[onnxruntime.InferenceSession, dict[str, str], dict[str, str]]:
    """Return a session of the fused graph with edges and leading values as outputs, and what of each is output as."""
    levels = onnxruntime.GraphOptimizationLevel
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fused.onnx"
        options = session_options(threads)
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        open_session(model, options)
        fused = onnx.load(target)
    # A grid narrower than uint8 is clipped behind its quantizer: those are the edge's integers.
    clipped = {n.input[0]: n.output[0] for n in onnx.load_model_from_string(model).graph.node if n.op_type == "Clip"}
    made = {name for node in fused.graph.node for name in node.output}
    known = {entry.name for entry in fused.graph.output}
    edges = {edge: clipped.get(name, name) for edge, name in names.items()}
    edges = {edge: name for edge, name in edges.items() if name in made and name not in known}
    leads = {lead: name for lead, name in leading.items() if name in made and name not in known}
    kinds = dict.fromkeys(edges.values(), TensorProto.UINT8) | dict.fromkeys(leads.values(), TensorProto.FLOAT)
    for name, kind in kinds.items():
        fused.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    options = session_options(threads)
    options.graph_optimization_level = levels.ORT_DISABLE_ALL
    return open_session(fused.SerializeToString(), options), edges, leads


def _blocked(model: bytes, edges: Mapping[str, str]) -> dict[str, int]:
    """Return edge -> size of the blocks of pixels that its quantizer reads as channels, where it does."""
    nodes = onnx.load_model_from_string(model).graph.node
    sizes = {n.output[0]: n.attribute[0].i for n in nodes if n.op_type == "SpaceToDepth"}
    reads = {n.output[0]: n.input[0] for n in nodes if n.op_type == "QuantizeLinear"}
    return {edge: int(sizes[reads[name]]) for edge, name in edges.items() if reads.get(name) in sizes}


def pixels(q: Tensor, size: int) -> Tensor:
    """Return channels `(size y + x) C + c` as blocks of pixels: (N, size^2 C, H, W) -> (N, C, size H, size W)."""
    n, c, h, w = q.shape
    parts = q.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // size**2, h * size, w * size)
