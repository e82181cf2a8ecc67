"""What a layer prepares on its first call and keeps beside the weight it was made from."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class OnFirstUse(Generic[T]):
    """A prepared call; packed weights cannot be copied or saved, so a copy of the layer starts without one."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._made: T | None = None

    def of(self, weight: Tensor) -> T | None:
        """Return what was prepared, None if there is nothing for this very tensor."""
        return self._made if weight is self._weight else None

    def keep(self, weight: Tensor, made: T) -> T:
        """Keep what was made from a weight, and return it."""
        self._weight, self._made = weight, made
        return made

    def __deepcopy__(self, memo: dict[int, object]) -> OnFirstUse[T]:
        return OnFirstUse()

    def __reduce__(self) -> tuple[type[OnFirstUse[T]], tuple[()]]:
        return OnFirstUse, ()
