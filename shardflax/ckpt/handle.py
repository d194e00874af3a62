"""What `save` returns."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future

__all__ = ["SaveHandle"]


@dataclasses.dataclass(frozen=True)
class SaveHandle:
    """A save that was started; always true.

    `staged` is done when the values no longer need the caller's arrays, `committed` when the step
    is complete on disk, in all processes; their `result()` raises what went wrong.

    >>> SaveHandle(10)
    SaveHandle(step=10)
    """

    step: int
    staged: Future[None] = dataclasses.field(default_factory=Future, repr=False)
    committed: Future[None] = dataclasses.field(default_factory=Future, repr=False)
