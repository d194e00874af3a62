"""A second pair of eyes: kills what the launcher started, should the launcher itself be killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import TracebackType
from typing import IO, Self

__all__ = ["Guard"]

# Reads process groups until its input ends, that is until the launcher is gone; kills those left.
_PROGRAM = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Guard:
    """A process that outlives a killed launcher just long enough to kill its process groups.

    `launch.child.die_with_parent` is quicker, but it reaches only the processes themselves, not
    those that they started, and only on Linux.

    >>> import subprocess, sys
    >>> with Guard() as guard:
    ...     sleeper = subprocess.Popen(
    ...         [sys.executable, "-c", "import time; time.sleep(60)"], process_group=0
    ...     )
    ...     guard.add(sleeper.pid)  # not removed: as if the launcher died here
    >>> sleeper.wait()
    -9
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def add(self, group: int) -> None:
        """Watches over a process group."""
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        """Forgets a process group that is gone."""
        self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the guard: we go on without
            self._input.write(line.encode())
            self._input.flush()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._process.wait()
