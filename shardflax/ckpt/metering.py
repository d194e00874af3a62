"""How far a long save, restore or check is: a bar on a terminal, or lines in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal, TextIO

from shardflax.partitioning.table import bytes_text

__all__ = ["Meter", "Mode", "showing"]

Mode = Literal["auto", "lines"] | None
"""A bar if stderr is a terminal; lines wherever that is; nothing."""

_PATIENCE = 2.0
"""Seconds before anything is shown: what is quicker needs no bar."""
_PERIOD = 10.0
"""Seconds between two lines."""


class Meter:
    """Bytes that are done, of those expected; counted on any thread.

    >>> meter = Meter("saving step 3", 200)
    >>> meter.advance(50)
    >>> str(meter)
    'saving step 3: 25 % of 200 B'
    """

    def __init__(self, what: str, total: int = 0) -> None:
        self.what, self.total, self.done = what, total, 0
        self._lock = threading.Lock()

    def expect(self, total: int) -> None:
        """Says how much there is, as soon as that is known; what was done before is forgotten."""
        self.total, self.done = total, 0

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self.done += nbytes

    def __str__(self) -> str:
        """What is being done, and how much of it is."""
        if not self.total:
            return self.what
        share = min(1.0, self.done / self.total)
        return f"{self.what}: {share:.0%} of {bytes_text(self.total)}".replace("%", " %")


@contextlib.contextmanager
def showing(
    meter: Meter, mode: Mode, *, patience: float = _PATIENCE, period: float = _PERIOD
) -> Iterator[None]:
    """Shows on stderr how far a meter is, while the block takes longer than `patience` seconds.

    >>> with showing(Meter("reading"), None):
    ...     pass
    """
    stream = sys.stderr
    if mode is None or (mode == "auto" and not stream.isatty()):
        yield
        return
    ended = threading.Event()
    show = _lines if mode == "lines" else _bar
    thread = threading.Thread(
        target=show, args=(meter, ended, stream, patience, period), name="shardflax-meter"
    )
    try:
        thread.start()
    except RuntimeError:  # Python 3.12 starts none once a program is ending
        yield
        return
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lines(
    meter: Meter, ended: threading.Event, stream: TextIO, patience: float, period: float
) -> None:
    """A line now and then, and one at the end if there were others."""
    began, pause = time.monotonic(), patience
    while not ended.wait(pause):
        print(meter, file=stream, flush=True)
        pause = period
    seconds = time.monotonic() - began
    if seconds > patience:
        print(f"{meter} in {seconds:.1f} s", file=stream, flush=True)


def _bar(
    meter: Meter, ended: threading.Event, stream: TextIO, patience: float, period: float
) -> None:
    """A bar that goes away at the end."""
    del period
    if ended.wait(patience):
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        task = progress.add_task(meter.what, completed=meter.done, total=meter.total or None)
        while not ended.wait(0.1):
            progress.update(task, completed=meter.done, total=meter.total or None)
