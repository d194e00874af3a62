"""A picture of a mesh: which device is where, in which slice, and what each axis runs over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jax.sharding import AxisType, Mesh

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import LayoutError
from shardflax.partitioning.given import check_mesh
from shardflax.partitioning.picture_panels import Drawing, Panel, Piece, beside, panels, together
from shardflax.partitioning.scope import AnyMesh, axis_kinds
from shardflax.partitioning.slices import networks, slices_of

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["MeshPicture", "mesh_picture"]

_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "red")


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
        row: list[Panel] = []
        for panel in [*panels(_drawing(self)), None]:
            if row and (panel is None or together([*row, panel]) > self.width):
                yield []
                yield from beside(row)
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


def _drawing(picture: MeshPicture) -> Drawing:
    """What is drawn of a mesh."""
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
    return Drawing(tuple(mesh.axis_names), cells, colours, slices, limit)
