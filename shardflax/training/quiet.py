"""Orbax's log lines, kept off the console while one of our operations runs.

Orbax logs through the one logger of absl, and prints the traceback of every failure from the
thread it happened in.  We raise those failures ourselves, so its records are passed to the logger
"shardflax.training.orbax" at level DEBUG instead.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

__all__ = ["quiet_orbax"]

_LOG = logging.getLogger("shardflax.training.orbax")


class _Reroute(logging.Filter):
    """Takes Orbax's records out of absl's logger while `active` operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.active = 0
        self.lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record of Orbax, after handing it on."""
        if not self.active or "/orbax/" not in record.pathname.replace("\\", "/"):
            return True
        _LOG.debug(record.getMessage(), exc_info=record.exc_info)
        return False


_REROUTE = _Reroute()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Reroutes Orbax's log records for as long as the block runs, in all threads.

    >>> with quiet_orbax():
    ...     pass
    """
    logger = logging.getLogger("absl")
    with _REROUTE.lock:
        _REROUTE.active += 1
        logger.addFilter(_REROUTE)
    try:
        yield
    finally:
        with _REROUTE.lock:
            _REROUTE.active -= 1
            if not _REROUTE.active:
                logger.removeFilter(_REROUTE)
