"""Layouts as text, and as rich tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardflax.partitioning.path_cell import PathCell

if TYPE_CHECKING:
    from rich.table import Table

    from shardflax.partitioning.layout import Layout
    from shardflax.partitioning.leaf import Leaf

__all__ = ["bytes_text", "layout_table", "layout_text"]

_COLUMNS = ("path", "shape", "dtype", "names", "spec", "bytes / device")


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
    """A layout as a rich table: red where something is wrong, yellow where nothing says names."""
    from rich.table import Table  # slow to import, and seldom needed
    from rich.text import Text

    table = Table(title=_title(layout), title_justify="left", caption_justify="left")
    for column in _COLUMNS[:-1]:
        table.add_column(column, overflow="fold")
    table.add_column(_COLUMNS[-1], justify="right")
    for leaf in layout.leaves:
        style = "red" if leaf.problems else "yellow" if leaf.names is None else None
        path, *cells = _cells(leaf)
        table.add_row(PathCell(path), *map(Text, cells), style=style)
    table.caption = Text("\n".join(_notes(layout)))
    return table


def layout_text(layout: Layout, width: int = 100) -> str:
    """The same as plain text, quickly (a rich table of 2,000 rows takes seconds)."""
    rows = [_COLUMNS, *map(_cells, layout.leaves)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_title(layout), *(_line(row, widths) for row in rows)]
    lines.insert(2, "  ".join("-" * width for width in widths))
    for note in _notes(layout):
        lines += textwrap.wrap(note, width, subsequent_indent="  ")
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """One row: all columns to the left but the last, a number."""
    *cells, number = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    return "  ".join([*cells, f"{number.strip():>{widths[-1]}}"])


def _title(layout: Layout) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    return f"Layout on {mesh}"


def _cells(leaf: Leaf) -> tuple[str, ...]:
    """The columns of one leaf."""
    names = "(unnamed)" if leaf.names is None else _tuple(leaf.names)
    size = bytes_text(leaf.bytes_per_device)
    return leaf.where, _tuple(leaf.shape), str(leaf.dtype), names, _tuple(leaf.spec), size


def _notes(layout: Layout) -> list[str]:
    """The lines under the table: the sum, and what nothing named or used."""
    notes = [f"{bytes_text(layout.bytes_per_device)} a device, {len(layout.leaves)} leaves."]
    said = (
        ("replicated, for nothing names them", layout.unnamed),
        ("rules that nothing used", layout.unused_rules),
        ("axes that nothing used", layout.unused_axes),
    )
    notes += [f"{what}: {', '.join(items)}" for what, items in said if items]
    return notes + [f"problem: {problem}" for problem in layout.problems]


def _tuple(items: Any) -> str:
    """A tuple without quotes."""
    parts = [_tuple(i) if isinstance(i, tuple) else "-" if i is None else str(i) for i in items]
    return f"({', '.join(parts)})"
