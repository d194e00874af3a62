"""Which steps are saved, and which of those that were saved stay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

__all__ = ["Note", "Rules", "expired"]


@dataclasses.dataclass(frozen=True)
class Note:
    """What the rules must know of a step: its metrics, and whether it only bridges a gap in time.

    >>> Note().temporary
    False
    """

    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    temporary: bool = False


@dataclasses.dataclass(frozen=True)
class Rules:
    """When to save, and what to keep; see `CheckpointManager`.

    Raises ValueError for counts below 1.

    >>> Rules(save_every=10).regular(20), Rules(save_every=10).regular(25)
    (True, False)
    """

    keep: int | None = 3
    save_every: int = 1
    keep_every: int | None = None
    best: str | None = None
    best_is_max: bool = False

    def __post_init__(self) -> None:
        for name in ("keep", "save_every", "keep_every"):
            value = getattr(self, name)
            wrong = name == "save_every" if value is None else value < 1
            if wrong:
                raise ValueError(f"CheckpointManager: {name} must be at least 1, not {value}.")

    def regular(self, step: int) -> bool:
        """True if `save_every` divides the step."""
        return step % self.save_every == 0

    def best_of(self, steps: Iterable[int], note: Callable[[int], Note]) -> int | None:
        """The step with the best metric, of those that have it; the latest of several.

        NaN is no metric: nothing would be better or worse.
        """
        if self.best is None:
            return None
        sign = -1 if self.best_is_max else 1
        values = {step: note(step).metrics.get(self.best) for step in steps}
        known = [
            (sign * value, -step)
            for step, value in values.items()
            if value is not None and not math.isnan(value)
        ]
        return -min(known)[1] if known else None

    def expired(self, steps: Iterable[int], note: Callable[[int], Note]) -> list[int]:
        """The steps that can go, in order; `note` tells about a step.

        Temporary ones go as soon as a later step is there, and do not count among those kept.

        >>> Rules(keep=2).expired([1, 2, 3], lambda step: Note())
        [1]
        >>> Rules(keep=2, save_every=10).expired([10, 15, 20, 25], lambda step: Note({}, True))
        [15]
        """
        ordered = sorted(steps)
        passing = [s for s in ordered if not self.regular(s) and note(s).temporary]
        best = self.best_of(ordered, note)
        spared = {ordered[-1], best} if ordered else set[int | None]()
        lasting = [s for s in ordered if s not in passing]
        gone = [
            *expired(lasting, self.keep, self.keep_every),
            *expired(passing, 0, self.keep_every),
        ]
        return sorted(s for s in gone if s not in spared)


def expired(steps: Iterable[int], keep: int | None, keep_every: int | None) -> list[int]:
    """All steps but the newest `keep` and multiples of `keep_every`.

    >>> expired([10, 20, 30, 40, 50], keep=2, keep_every=20)
    [10, 30]
    """
    ordered = sorted(steps)
    old = ordered[: max(0, len(ordered) - keep)] if keep is not None else []
    return [s for s in old if keep_every is None or s % keep_every]
