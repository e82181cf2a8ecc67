from __future__ import annotations

from typing import Any

import pytest

from fxquant.backends.onnx import LARGEST_FILE, OnnxOptions, to_onnx
from fxquant.core.errors import OptionError
from tests.backends.onnx.test_stem import STEMS, quantized


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"runtime": "tensorrt"}, "onnxruntime, openvino"),
        ({"weight_only": (1,)}, "a list of texts"),
        ({"block_size": 48}, "32"),
        ({"largest_file": 0}, "of at least 1 and at most"),
        ({"largest_file": LARGEST_FILE + 1}, "of at least 1 and at most"),
    ],
)
def test_values_that_are_not_allowed_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        OnnxOptions(**given)


@pytest.mark.parametrize(("runtime", "blocks"), [("onnxruntime", True), ("openvino", False)])
def test_only_onnx_runtime_gets_stems_over_blocks(runtime: str, blocks: bool) -> None:
    model = to_onnx(quantized(*STEMS["3x3"]), options=OnnxOptions.of({"runtime": runtime}))
    assert ("SpaceToDepth" in {node.op_type for node in model.graph.node}) == blocks
