"""Asked to stop: SIGTERM, noticed by all processes at the same moment of their program."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from shardflax.ckpt.errors import CheckpointError

__all__ = ["Preemption"]


class _Everybody:
    """The moment on which JAX's coordination service agrees, which is one for all managers.

    They are counted, not the steps: an evaluation asks several times after one step, and several
    managers ask at each.  The service says yes for one number alone, once.
    """

    def __init__(self) -> None:
        self._asked, self._reached = 0, False

    def reached(self) -> bool:
        """True from that moment on; all processes must ask equally often."""
        if not self._reached:
            self._asked += 1
            self._reached = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._reached


_everybody = _Everybody()


class Preemption:
    """From `start` to `stop`, SIGTERM does not kill the process but is remembered.

    With several processes, JAX holds the signal, whichever of them got it, and its coordination
    service agrees on one of the moments at which they ask: each must ask equally often.  Where one
    asks does not matter, so it can be in the middle of an evaluation; a signal that comes while
    nobody asks (the compiler runs, say) is heard of at the next time.

    >>> import os
    >>> preemption = Preemption()
    >>> preemption.start()
    >>> before = preemption.reached()
    >>> os.kill(os.getpid(), signal.SIGTERM)
    >>> before, preemption.reached()
    (False, True)
    >>> preemption.stop()
    """

    def __init__(self) -> None:
        self._noticed = self._reached = False
        self._step: int | None = None
        self._before: Any = None
        self._stopped = False

    def reached(self, step: int | None = None) -> bool:
        """True from the moment on at which all processes have heard that they shall stop.

        Asked again for the same step, it says the same.
        """
        if self._reached or (step is not None and step == self._step):
            return self._reached
        self._step = step
        self._reached = _everybody.reached() if jax.process_count() > 1 else self._noticed
        return self._reached

    def start(self) -> None:
        """Takes over the signal, if JAX does not have it already.

        Raises CheckpointError outside of the main thread, where Python cannot do that.
        """
        if jax.process_count() > 1:
            return
        if threading.current_thread() is not threading.main_thread():
            raise CheckpointError(
                "CheckpointManager(preemptible=True) was made outside of the main thread, where "
                "Python lets nobody handle SIGTERM: make it in the main thread."
            )
        self._before = signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, number: int, frame: Any) -> None:
        self._noticed = True
        if callable(self._before):
            self._before(number, frame)
        elif self._stopped and signal.getsignal(number) == self._notice:
            self._give_back()
            os.kill(os.getpid(), number)

    def stop(self) -> None:
        """Gives the signal back to whom it belonged before.

        Where that cannot be now (in another thread, or while somebody else has the signal who got
        it from here), it is done when the signal comes.
        """
        self._stopped = True
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == self._notice:
            self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
