"""Early stopping: ends training when a metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from shardflax import struct

__all__ = ["EarlyStopping"]


class EarlyStopping(struct.PyTreeNode):
    """Tells that a metric, of which less is better, has not improved for a while.

    `min_delta` is by how much it must fall to count as an improvement, and `patience` how many
    updates without one are borne.  `update` gives the next state, which also unpacks into
    `(has_improved, state)`.

    >>> early_stop = EarlyStopping(min_delta=0.1, patience=1)
    >>> for loss in (1.0, 0.5, 0.49, 0.48):
    ...     improved, early_stop = early_stop.update(loss)
    >>> early_stop.should_stop, early_stop.best_metric
    (True, 0.5)
    """

    min_delta: float = 0
    patience: int = 0
    best_metric: float = math.inf
    patience_count: int = 0
    should_stop: bool = False
    has_improved: bool = False

    def reset(self) -> EarlyStopping:
        """The state as before any update."""
        return self.replace(
            best_metric=math.inf, patience_count=0, should_stop=False, has_improved=False
        )

    def update(self, metric: Any) -> EarlyStopping:
        """The state after one more value of the metric."""
        if math.isinf(self.best_metric) or self.best_metric - metric > self.min_delta:
            return self.replace(best_metric=metric, patience_count=0, has_improved=True)
        return self.replace(
            patience_count=self.patience_count + 1,
            should_stop=self.should_stop or self.patience_count >= self.patience,
            has_improved=False,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.has_improved, self))
