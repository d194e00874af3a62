"""Paths in tables of rich: where there is no room, they are broken at their slashes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.text import Text

__all__ = ["PathCell"]

_INDENT = "  "


@dataclass(frozen=True)
class PathCell:
    """A path, as the cell of a table.

    >>> PathCell("params/layers/attention/kernel").lines(18)
    ['params/layers/', '  attention/kernel']
    """

    path: str
    style: str = ""

    def lines(self, width: int) -> list[str]:
        """The path in lines of a width, if its parts are not longer."""
        lines = [""]
        for part in self._parts():
            if lines[-1].strip() and len(lines[-1] + part) > width:
                lines.append(_INDENT)
            lines[-1] += part
        return lines

    def _parts(self) -> list[str]:
        *parts, last = self.path.split("/")
        return [*(f"{part}/" for part in parts), last]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement  # slow to import, and seldom needed

        longest = max(map(len, self._parts())) + len(_INDENT)
        return Measurement(min(longest, len(self.path)), len(self.path))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        yield Text("\n".join(self.lines(options.max_width)), self.style, overflow="fold")
