"""The panels of a picture of a mesh: tables of cells, as many as there are outer positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Drawing", "Panel", "Piece", "beside", "panels", "together"]

_MORE = "…"
_HEAD, _TAIL = 3, 1  # what is left of a long dim

Piece = tuple[str, str]  # text and style
Index = int | None  # None stands for what is left out, or for no dim
Box = tuple[tuple[int, ...], ...]  # positions along every axis


@dataclass(frozen=True)
class Drawing:
    """Cells and styles in the shape of the mesh, the slices, and how long a dim is shown.

    >>> zeros = np.zeros((2,), int)
    >>> Drawing(("data",), zeros.astype(str), zeros.astype(str), zeros, 16).axes
    ('data',)
    """

    axes: tuple[str, ...]
    cells: Any
    styles: Any
    slices: Any
    limit: int


@dataclass(frozen=True)
class Panel:
    """A table of cells under a title.

    >>> Panel("data=0", ((("0  1", ""),),)).width
    6
    """

    title: str
    lines: tuple[tuple[Piece, ...], ...]

    @property
    def width(self) -> int:
        """In characters."""
        lines = (sum(len(text) for text, _ in line) for line in self.lines)
        return max(len(self.title), max(lines, default=0))


def together(panels: Sequence[Panel]) -> int:
    """The width of panels side by side.

    >>> together([Panel("data=0", ()), Panel("data=1", ())])
    15
    """
    return sum(panel.width for panel in panels) + 3 * (len(panels) - 1)


def beside(panels: Sequence[Panel]) -> Iterator[list[Piece]]:
    """The lines of panels side by side.

    >>> ["".join(text for text, _ in line) for line in beside([Panel("a", ()), Panel("b", ())])]
    ['a   b   ']
    """
    columns = [(((p.title, "bold"),), *p.lines) if p.title else p.lines for p in panels]
    for parts in itertools.zip_longest(*columns, fillvalue=()):
        line: list[Piece] = []
        for panel, part in zip(panels, parts, strict=True):
            used = sum(len(text) for text, _ in part)
            line += [*part, (" " * (panel.width - used + 3), "")]
        yield line


def panels(drawing: Drawing) -> Iterator[Panel]:
    """One panel for each slice and each position of all axes but two; the first and the last.

    >>> zeros = np.zeros((2, 1, 2, 2), int)
    >>> cells = np.arange(8).reshape(zeros.shape).astype(str)
    >>> drawing = Drawing(tuple("abcd"), cells, zeros.astype(str), zeros, 16)
    >>> [panel.title for panel in panels(drawing)]
    ['a=0', 'a=1']
    """
    boxes = list(_boxes(drawing))
    places = [(one, place) for one, box in boxes for place in _places(box)]
    for index in _shown(len(places), drawing.limit):
        if index is None:
            left = f"{_MORE} {len(places) - _HEAD - _TAIL} more"
            yield Panel("", ((("", ""),), ((left, "dim"),)))
        else:
            one, place = places[index]
            yield _panel(drawing, place, f"slice {one}" if len(boxes) > 1 else "")


def _boxes(drawing: Drawing) -> Iterator[tuple[int, Box]]:
    """Each slice and where it is along every axis; all in one, if some slice is no box."""
    found: list[tuple[int, Box]] = []
    for one in np.unique(drawing.slices):
        where = np.nonzero(drawing.slices == one)
        box = tuple(tuple(sorted({int(i) for i in dim})) for dim in where)
        if math.prod(map(len, box)) != len(where[0]):
            yield 0, tuple(tuple(range(size)) for size in drawing.slices.shape)
            return
        found.append((int(one), box))
    yield from found


def _places(box: Box) -> Iterator[Box]:
    """A box cut along all of its axes but the last two."""
    outer = [dim for dim, positions in enumerate(box) if len(positions) > 1][:-2]
    cut = [
        [(i,) for i in positions] if dim in outer else [positions]
        for dim, positions in enumerate(box)
    ]
    yield from itertools.product(*cut)


def _panel(drawing: Drawing, place: Box, head: str) -> Panel:
    """The panel of a place that is long along two axes at most."""
    shape = drawing.slices.shape
    fixed = ", ".join(
        f"{axis}={positions[0]}"
        for axis, positions, size in zip(drawing.axes, place, shape, strict=True)
        if len(positions) == 1 and size > 1
    )
    return Panel(": ".join(part for part in (head, fixed) if part), tuple(_table(drawing, place)))


def _table(drawing: Drawing, place: Box) -> Iterator[tuple[Piece, ...]]:
    """The lines of a table: labels of the columns above a rule, those of the rows before one."""
    long = [dim for dim, positions in enumerate(place) if len(positions) > 1]
    rows, columns = ([None, None, *long])[-2:]
    down, right = (_along(place, dim, drawing.limit) for dim in (rows, columns))
    width = max(len(str(text)) for text in drawing.cells.flat)
    name = "" if rows is None else drawing.axes[rows]
    margin = max(len(_label(i)) for i in down)
    head = "" if rows is None else " " * (len(name) + margin + 3)
    if columns is not None:
        blank = f"{head}  " if head else ""
        labels = "  ".join(f"{_label(i):>{width}}" for i in right)
        yield ((blank, ""), (drawing.axes[columns], "italic"))
        yield ((blank, ""), (labels, "dim"))
        yield ((head, ""), (f"┌{'─' * (len(labels) + 1)}" if head else "─" * len(labels), "dim"))
    for i in down:
        line: list[Piece] = []
        if rows is not None:
            line += [(f"{name:{len(head) - margin - 1}}", "italic")]
            line += [(f"{_label(i):>{margin}} │ ", "dim")]
            name = ""
        for j in right:
            text, style = _cell(drawing, place, {rows: i, columns: j})
            line += [(f"{text:>{width}}", style), ("  ", "")]
        yield tuple(line[:-1])


def _along(place: Box, dim: Index, limit: int) -> list[Index]:
    """The positions along one dim that are shown; one where there is no such dim."""
    if dim is None:
        return [0]
    return [None if i is None else place[dim][i] for i in _shown(len(place[dim]), limit)]


def _label(position: Index) -> str:
    return _MORE if position is None else str(position)


def _cell(drawing: Drawing, place: Box, at: dict[Index, Index]) -> Piece:
    """The text and the style of one position."""
    index = tuple(at.get(dim, positions[0]) for dim, positions in enumerate(place))
    if None in index:
        return (_MORE, "dim")
    return str(drawing.cells[index]), str(drawing.styles[index])


def _shown(size: int, limit: int) -> list[Index]:
    """The positions that are shown of `size`: all, or the first and the last and a gap."""
    if size <= max(limit, _HEAD + _TAIL + 1):
        return list(range(size))
    return [*range(_HEAD), None, *range(size - _TAIL, size)]
