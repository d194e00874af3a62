"""Several processes write to one terminal or log: whole lines with a prefix, one transient line.

A progress bar is a line that a process draws over and over with carriage returns.  On a terminal
it stays the last line: cleared before any other line is printed, drawn again after.  Elsewhere
it is dropped; only whole lines come out.
"""

from __future__ import annotations

import codecs
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal, TextIO

__all__ = ["Console", "Lines", "clip"]

# What Python writes to stdout; what native code and other programs write there; stderr.
Stream = Literal["out", "native", "err"]

_CONTROL = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z])")
_ERASE = re.compile(r"\x1b\[[0-2]?K")
_CLEAR = "\r\x1b[K"
_LONGEST = 1 << 16  # characters held back while no line end comes


def clip(text: str, width: int) -> str:
    r"""The beginning of `text` that takes at most `width` columns; escape sequences take none.

    >>> clip("step 12", 4)
    'step'
    >>> clip("\x1b[1mstep\x1b[0m 12", 4)
    '\x1b[1mstep\x1b[0m'
    """
    kept, left = "", width
    for part in _CONTROL.split(text):
        if _CONTROL.fullmatch(part):
            kept += part
        else:
            kept += part[:left]
            left -= len(part[:left])
    return kept


def _no_noise() -> Callable[[str], bool]:
    """Drops nothing."""
    return lambda line: False


class Lines:
    r"""One byte stream cut into lines; `drawn` says that the pending one is a progress bar.

    >>> lines = Lines()
    >>> list(lines.feed(b"hello\r\nwor"))
    ['hello']
    >>> list(lines.feed(b"ld\n50 %\r60 %")), lines.pending, lines.drawn
    (['world'], '60 %', True)
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._returned = False  # the cursor stands at the beginning of `pending`
        self.pending = ""
        self.drawn = False

    def feed(self, data: bytes, final: bool = False) -> Iterator[str]:
        """The lines that `data` completes."""
        for part in re.split(r"([\r\n])", self._decoder.decode(data, final)):
            if part == "\n":
                yield self._end()
            elif part == "\r":
                self._returned = self.drawn = True
            elif part:
                self.pending = part if self._returned else self.pending + part
                self._returned = False
        if len(self.pending) > _LONGEST:
            yield self._end()

    def _end(self) -> str:
        line = _ERASE.sub("", self.pending)
        self.pending, self.drawn, self._returned = "", False, False
        return line


class Console:
    r"""Puts the output of `count` processes on `out` and `err`, line by line, with a prefix.

    `noise()` gives a filter for each process; lines of native code for which that is true are
    dropped.

    >>> import io
    >>> log = io.StringIO()
    >>> console = Console(2, out=log, err=log)
    >>> console.feed(1, b"hello\n")
    >>> console.feed(0, b"\r10 %\r20 %\rdone\n")
    >>> print(log.getvalue(), end="")
    [1] hello
    [0] done
    """

    def __init__(
        self,
        count: int,
        out: TextIO | None = None,
        err: TextIO | None = None,
        columns: int | None = None,
        noise: Callable[[], Callable[[str], bool]] | None = None,
    ) -> None:
        stdout, stderr = out or sys.stdout, err or sys.stderr
        self._files: dict[Stream, TextIO] = {"out": stdout, "native": stdout, "err": stderr}
        self._lines: defaultdict[tuple[int, Stream], Lines] = defaultdict(Lines)
        self._digits = len(str(count - 1))
        self._columns = columns
        self._noise = defaultdict[int, Callable[[str], bool]](noise or _no_noise)
        self._shown = ""
        self.tty = self._files["out"].isatty()

    def prefix(self, index: int) -> str:
        """What stands before each line of process `index`."""
        return f"[{index:>{self._digits}}] "

    def columns(self, index: int) -> int:
        """The columns that process `index` may fill, one less than fit, so that nothing wraps."""
        width = self._columns or shutil.get_terminal_size().columns
        return max(1, width - len(self.prefix(index)) - 1)

    def feed(self, index: int, data: bytes, stream: Stream = "out") -> None:
        """Takes bytes that process `index` wrote; prints the lines they complete."""
        for line in self._lines[index, stream].feed(data):
            if not (stream == "native" and self._noise[index](line)):
                self._print(f"{self.prefix(index)}{line}", stream)
        self._draw()

    def close(self, index: int) -> None:
        """Prints what process `index` left without a line end; a bar only on a terminal."""
        for key in [k for k in self._lines if k[0] == index]:
            lines = self._lines.pop(key)
            rest = [*lines.feed(b"", final=True), _ERASE.sub("", lines.pending)]
            for line in rest if self.tty or not lines.drawn else []:
                if line:
                    self._print(f"{self.prefix(index)}{line}", key[1])
        self._draw()

    def notice(self, text: str) -> None:
        """Prints a line of the launcher's own."""
        self._print(f"launch: {text}", "err")
        self._draw()

    def _print(self, line: str, stream: Stream) -> None:
        if self._shown and self._files[stream].isatty():
            self._clear()
        self._files[stream].write(f"{line}\n")
        self._files[stream].flush()

    def _clear(self) -> None:
        self._files["out"].write(_CLEAR)
        self._files["out"].flush()
        self._shown = ""

    def _draw(self) -> None:
        """Brings the transient line up to date: the bar of the first process that draws one."""
        wanted = self._transient() if self.tty else ""
        if wanted == self._shown:
            return
        self._files["out"].write(f"{_CLEAR}{wanted}")
        self._files["out"].flush()
        self._shown = wanted

    def _transient(self) -> str:
        for (index, _), lines in sorted(self._lines.items()):
            text = _ERASE.sub("", lines.pending)
            if lines.drawn and text.strip():
                return self.prefix(index) + clip(text, self.columns(index))
        return ""
