"""Layouts as text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from shardflax.partitioning.layout import Layout

__all__ = ["bytes_text", "layout_table", "layout_text"]


def bytes_text(count: int) -> str:
    """A number of bytes, readable.

    >>> bytes_text(512), bytes_text(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def layout_table(layout: Layout) -> Table:
    """A layout as a rich table: path, shape, dtype, names, spec, bytes per device."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    table = Table(title=f"Layout on {mesh}", title_justify="left")
    for column in ("path", "shape", "dtype", "names", "spec"):
        table.add_column(column, overflow="fold")
    table.add_column("bytes / device", justify="right")
    for leaf in layout.leaves:
        names = "(unnamed)" if leaf.names is None else _tuple(leaf.names)
        cells = (leaf.where, _tuple(leaf.shape), str(leaf.dtype), names, _tuple(leaf.spec))
        style = "red" if leaf.problems else "yellow" if leaf.names is None else None
        table.add_row(*map(Text, cells), bytes_text(leaf.bytes_per_device), style=style)
    return table


def layout_notes(layout: Layout) -> list[str]:
    """The lines under the table: the sum, and what nothing named or used."""
    notes = [f"{bytes_text(layout.bytes_per_device)} a device, {len(layout.leaves)} leaves."]
    said = (
        ("replicated, for nothing names them", layout.unnamed),
        ("rules that nothing used", layout.unused_rules),
        ("axes that nothing used", layout.unused_axes),
    )
    notes += [f"{what}: {', '.join(items)}" for what, items in said if items]
    return notes + [f"problem: {problem}" for problem in layout.problems]


def layout_text(layout: Layout, width: int = 140) -> str:
    """The table and its notes as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(layout_table(layout))
    for note in layout_notes(layout):
        console.print(Text(note))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _tuple(items: Any) -> str:
    """A tuple without quotes."""
    parts = [_tuple(i) if isinstance(i, tuple) else "-" if i is None else str(i) for i in items]
    return f"({', '.join(parts)})"
