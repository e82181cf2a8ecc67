"""Tiny models of other packages with random weights, and what it takes to import those packages."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch

_DECLARED: list[object] = []


def package(name: str) -> ModuleType:
    """Return an optional package, or skip the calling module where it is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; it is no part of the test extra", allow_module_level=True)
    if not _DECLARED:
        # torchvision's wheel may be built for another torch: its Python part needs these two to be declared at least.
        libraries: Any = torch.library
        library = libraries.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
    with warnings.catch_warnings():
        # What packages warn of on import is theirs.
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
