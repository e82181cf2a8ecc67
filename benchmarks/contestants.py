"""One contestant of `benchmarks.peers` in its own process: one network, one runtime, one batch, some threads.

`python -m benchmarks.contestants NAME NETWORK BATCH THREADS FOLDER` gets ready, says so in one line of JSON, and then
answers each line that holds a number of calls with the wall and processor milliseconds of one call. A process each
keeps thread pools, allocators and compiler settings of one runtime out of the others' way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.backends.int8 import FxInt8Backend, compiled
from fxquant.backends.onnx import session_options
from fxquant.core.facts import Settings
from fxquant.core.run import CalibrationSet
from fxquant.passes import simulate, widest_plan

CALIBRATION_IMAGES = 32

Run = Callable[[], object]


def images(network: str, count: int) -> Tensor:
    """Return the first calibration images of a network, `(count, C, H, W)`."""
    return NETWORKS[network].calibration(CALIBRATION_IMAGES)[:count]


def model(network: str) -> nn.Module:
    """Return the float network in eval mode."""
    torch.manual_seed(0)
    return NETWORKS[network].factory().eval()


def _torch_eager(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
    del threads, folder
    float_model = model(network)
    return lambda: float_model(batch)


def _torch_inductor(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
    del threads, folder
    _freeze()
    compiled = torch.compile(model(network))
    return lambda: compiled(batch)


def _freeze() -> None:
    """Switch on Inductor's constant folding of weights, without which its float code is slower."""
    import torch._inductor.config as inductor

    inductor.freezing = True


def _torchao_cpp(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
    import torch._inductor.config as inductor

    inductor.cpp_wrapper = True
    return _torchao(network, batch, threads, folder)


def _torchao(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
    del threads, folder
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    _freeze()
    # Its quantizer refuses residual networks that were exported in the default, non-strict way.
    exported = torch.export.export(model(network), (batch,), strict=True).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    calibration = images(network, CALIBRATION_IMAGES)
    for first in range(0, len(calibration) - len(batch) + 1, len(batch)):
        prepared(calibration[first : first + len(batch)])
    compiled: Any = torch.compile(convert_pt2e(prepared))
    return lambda: compiled(batch)


def _lowered(network: str, batch: Tensor, inductor: bool) -> Run:
    calibration = CalibrationSet((images(network, CALIBRATION_IMAGES),))
    program = prepare(capture(model(network), calibration), Settings(bits=(8,), target="fx_int8"))
    program = flow.calibrate(program, calibration)
    fake = simulate(program, widest_plan(program)).module
    lowered = FxInt8Backend().lower(fake, len(batch))
    call = compiled(lowered) if inductor else lowered
    return lambda: call(batch)


def _fx_eager(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
    del threads, folder
    return _lowered(network, batch, inductor=False)


def _fx_compiled(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
    del threads, folder
    return _lowered(network, batch, inductor=True)


def _ort(file: str) -> Callable[[str, Tensor, int, Path], Run]:
    def build(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
        import onnxruntime

        del network
        session = onnxruntime.InferenceSession(
            str(folder / file), session_options(threads), providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: batch.numpy()}
        return lambda: session.run(None, feed)

    return build


def _openvino(file: str) -> Callable[[str, Tensor, int, Path], Run]:
    def build(network: str, batch: Tensor, threads: int, folder: Path) -> Run:
        import openvino

        del network
        read: Any = openvino.Core().read_model(str(folder / file))
        read.reshape(list(batch.shape))
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        request = openvino.Core().compile_model(read, "CPU", settings).create_infer_request()
        array: np.ndarray[Any, Any] = batch.numpy()
        return lambda: request.infer({0: array}, share_inputs=True, share_outputs=True)

    return build


CONTESTANTS: dict[str, Callable[[str, Tensor, int, Path], Run]] = {
    "ORT fp32": _ort("float.onnx"),
    "ORT quantize_static": _ort("static.onnx"),
    "ORT quantize_static, constant products": _ort("static_constant.onnx"),
    "ORT fxquant": _ort("fxquant.onnx"),
    "OpenVINO fp32": _openvino("float.onnx"),
    "OpenVINO NNCF": _openvino("nncf.xml"),
    "OpenVINO fxquant": _openvino("fxquant_openvino.onnx"),
    "torch eager": _torch_eager,
    "torch Inductor": _torch_inductor,
    "torchao PT2E + Inductor": _torchao,
    "torchao PT2E + Inductor, C++ wrapper": _torchao_cpp,
    "fxquant eager": _fx_eager,
    "fxquant compiled": _fx_compiled,
}
"""Column -> what makes one call of it: network, batch, threads, folder with the files of `benchmarks.peers`."""


def serve(name: str, network: str, batch: int, threads: int, folder: Path) -> None:
    """Answer lines of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Libraries print; only answers go to the one who asks.
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        run = CONTESTANTS[name](network, images(network, batch), threads, folder)
        for _ in range(3):
            run()
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            started, used = time.perf_counter(), time.process_time()
            for _ in range(int(line)):
                run()
            wall, busy = time.perf_counter() - started, time.process_time() - used
            print(json.dumps({"wall": 1e3 * wall / int(line), "cpu": 1e3 * busy / int(line)}), file=answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("contestant", str), ("network", str), ("batch", int), ("threads", int), ("folder", Path)):
        parser.add_argument(name, type=kind)
    serve(*vars(parser.parse_args()).values())
