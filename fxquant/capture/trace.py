"""Capture: a trained model in, a functional ATen graph with a dynamic batch out."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional

from fxquant.capture.decompositions import DECOMPOSITIONS
from fxquant.capture.exporting import quiet, summary, traced
from fxquant.capture.forward_arguments import dynamic_shapes, require_module
from fxquant.capture.free_batch import freed, one_batch_size, with_free_batch
from fxquant.capture.model_outputs import plain_answer
from fxquant.capture.unusable_ops import check_ops
from fxquant.capture.weights import check_finite, check_storage
from fxquant.capture.written_weights import advice, called_once, check_written
from fxquant.core.errors import CaptureError
from fxquant.core.ir import Program, differentiable, recurrent_shapes
from fxquant.core.run import WRAP
from fxquant.core.storage import StoredProgram


def capture(
    model: nn.Module | ExportedProgram | StoredProgram,
    example_inputs: Sequence[Tensor],
    dynamic_batch: bool = True,
    dynamic_image: bool = False,
) -> Program:
    """Trace a model to a functional ATen graph; the caller's model is neither modified nor switched to eval.

    Args:
        model: a module, or an ExportedProgram, which is taken as it is, but that its batch is freed; a StoredProgram
            gives the graph it was stored from.
        example_inputs: one tensor per input, images along axis 0; two images at least are traced so that the batch
            stays dynamic.
        dynamic_batch: False keeps the example's batch size.
        dynamic_image: True leaves height and width free too; for fully convolutional models, or those that pool to one
            pixel.

    Raises:
        CaptureError: the model does not export, holds weights that are not finite, or needs images of one size though
            `dynamic_image` was asked for.
    """
    stored = model
    if not isinstance(model, StoredProgram):
        # Export specialises sizes 0 and 1, so a single image is doubled to keep the batch free. Others are copied: of
        # parts of larger tensors torch writes guards that cannot be run.
        inputs = tuple(torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t.clone() for t in example_inputs)
        exported = model
        if not isinstance(model, ExportedProgram):
            exported = _export(model, inputs, dynamic_batch, dynamic_image)
        elif dynamic_batch and inputs and one_batch_size(model):
            exported = freed(model, inputs)
        assert isinstance(exported, ExportedProgram)
        check_ops(exported.graph)
        if dynamic_image:
            _check_sizes(exported, inputs)
        try:
            with recurrent_shapes(), quiet():
                stored = StoredProgram.of(exported.run_decompositions(DECOMPOSITIONS))
        except Exception as error:
            raise CaptureError(
                f"the exported program cannot be brought to functional ATen: {summary(error)}"
            ) from error
    assert isinstance(stored, StoredProgram)
    module = stored.exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    check_storage(module)
    check_finite(module)
    _leave_inference_mode(module)
    return Program(GraphModule(module, module.graph), {StoredProgram: stored})


def _leave_inference_mode(module: GraphModule) -> None:
    """Replace weights that were made under `torch.inference_mode`; scoring needs gradients to pass them."""
    for path, weight in [*module.named_parameters(), *module.named_buffers()]:
        if weight.is_inference():
            parent, _, leaf = path.rpartition(".")
            copied = differentiable(weight)
            setattr(
                module.get_submodule(parent), leaf, nn.Parameter(copied) if isinstance(weight, nn.Parameter) else copied
            )


def _export(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool, dynamic_image: bool) -> ExportedProgram:
    require_module(model)
    check_storage(model)
    try:
        with quiet():
            own = copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(_copy_advice(model, error)) from error
    _ = own.register_forward_hook(lambda *given: plain_answer(given[-1]))
    free = [[0] * (dynamic_batch and t.dim() > 0) + [2, 3] * (dynamic_image and t.dim() == 4) for t in inputs]
    shapes = dynamic_shapes(own, [dict.fromkeys(axes, Dim.AUTO) or None for axes in free])
    written, answer = called_once(model, inputs)
    try:
        exported = traced(own, inputs, shapes, strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(advice(written) if written else _export_advice(model, inputs, error)) from error
    check_written(exported, inputs, written, answer)
    if dynamic_batch and one_batch_size(exported):
        exported = with_free_batch(own, inputs, shapes)
    return exported


LARGER = 32
"""Pixels by which images are enlarged to see whether a program takes them: what networks divide their images by."""


def _check_sizes(exported: ExportedProgram, inputs: tuple[Tensor, ...]) -> None:
    """Refuse a program whose images have one size: torch fixes a size, or guards it, without a word."""
    if not any(t.dim() == 4 for t in inputs):
        raise CaptureError("dynamic_image needs an input (N, C, H, W); the model has none")
    larger = tuple(functional.pad(t, [0, LARGER, 0, LARGER]) if t.dim() == 4 else t for t in inputs)
    try:
        with torch.no_grad(), quiet():
            exported.module()(*larger)
    except Exception as error:
        size = "x".join(str(s) for s in next(t.shape[2:] for t in inputs if t.dim() == 4))
        raise CaptureError(
            f"the model takes images of {size} only ({summary(error)}); leave dynamic_image off, or export the program "
            "with free sizes"
        ) from error


def _export_advice(model: nn.Module, inputs: tuple[Tensor, ...], error: Exception) -> str:
    shapes = [tuple(t.shape) for t in inputs]
    types = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in inputs}))
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(*inputs)
    except Exception as eager:
        advice = WRAP if isinstance(eager, TypeError | LookupError | AttributeError) else ""
        return (
            f"the model does not run on inputs of shape {shapes} and type {types}: {summary(eager)}; "
            f"check the shape and type of the calibration images{advice}"
        )
    line = _user_line(error)
    return (
        f"the model does not export to a graph{f' at {line}' if line else ''}: {summary(error)}; "
        "replace control flow that depends on tensor values by torch.where or torch.cond, keep that part outside the "
        'model, or quantize the part in front of it: fxquant.part(model, "backbone", images)'
    )


HOOKS = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}
"""Class of a hook that computes a weight before every call -> function of torch.nn.utils that adds it."""


def _copy_advice(model: nn.Module, error: Exception) -> str:
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            name = HOOKS.get(type(hook).__name__)
            if name is not None:
                return (
                    f"{path or 'the model'} has the old torch.nn.utils.{name}, with which it cannot be copied; call "
                    f"torch.nn.utils.remove_{name} on that module, or use torch.nn.utils.parametrizations.{name}"
                )
    return f"the model cannot be copied: {summary(error)}; fxquant works on a copy of it"


# Torch's sizes are expressions of sympy, whose frames end a trace where one is compared.
_TORCH = Path(torch.__file__).parent
_NOT_THE_USERS = tuple(map(str, (_TORCH, _TORCH.with_name("sympy"), Path(__file__).parent)))


def _user_line(error: Exception) -> str:
    """Return `file:line: code` of the deepest frame that is not torch's own."""
    text = str(error)
    quoted = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]+)', text)
    own = [f"{file}:{line}: {code}" for file, line, code in quoted if not file.startswith(_NOT_THE_USERS)]
    if own:
        return own[-1]
    trace, found = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_NOT_THE_USERS):
            found = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return found
