"""A checkpoint as a tree: plain text, or rich on a terminal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from shardflax.ckpt import CheckpointInfo, LeafInfo
from shardflax.partitioning.table import bytes_text

__all__ = ["Row", "heading", "plain", "rich_table", "rows_of"]

_NUMBERED = re.compile(r"(.*?)(\d+)")
_WIDEST = 48


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: a folder of the tree, or a leaf; `depth` is its indentation.

    >>> Row(1, "kernel", "float32[2]", "", 8, False).name
    'kernel'
    """

    depth: int
    name: str
    form: str
    layout: str
    nbytes: int
    folder: bool

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The columns as text."""
        return "  " * self.depth + self.name, self.form, self.layout, bytes_text(self.nbytes)


Node = dict[str, Any]


def rows_of(leaves: Iterable[LeafInfo], every: bool = False) -> list[Row]:
    """The lines of a tree; numbered siblings that are alike are one, unless `every` is asked for.

    >>> from shardflax.ckpt.leaves import LeafSpec
    >>> leaves = [LeafInfo((f"layers_{i}", "w"), LeafSpec("array", (2,), "int8")) for i in range(9)]
    >>> [row.name for row in rows_of(leaves)]
    ['layers_0 ... layers_8 (9 alike)/w']
    """
    tree: Node = {}
    for leaf in leaves:
        node = tree
        for part in leaf.path[:-1]:
            node = node.setdefault(f"{part}/", {})
        node[leaf.path[-1]] = leaf
    return list(_rows(tree, 0, every))


def _rows(tree: Node, depth: int, every: bool) -> Iterator[Row]:
    for names in [[name] for name in tree] if every else _alike(tree):
        first = tree[names[0]]
        total = sum(_nbytes(tree[name]) for name in names)
        shown = [name.removesuffix("/") for name in names]
        name = shown[0] if len(names) == 1 else f"{shown[0]} ... {shown[-1]} ({len(names)} alike)"
        while isinstance(first, dict) and len(first) == 1:  # an only child needs no line
            ((inner, first),) = first.items()
            name = f"{name}/{inner.removesuffix('/')}"
        if isinstance(first, LeafInfo):
            yield Row(depth, name, _form(first), first.layout, total, False)
        else:
            yield Row(depth, name, "", "", total, True)
            yield from _rows(first, depth + 1, every)


def _form(leaf: LeafInfo) -> str:
    """What a leaf is; of a Python number or string, its value."""
    if leaf.spec.kind != "python":
        return str(leaf.spec)
    text = repr(leaf.spec.value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _nbytes(node: Any) -> int:
    if isinstance(node, LeafInfo):
        return node.spec.nbytes
    return sum(map(_nbytes, node.values()))


def _alike(tree: Node) -> list[list[str]]:
    """The names in groups: those that differ in a number only, with equal trees below."""
    groups: dict[Any, list[str]] = {}
    for name, node in tree.items():
        match = _NUMBERED.fullmatch(name.removesuffix("/"))
        numbered = match is not None and not isinstance(node, LeafInfo)
        stem: Any = (match[1], _shape(node)) if match and numbered else name
        groups.setdefault(stem, []).append(name)
    return [
        part
        for names in groups.values()
        for part in ([names] if len(names) > 2 else [[name] for name in names])
    ]


def _shape(node: Any) -> Any:
    """What two trees that are alike have in common."""
    if isinstance(node, LeafInfo):
        return _form(node), node.layout
    return tuple((name, _shape(inner)) for name, inner in node.items())


def heading(info: CheckpointInfo) -> str:
    """What a checkpoint is, in a line or two.

    >>> from pathlib import Path
    >>> print(heading(CheckpointInfo(Path("x"), "orbax", 3, (), (), {}, (), {}, {}, 0, 0.0, 9)))
    x (orbax, step 3): 0 leaves, 0 B (9 B on disk)
    """
    step = "" if info.step is None else f", step {info.step}"
    count = f"{len(info.leaves):,} leaves, {bytes_text(info.nbytes)}"
    lines = [
        f"{info.path} ({info.format}{step}): {count} ({bytes_text(info.bytes_on_disk)} on disk)"
    ]
    if info.written:
        lines.append(f"written {info.written}")
    if info.metrics:
        lines.append("metrics: " + ", ".join(f"{k}={v:.6g}" for k, v in info.metrics.items()))
    if info.temporary:
        lines.append("temporary: it goes when a later step is committed")
    if info.extras:
        lines.append(f"extras: {', '.join(info.extras)}")
    if any(info.process_extras):
        names = dict.fromkeys(n for x in info.process_extras for n in _names(x))
        lines.append(f"extras of each process: {', '.join(names)}")
    return "\n".join(lines)


def _names(extras: Any) -> list[str]:
    return list(extras) if isinstance(extras, dict) else [str(extras)]


def plain(rows: list[Row]) -> str:
    """The lines in columns.

    >>> print(plain([Row(0, "a", "", "", 8, True), Row(1, "w", "int8[8]", "embed:fsdp", 8, False)]))
    a                           8 B
      w  int8[8]  embed:fsdp    8 B
    """
    cells = [row.cells for row in rows]
    if not cells:
        return ""
    widths = [min(_WIDEST, max(map(len, column))) for column in zip(*cells, strict=True)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}".rstrip()
        for a, b, c, d in cells
    )


def rich_table(rows: list[Row]) -> Table:
    """The lines in colours.

    >>> rich_table([Row(0, "a", "int8[8]", "", 8, False)]).row_count
    1
    """
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for style, right in (("", False), ("cyan", False), ("green", False), ("dim", True)):
        table.add_column(style=style, justify="right" if right else "left", overflow="fold")
    for row in rows:
        name, *rest = row.cells
        table.add_row(Text(name, style="bold" if row.folder else ""), *map(Text, rest))
    return table
