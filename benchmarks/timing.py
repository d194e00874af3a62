"""Timing in turn: on a machine that others use too, only ratios taken side by side mean anything.

Contenders run one after the other in each round (A B C, B C A, ...), so that whatever slows the
machine down slows all of them; a result is the median over the rounds of their ratio.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Rounds", "calls_of", "cpu_time", "in_turn"]


@dataclass(frozen=True)
class Rounds:
    """Seconds of each contender in each round."""

    seconds: Mapping[str, list[float]]

    def ratio(self, name: str, over: str) -> float:
        """The median over the rounds of how much longer `name` took than `over`.

        >>> Rounds({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}).ratio("a", "b")
        2.0
        """
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def extra(self, name: str, beyond: str) -> float:
        """The median over the rounds of how many seconds longer `name` took than `beyond`."""
        pairs = zip(self.seconds[name], self.seconds[beyond], strict=True)
        return statistics.median(a - b for a, b in pairs)

    def spread(self, name: str, over: str) -> tuple[float, float]:
        """The quartiles of the ratio: how far to trust its median."""
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        ratios = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(ratios if len(ratios) > 1 else ratios * 2, n=4)
        return low, high

    def median(self, name: str) -> float:
        """The median time of one contender."""
        return statistics.median(self.seconds[name])


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    timed: Callable[[Callable[[], object]], float],
) -> Rounds:
    """Runs the contenders in turn, after one round that does not count.

    `timed(fn)` gives the seconds of one run.

    >>> sorted(in_turn({"a": lambda: 1, "b": lambda: 2}, rounds=2, timed=cpu_time).seconds)
    ['a', 'b']
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _, contender in contenders.items():
        contender()
    gc.collect()
    gc.disable()
    try:
        order = list(contenders)
        for _ in range(rounds):
            for name in order:
                seconds[name].append(timed(contenders[name]))
            gc.collect()
            order = [*order[1:], order[0]]  # whoever comes first finds cold caches
    finally:
        gc.enable()
    return Rounds(seconds)


def cpu_time(fn: Callable[[], object]) -> float:
    """Seconds that one call takes this thread on the processor.

    What is measured here is Python's work, which one thread does; while that waits for its turn
    on the processor, or for XLA's threads, it is not counted.
    """
    start = time.thread_time()
    fn()
    return time.thread_time() - start


def calls_of(fn: Callable[[], object]) -> int:
    """How many Python functions one call of `fn` calls, itself included.

    No noise touches this figure; what is cached and what is not does.

    >>> calls_of(lambda: None)
    1
    """
    count = 0

    def tick(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(tick)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return count
