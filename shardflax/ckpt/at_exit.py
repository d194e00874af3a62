"""A program that ends without waiting for its last save commits it nevertheless."""

from __future__ import annotations

import atexit
import sys
import traceback
from typing import Any

__all__ = ["IN_FLIGHT", "commit_at_exit"]

IN_FLIGHT: set[Any] = set()
"""Managers that are saving; kept here, they live until they are done."""


def commit_at_exit() -> None:
    """Lets a program that ends without `wait` commit its last save.

    Hooks run in reverse order: ours comes before the shutdown of JAX's, whenever that was
    registered.

    >>> commit_at_exit()
    """
    atexit.unregister(_wait)
    atexit.register(_wait)


def _wait() -> None:
    """Waits for the saves in flight; a failure can only be printed."""
    for manager in tuple(IN_FLIGHT):
        try:
            manager.wait()
        except Exception:
            print("The last checkpoint was lost at exit; call close() to be sure:", file=sys.stderr)
            traceback.print_exc()
