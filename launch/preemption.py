"""Asked to stop: SIGTERM, noticed by all processes at the same step."""

from __future__ import annotations

import signal
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

__all__ = ["Preemption"]


class Preemption:
    """Within this context, SIGTERM asks the run to save and stop instead of killing it.

    With several processes, JAX holds the signal, and its coordination service agrees on a step:
    every process must ask at every step.

    >>> import os
    >>> with Preemption() as preemption:
    ...     before = preemption.asked(1)
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     before, preemption.asked(2)
    (False, True)
    """

    def __init__(self) -> None:
        self._noticed = False
        self._before: Any = None

    def asked(self, step: int) -> bool:
        """True if the run shall stop after `step`."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed

    def _notice(self, *_: object) -> None:
        self._noticed = True

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
