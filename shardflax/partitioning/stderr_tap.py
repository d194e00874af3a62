"""Listening to what the compiler says on stderr, while it compiles."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from shardflax.partitioning import stderr_filter

__all__ = ["listen"]

_MARK = re.compile(stderr_filter.MARK)
_THREAD = re.compile(r"^[IWEF]\d{4} [\d:.]+ +(\d+) ")


@dataclass
class _Listener:
    """One who listens: which thread, and the lines that were meant for it."""

    thread: int = field(default_factory=threading.get_native_id)
    lines: list[str] = field(default_factory=lambda: list[str]())


class _Tap:
    """File descriptor 2 of this process, led through a filter while anybody listens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[_Listener] = []
        self._marks = 0
        self._stderr = -1  # a copy of the real one
        self._answers: IO[bytes] | None = None
        self._filters: list[int] = []  # processes that may not have ended yet

    def enter(self, listener: _Listener) -> None:
        with self._lock:
            self._listeners.append(listener)
            if len(self._listeners) == 1:
                self._open()

    def leave(self, listener: _Listener) -> None:
        with self._lock:
            last = len(self._listeners) == 1
            try:
                if self._answers is not None:
                    self._collect(last)
            finally:
                self._listeners.remove(listener)

    def _open(self) -> None:
        self._filters = [pid for pid in self._filters if _runs(pid)]
        with contextlib.suppress(OSError):  # no stderr, or no processes: compiling goes first
            self._stderr = os.dup(2)
            try:
                process = _start_filter(self._stderr)
            except OSError:
                os.close(self._stderr)
                raise
            assert process.stdin is not None
            with process.stdin as into:
                os.dup2(into.fileno(), 2)
            self._answers = process.stdout
            self._filters.append(process.pid)
            process.returncode = 0  # it may outlive its object: children write on through it

    def _collect(self, last: bool) -> None:
        """Shares out what was kept; the last listener also puts the real stderr back."""
        assert self._answers is not None
        self._marks += 1
        mark = b"\0mark %d\n" % self._marks
        with contextlib.suppress(BrokenPipeError):  # the filter is gone: there will be no answer
            os.write(2, mark)
        if last:
            os.dup2(self._stderr, 2)
            os.close(self._stderr)
        for line in iter(self._answers.readline, b""):
            if line == mark:
                break
            if not _MARK.match(line):
                self._share(line.decode(errors="replace").rstrip("\n"))
        if last:
            self._answers.close()
            self._answers = None

    def _share(self, line: str) -> None:
        """Gives a line to those of the thread that wrote it; of no one's, to all."""
        wrote = _THREAD.match(line)
        mine = [x for x in self._listeners if wrote and x.thread == int(wrote[1])]
        for listener in mine or self._listeners:
            listener.lines.append(line)


def _runs(pid: int) -> bool:
    """False for a child that has ended, which is forgotten by that."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def _start_filter(stderr: int) -> subprocess.Popen[bytes]:
    """The filter, in a session of its own: an interrupt from the keyboard is not for it."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(stderr_filter.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )


_tap = _Tap()


@contextmanager
def listen() -> Generator[list[str]]:
    """Takes XLA's notes about rematerialization out of stderr; they are in the list at the end.

    Everything else that this process and its children write passes at once, also if the process
    dies.  Threads that compile at the same time get the notes of their own programs.

    >>> with listen() as lines:
    ...     pass
    >>> lines
    []
    """
    listener = _Listener()
    _tap.enter(listener)
    try:
        yield listener.lines
    finally:
        _tap.leave(listener)
