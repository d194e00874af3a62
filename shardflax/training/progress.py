"""The display of a long run: a bar that is redrawn in place, or a line now and then."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self, TextIO

import jax
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardflax.training.metrics import Throughput

__all__ = ["Progress", "compact_number", "duration"]

Mode = Literal["bar", "lines"]

MODE_VARIABLE = "SHARDFLAX_PROGRESS"
REDRAW_SECONDS = 0.1


def compact_number(value: float) -> str:
    """Three digits and a suffix.

    >>> [compact_number(v) for v in (0.5, 123.4, 1234, 45_678_901)]
    ['0.5', '123', '1.23k', '45.7M']
    """
    for suffix in ("", "k", "M", "G"):
        if abs(value) < 999.5 or suffix == "G":
            return f"{value:.3g}{suffix}"
        value /= 1000
    raise AssertionError("the last suffix takes everything")


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> duration(75), duration(3675), duration(0.4)
    ('1:15', '1:01:15', '0:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    r"""Shows step, loss, tokens per second and time left of a run of `total` steps.

    As a bar (drawn over itself with carriage returns, within COLUMNS where that is set), or as a
    line every `every_seconds`, and for the last step.  `mode` decides; without it the variable
    SHARDFLAX_PROGRESS ("bar" or "lines", set by a launcher), else whether `stream` is a terminal.
    Only process 0 shows anything.  `start` is the step that a resumed run begins after.

    >>> times = iter(range(0, 100, 10))
    >>> with Progress(3, tokens_per_step=640, mode="lines", clock=lambda: next(times)) as progress:
    ...     for step in (1, 2, 3):
    ...         progress.update(step, loss=2.5 / step)
    step 1/3  loss 2.5000  64 tok/s  0:20 left
    step 2/3  loss 1.2500  64 tok/s  0:10 left
    step 3/3  loss 0.8333  64 tok/s  0:00 left
    """

    def __init__(
        self,
        total: int,
        *,
        tokens_per_step: int,
        start: int = 0,
        mode: Mode | None = None,
        every_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        shown: bool | None = None,
    ) -> None:
        self.total, self.start, self.every_seconds = total, start, every_seconds
        self._stream = stream if stream is not None else sys.stdout
        self.mode = mode or _mode(self._stream)
        self._shown = jax.process_index() == 0 if shown is None else shown
        self._now = self._begin = clock()
        self._clock = clock
        self._rate = Throughput(tokens_per_step, clock=lambda: self._now)
        self._rate.tick(start)
        self._last_shown: float | None = None
        self._drawn = False
        self._state: tuple[int, float | None] = (start, None)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second, from the median of recent steps."""
        return self._rate.tokens_per_second

    def update(self, step: int, loss: float | None = None) -> None:
        """Notes that `step` steps are done, and shows it if it is time to."""
        self._now = self._clock()
        self._rate.tick(step)
        self._state = (step, loss)
        interval = REDRAW_SECONDS if self.mode == "bar" else self.every_seconds
        waited = None if self._last_shown is None else self._now - self._last_shown
        if self._shown and (waited is None or waited >= interval or step >= self.total):
            self._last_shown = self._now
            self._show()

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        if not self._shown:
            return
        if self._drawn:
            self._stream.write("\r\x1b[K")
        self._stream.write(f"{text}\n")
        if self._drawn:
            self._show()
        self._stream.flush()

    def close(self) -> None:
        """Leaves the bar where it stands, on a line that is over."""
        if self._drawn:
            self._show()
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False

    def __enter__(self) -> Self:
        """The display itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the line of the bar, so that nothing is printed into it."""
        self.close()

    def _parts(self) -> list[str]:
        """What is known, in the order it is shown."""
        step, loss = self._state
        parts = [f"step {step}/{self.total}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if (rate := self.tokens_per_second) is not None:
            parts.append(f"{compact_number(rate)} tok/s")
        if (seconds := self._rate.step_time) is not None:
            parts.append(f"{duration(seconds * max(0, self.total - step))} left")
        return parts

    def _show(self) -> None:
        """Draws the bar over the last one, or prints a line."""
        if self.mode == "lines":
            self._stream.write("  ".join(self._parts()) + "\n")
        else:
            self._stream.write("\r" + self._bar() + "\x1b[K")
            self._drawn = True
        self._stream.flush()

    def _bar(self) -> str:
        """One line of at most the terminal's width: the bar takes the room that the text leaves."""
        width = _columns()
        text = "  ".join(self._parts())
        room = width - len(text) - 1
        if room < 4:
            return text[:width]
        row = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(total=self.total, completed=self._state[0], width=min(room, 40))
        row.add_row(bar, Text(text))
        out = io.StringIO()
        Console(file=out, force_terminal=True, width=width, legacy_windows=False).print(row, end="")
        return out.getvalue().rstrip("\n").rstrip()


def _mode(stream: TextIO) -> Mode:
    """As the launcher says, else a bar on a terminal."""
    told = os.environ.get(MODE_VARIABLE)
    if told is None:
        return "bar" if stream.isatty() else "lines"
    return "bar" if told == "bar" else "lines"


def _columns() -> int:
    """How wide a bar may be: what COLUMNS says, else one less than the terminal, not to wrap."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    return shutil.get_terminal_size().columns - 1
