"""Saving because time has passed: process 0 looks at its clock, and all do the same."""

from __future__ import annotations

import time
from collections.abc import Callable

from shardflax.ckpt.rendezvous import Rendezvous

__all__ = ["Timer"]

_REMEMBERED = 64
"""Decisions that a process may be behind by."""


class Timer:
    """Says at which step the last save is more than `every` seconds ago.

    Every process asks at the same steps and hears the same.  Process 0 decides, and says with each
    decision for how many steps nobody needs to ask again, so that they seldom talk.  The clock is
    one that nobody sets; if it goes back all the same, time is counted from there.

    >>> from shardflax.ckpt.rendezvous import meet
    >>> now = iter([0, 10, 70, 75])
    >>> timer = Timer(60, meet(timeout=5), clock=lambda: next(now))
    >>> [timer.due(step) for step in (1, 2, 3)]
    [False, True, True]
    """

    def __init__(
        self, every: float, meeting: Rendezvous, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not every > 0:
            raise ValueError(f"CheckpointManager: temporary_every must be positive, not {every}.")
        self._every, self._meeting, self._clock = every, meeting, clock
        self._saved = self._last = clock()
        self._step: int | None = None
        self._said = False
        self._asked = 0  # steps since the last decision
        self._skip = 0
        self._decisions = 0

    def due(self, step: int) -> bool:
        """True if `step` is to be saved; asked again for the same step, the same."""
        if step == self._step:
            return self._said
        self._step, self._asked = step, self._asked + 1
        if self._asked <= self._skip:
            self._said = False
            return False
        number, self._decisions = self._decisions, self._decisions + 1
        mine = self._decide() if self._meeting.primary else None
        self._said, self._skip = self._meeting.agree(
            f"temporary/{number}/said", mine, f"asking whether step {step} is to be saved"
        )
        if self._meeting.primary and number >= _REMEMBERED:
            self._meeting.forget(f"temporary/{number - _REMEMBERED}")
        self._asked = 0
        return self._said

    def saved(self) -> None:
        """A save has begun, whatever for."""
        self._saved = self._now()

    def _now(self) -> float:
        now = self._clock()
        self._saved = min(self._saved, now)
        return now

    def _decide(self) -> tuple[bool, int]:
        """Whether to save now; if not, how many steps surely take less than half of the rest."""
        now = self._now()
        pace = max(now - self._last, 0.0) / self._asked
        self._last = now
        rest = self._every - (now - self._saved)
        if rest <= 0:
            return True, 0
        return False, int(min(rest / 2 / pace, 1000)) if pace > 0 and self._decisions > 1 else 0
