"""Ops that are taken apart when a model is captured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

AS_IT_IS = cast(Tensor, NotImplemented)
"""What a decomposition returns to leave an op alone."""


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Write scaled-dot-product attention as products and a softmax: `softmax(q k' scale + mask) v`."""
    del dropout_p
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    # Scaling the small query instead of the large score matrix gives the same product for fewer multiplications.
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def _processor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the kernel that torch makes of attention on processors; only training reads its second result."""
    answer = _attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return answer, query.new_zeros(query.shape[:-1])


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Write what an assignment to a part of a tensor leaves there; `aten.copy` has no derivative."""
    del non_blocking
    cast = source.to(target.dtype)
    return cast if cast.shape == target.shape else cast.expand(target.shape)


def _paired(pairs: Tensor) -> Tensor:
    """Write a view of pairs as complex numbers by its parts: the view wants both of a pair side by side in memory."""
    return torch.complex(pairs.select(-1, 0), pairs.select(-1, 1))


def _inserted(
    whole: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """Write an assignment to a slice of complex numbers as a concatenation: it has no derivative for them."""
    if not whole.is_complex() or step != 1:
        return AS_IT_IS
    if start in (0, None) and end in (None, sys.maxsize):
        return part
    size = whole.shape[dim]
    if not isinstance(size, int):
        return AS_IT_IS
    first, _, _ = slice(start, end).indices(size)
    rest = size - first - part.shape[dim]
    return torch.cat([whole.narrow(dim, 0, first), part, whole.narrow(dim, size - rest, rest)], dim)


def _zeros(size: list[int], dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """Write complex zeros by their parts."""
    if dtype is None or not dtype.is_complex:
        return AS_IT_IS
    part = torch.zeros(size, dtype=dtype.to_real(), **options)
    return torch.complex(part, part)


def _contracted(equation: str, operands: list[Tensor], path: list[int] | None = None) -> Tensor:
    """Write a product of complex numbers as four of real ones, which every exporter knows."""
    del path
    if len(operands) != 2 or not any(each.is_complex() for each in operands):
        return AS_IT_IS
    (a, b), (c, d) = (
        (each.real, each.imag) if each.is_complex() else (each, torch.zeros_like(each)) for each in operands
    )

    def product(one: Tensor, other: Tensor) -> Tensor:
        return torch.einsum(equation, one, other)

    return torch.complex(product(a, c) - product(b, d), product(a, d) + product(b, c))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.copy.default: _copied,
    torch.ops.aten.view_as_complex.default: _paired,
    torch.ops.aten.slice_scatter.default: _inserted,
    torch.ops.aten.zeros.default: _zeros,
    torch.ops.aten.einsum.default: _contracted,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _processor_attention,
}
"""Ops taken apart at capture, so that their parts can be quantized."""
