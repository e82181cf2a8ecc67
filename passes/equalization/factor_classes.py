"""Sets of numbers that must be equal, by union and find on whole tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ONE, ANY = 0, -1
"""Number of the factor 1, and of elements that are 0 under every factor."""


class Classes:
    """Union and find over numbers of factors."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)

    def new(self, count: int) -> Tensor:
        """Return numbers that no other element has, shape (count,)."""
        start = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(start, start + count)])
        return torch.arange(start, start + count, dtype=torch.float64)

    def roots(self) -> NDArray[np.int64]:
        """Return the class of every number."""
        while True:
            further = self._parent[self._parent]
            if np.array_equal(further, self._parent):
                return self._parent
            self._parent = further

    def of(self, numbers: Tensor) -> Tensor:
        """Return the class of each element, `ANY` where it has none."""
        flat = numbers.to(torch.int64)
        return torch.where(flat < 0, flat, torch.from_numpy(self.roots())[flat.clamp(min=0)])

    def join(self, left: Tensor, right: Tensor) -> None:
        """Make the numbers of two tensors equal, element by element; `ANY` is equal to all."""
        one, two = np.broadcast_arrays(*(self.of(compact(each)).numpy() for each in (left, right)))
        differ = (one != two) & (one >= 0) & (two >= 0)
        pairs = np.unique(np.stack([one[differ], two[differ]]), axis=1)
        fixed = (pairs == ONE).any(axis=0)
        self._parent[pairs[:, fixed].flatten()] = ONE
        for first, second in pairs[:, ~fixed].T.tolist():
            low, high = sorted((self._root(first), self._root(second)))
            # The lower number stays, so that whatever meets `ONE` belongs to it.
            self._parent[high] = low

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            number = int(self._parent[number])
        return number

    def is_one(self, numbers: Tensor) -> bool:
        """Whether every element has the factor 1."""
        return bool((self.of(compact(numbers)) <= ONE).all())


def compact(numbers: Tensor) -> Tensor:
    """Return the tensor with one element along every axis along which it does not change."""
    for axis, size in enumerate(numbers.shape):
        if size < 2:
            continue
        first = numbers.narrow(axis, 0, 1)
        if numbers.stride(axis) == 0 or torch.equal(numbers, first.expand_as(numbers)):
            numbers = first
    return numbers
