"""A picture of a mesh: which device is where, in which slice, and what each axis runs over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jax.sharding import AxisType, Mesh

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import LayoutError
from shardflax.partitioning.given import check_mesh
from shardflax.partitioning.scope import AnyMesh, axis_kinds
from shardflax.partitioning.slices import networks, slices_of

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["MeshPicture", "mesh_picture"]

_MORE = "…"
_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "red")
_HEAD, _TAIL = 3, 1  # what is left of a long dim

Piece = tuple[str, str]  # text and style
Index = int | None  # None stands for what is left out, or for no dim
Box = tuple[tuple[int, ...], ...]  # positions along every axis


@dataclass(frozen=True)
class MeshPicture:
    """The picture of a mesh: plain text by `str`, coloured by slice or process where rich prints.

    >>> from shardflax.partitioning import make_mesh
    >>> MeshPicture(make_mesh("data=8")).title
    'data=8: 8 cpu devices'
    """

    mesh: AnyMesh
    show: Literal["id", "process", "coords"] = "id"
    width: int = 100
    limit: int | None = None

    @property
    def title(self) -> str:
        """The axes with their types and networks, and what the devices are."""
        across = networks(self.mesh) if isinstance(self.mesh, Mesh) else {}
        slices = max((parts for parts, _ in across.values()), default=1) > 1
        axes = [
            f"{axis}={size}" + _about(kind, across[axis] if slices else None)
            for (axis, kind), size in zip(axis_kinds(self.mesh), self.mesh.axis_sizes, strict=True)
        ]
        return f"{', '.join(axes)}: {_devices(self.mesh)}"

    def __str__(self) -> str:
        lines = ["".join(text for text, _ in line).rstrip() for line in self._lines()]
        return "\n".join([self.title, *lines])

    def __rich__(self) -> Text:
        from rich.text import Text  # slow to import, and seldom needed

        text = Text(no_wrap=True).append(self.title, style="bold")
        for line in self._lines():
            text.append("\n")
            for part, style in line:
                text.append(part, style=style)
        return text

    def _lines(self) -> Iterator[list[Piece]]:
        """The panels, as many side by side as there is room for."""
        panels = list(_panels(_Drawing.of(self)))
        row: list[_Panel] = []
        for panel in [*panels, None]:
            if row and (panel is None or _together([*row, panel]) > self.width):
                yield []
                yield from _beside(row)
                row = []
            if panel is not None:
                row.append(panel)


def mesh_picture(
    mesh: AnyMesh,
    show: Literal["id", "process", "coords"] = "id",
    *,
    width: int = 100,
    limit: int | None = None,
) -> MeshPicture:
    """A picture of the device grid of `mesh`, to be printed: plainly, or with `rich.print`.

    The last axis runs to the right, the one before it down, and each position of the others, and
    each slice, is a panel.  `show` says what stands for a device: its 'id', its 'process', or its
    'coords' in the machine.  An abstract mesh shows positions.  `width` is in characters.  Of a dim
    longer than `limit` (16; on more than 256 devices 8) its first and last positions are shown.

    Raises `LayoutError` for what is no mesh, or for another `show`.

    >>> from shardflax.partitioning import make_mesh
    >>> print(mesh_picture(make_mesh("dcn(data=2) ici(fsdp=2,tensor=2)")))
    data=2 (DCN), fsdp=2 (ICI), tensor=2 (ICI): 8 cpu devices in 2 slices
    <BLANKLINE>
    slice 0: data=0    slice 1: data=1
              tensor             tensor
              0  1               0  1
            ┌─────             ┌─────
    fsdp  0 │ 0  1     fsdp  0 │ 4  5
          1 │ 2  3           1 │ 6  7
    """
    check_mesh(mesh)
    if show not in _LABELS:
        raise LayoutError(f"mesh_picture: show={show!r}: {did_you_mean(str(show), _LABELS)}")
    return MeshPicture(mesh, show, width, limit)


def _about(kind: AxisType, across: tuple[int, int] | None) -> str:
    """What is said of an axis after its size: its type, if not auto, and its network."""
    said = [] if kind == AxisType.Auto else [kind.name.lower()]
    if across is not None:
        parts, inside = across
        both = f"DCN {parts} x ICI {inside}"
        said.append("ICI" if parts == 1 else "DCN" if inside == 1 else both)
    return f" ({', '.join(said)})" if said else ""


def _devices(mesh: AnyMesh) -> str:
    """How many devices of what kind, in how many slices and processes."""
    if not isinstance(mesh, Mesh):
        return f"{mesh.size} devices, none of them chosen"
    kinds = {device.device_kind for device in mesh.devices.flat}
    text = f"{mesh.size} {' and '.join(sorted(kinds))} device{'s' * (mesh.size > 1)}"
    slices = len(np.unique(slices_of(mesh)))
    processes = len({device.process_index for device in mesh.devices.flat})
    text += f" in {slices} slices" if slices > 1 else ""
    return text + (f", {processes} processes" if processes > 1 else "")


@dataclass(frozen=True)
class _Drawing:
    """Cells and styles in the shape of the mesh, the slices, and how long a dim is shown."""

    axes: tuple[str, ...]
    cells: Any
    styles: Any
    slices: Any
    limit: int

    @classmethod
    def of(cls, picture: MeshPicture) -> _Drawing:
        mesh = picture.mesh
        shape = tuple(mesh.axis_sizes)
        slices = slices_of(mesh) if isinstance(mesh, Mesh) else np.zeros(shape, int)
        cells = np.arange(mesh.size).reshape(shape).astype(str)
        groups = slices
        if isinstance(mesh, Mesh):
            cells = np.vectorize(_LABELS[picture.show], otypes=[object])(mesh.devices)
            if len(np.unique(slices)) == 1:
                groups = np.vectorize(_process, otypes=[int])(mesh.devices)
        colours = np.array(_STYLES)[groups % len(_STYLES)]
        if len(np.unique(groups)) == 1:
            colours = np.full(shape, "")
        limit = picture.limit or (16 if mesh.size <= 256 else 8)
        return cls(tuple(mesh.axis_names), cells, colours, slices, limit)


def _process(device: Any) -> int:
    return device.process_index


def _id(device: Any) -> str:
    return str(device.id)


def _process_text(device: Any) -> str:
    return str(device.process_index)


def _coords(device: Any) -> str:
    """The place of a device in its machine; its id where it has none."""
    coords = getattr(device, "coords", None)
    return str(device.id) if coords is None else ",".join(map(str, coords))


_LABELS = {"id": _id, "process": _process_text, "coords": _coords}


@dataclass(frozen=True)
class _Panel:
    """A table of cells under a title."""

    title: str
    lines: tuple[tuple[Piece, ...], ...]

    @property
    def width(self) -> int:
        return max(len(self.title), *(sum(len(text) for text, _ in line) for line in self.lines))


def _together(panels: Sequence[_Panel]) -> int:
    """The width of panels side by side."""
    return sum(panel.width for panel in panels) + 3 * (len(panels) - 1)


def _beside(panels: Sequence[_Panel]) -> Iterator[list[Piece]]:
    """The lines of panels side by side."""
    columns = [(((p.title, "bold"),), *p.lines) if p.title else p.lines for p in panels]
    for parts in itertools.zip_longest(*columns, fillvalue=()):
        line: list[Piece] = []
        for panel, part in zip(panels, parts, strict=True):
            used = sum(len(text) for text, _ in part)
            line += [*part, (" " * (panel.width - used + 3), "")]
        yield line


def _panels(drawing: _Drawing) -> Iterator[_Panel]:
    """One panel for each slice and each position of all axes but two; the first and the last."""
    boxes = list(_boxes(drawing))
    places = [(one, place) for one, box in boxes for place in _places(box)]
    for index in _shown(len(places), drawing.limit):
        if index is None:
            left = f"{_MORE} {len(places) - _HEAD - _TAIL} more"
            yield _Panel("", ((("", ""),), ((left, "dim"),)))
        else:
            one, place = places[index]
            yield _panel(drawing, place, f"slice {one}" if len(boxes) > 1 else "")


def _boxes(drawing: _Drawing) -> Iterator[tuple[int, Box]]:
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


def _panel(drawing: _Drawing, place: Box, head: str) -> _Panel:
    """The panel of a place that is long along two axes at most."""
    shape = drawing.slices.shape
    fixed = ", ".join(
        f"{axis}={positions[0]}"
        for axis, positions, size in zip(drawing.axes, place, shape, strict=True)
        if len(positions) == 1 and size > 1
    )
    return _Panel(": ".join(part for part in (head, fixed) if part), tuple(_table(drawing, place)))


def _table(drawing: _Drawing, place: Box) -> Iterator[tuple[Piece, ...]]:
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


def _cell(drawing: _Drawing, place: Box, at: dict[Index, Index]) -> Piece:
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
