"""A filter for stderr, run as a process of its own: keeps XLA's notes about full rematerialization.

Everything else goes to this process's stderr at once.  What was kept goes to stdout at each mark (a
NUL, a word and a line end), followed by the mark.  A process can do this while the one that it
serves holds the interpreter lock, or dies; a thread cannot.
"""

from __future__ import annotations

import os
import re

__all__ = ["MARK", "OURS", "Filter"]

MARK = rb"\0mark [0-9]+"
OURS = rb"Involuntary full rematerialization"
# The start of a line of XLA's log, perhaps behind something that did not end its line, or a mark.
_START = re.compile(rb"\0|[IWEF][0-9]{4} [0-9:.]+ +[0-9]+ ")
_PERHAPS = re.compile(  # the same, as far as it goes
    rb"\0|[IWEF](?:[0-9]{0,3}$|[0-9]{4}(?:$| [0-9:.]*(?:$| +[0-9]*(?:$| ))))"
)


class Filter:
    """Takes text in pieces of any length; says what passes and what answers a mark.

    >>> f = Filter()
    >>> f.feed(b"50 %W0102 03:04:05.6 7 x.cc] Involuntary full rematerialization\\n")
    (b'50 %', b'')
    >>> f.feed(b"done\\n\\0mark 1\\n")
    (b'done\\n', b'W0102 03:04:05.6 7 x.cc] Involuntary full rematerialization\\n\\x00mark 1\\n')
    """

    def __init__(self) -> None:
        self._rest = b""
        self._kept = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What passes to stderr, and what goes to the one who asked, after `data`."""
        passed = answer = b""
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            start = _START.search(line)
            before, own = (line[: start.start()], line[start.start() :]) if start else (line, b"")
            if re.fullmatch(MARK, own):
                passed += before
                answer += self._kept + own + b"\n"
                self._kept = b""
            elif OURS in own:
                passed += before
                self._kept += own + b"\n"
            else:
                passed += line + b"\n"
        start = _PERHAPS.search(rest)
        cut = start.start() if start else len(rest)
        self._rest = rest[cut:]  # may still become one of ours
        return passed + rest[:cut], answer

    def finish(self) -> bytes:
        """What is left when the text ends; nothing is lost."""
        return self._kept + self._rest


def _main() -> None:
    text = Filter()
    while data := os.read(0, 1 << 16):
        passed, answer = text.feed(data)
        _write(2, passed)
        _write(1, answer)
    _write(2, text.finish())


def _write(number: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(number, data) :]
        except OSError:  # nobody listens any more
            return


if __name__ == "__main__":
    _main()
