"""A line on stderr that says how far a long init is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from shardflax.partitioning.layout import Layout
from shardflax.partitioning.table import bytes_text
from shardflax.partitioning.untyped import jx

__all__ = ["progress_line"]

_PATIENCE = 1.0


@contextmanager
def progress_line(
    layout: Layout, wanted: bool | None = None
) -> Generator[Callable[[Sequence[int]], None]]:
    """Gives a function to call with the numbers of the arrays that have been made.

    With `wanted` None there is a line if stderr is a terminal, in the first process, and only
    after a second.

    >>> import jax
    >>> with progress_line(Layout({}, jax.make_mesh((8,), ("data",)), ())) as tell:
    ...     tell(())
    """
    shown = wanted or (wanted is None and sys.stderr.isatty() and jx.process_index() == 0)
    line = _Line(layout, 0.0 if wanted else _PATIENCE) if shown else None
    try:
        yield line.tell if line else _ignore
    finally:
        if line:
            line.stop()


def _ignore(_: Sequence[int]) -> None:
    pass


class _Line:
    """The line, which appears when it has been waited for long enough."""

    def __init__(self, layout: Layout, patience: float) -> None:
        self._layout, self._start = layout, time.monotonic() + patience
        self._arrays, self._bytes = 0, 0
        self._progress: Any = None
        self._task: Any = None

    def tell(self, numbers: Sequence[int]) -> None:
        leaves = self._layout.leaves
        self._arrays += len(numbers)
        self._bytes += sum(leaves[number].bytes_per_device for number in numbers)
        if self._progress is None and time.monotonic() >= self._start:
            self._appear()
        if self._progress is not None:
            last = leaves[numbers[-1]].where if numbers else ""
            self._progress.update(self._task, completed=self._bytes, arrays=self._arrays, last=last)

    def _appear(self) -> None:
        from rich.console import Console  # slow to import, and seldom needed
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        total = self._layout.bytes_per_device
        self._progress = Progress(
            TextColumn("init"),
            BarColumn(bar_width=24),
            TextColumn(f"{{task.fields[arrays]}}/{len(self._layout.leaves)} arrays"),
            TextColumn(f"of {bytes_text(total)} a device"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[last]}", style="dim"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("init", total=total, arrays=0, last="")
        self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
