"""Takes Gloo's greetings out of a process's output.

Gloo, which carries the collectives of CPU devices between processes, greets each peer of each group
of devices on stdout.  Threads write these lines piece by piece and at once, so they come out mixed.
"""

from __future__ import annotations

import re

__all__ = ["GlooChatter"]

_START = "[Gloo] Rank "
_PIECES = re.compile(
    r"(\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+|\s)*"
)


class GlooChatter:
    """Tells the lines that are made of nothing but pieces of greetings; one per stream.

    A bare number or an empty line is taken for a piece only while a greeting lacks its line end.

    >>> chatter = GlooChatter()
    >>> [chatter(line) for line in ["7", "[Gloo] Rank 1[Gloo] Rank  is connected to 03", "7", "7"]]
    [False, True, True, False]
    """

    def __init__(self) -> None:
        self._owed = 0  # line ends of greetings that have begun

    def __call__(self, line: str) -> bool:
        self._owed += line.count(_START)
        if not self._owed or not _PIECES.fullmatch(line):
            return False
        self._owed -= 1
        return True
