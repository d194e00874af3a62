"""A bound on the bytes that are staged and not yet written."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Budget"]


class Budget:
    """Bytes in flight: `take` waits until they fit; one that never would passes alone.

    >>> budget = Budget(10)
    >>> budget.take(50)
    >>> budget.give(50)
    >>> budget.used
    0
    """

    def __init__(
        self, limit: int | None, heard: Callable[[int], object] = lambda nbytes: None
    ) -> None:
        self.limit, self.used, self._heard = limit, 0, heard
        self._changed = threading.Condition()
        self._open = False

    def take(self, size: int) -> None:
        """Waits until `size` more bytes are within the limit, or nothing else is in flight."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._fits(size))
            self.used += size

    def fits(self, size: int) -> bool:
        """True if `take` would not wait."""
        with self._changed:
            return self._open or self._fits(size)

    def _fits(self, size: int) -> bool:
        return self.limit is None or not self.used or self.used + size <= self.limit

    def give(self, size: int) -> None:
        """Says that bytes are written; whoever wants to hear of it does."""
        self._heard(size)
        with self._changed:
            self.used -= size
            self._changed.notify_all()

    def open(self) -> None:
        """Lets everybody pass: nothing will be written any more."""
        with self._changed:
            self._open = True
            self._changed.notify_all()
