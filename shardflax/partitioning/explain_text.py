"""Explanations as text, and for rich."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shardflax.partitioning.explained import LeafExplained
from shardflax.partitioning.path_cell import PathCell
from shardflax.partitioning.table import bytes_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from shardflax.partitioning.explanation import Explanation

__all__ = ["explanation_rich", "explanation_text", "problem_lines"]

_COLUMNS = ("path", "array", "dims", "bytes / device", "notes")
_RIGHT = 3  # the column of numbers
_BAR = 40


def explanation_text(explanation: Explanation, width: int = 100) -> str:
    """A plain table, one line a leaf, and below it memory, what is unused, and problems.

    >>> from shardflax.partitioning import explain, preset
    >>> import jax.numpy as jnp
    >>> print(explanation_text(explain({"step": jnp.int32(0)}, "fsdp=8", preset("dp"))))
    on fsdp=8 under dp
    path  array    dims  bytes / device  notes
    ----  -------  ----  --------------  ---------------
    step  int32[]                   4 B  a single number
    ...
    """
    rows = [_COLUMNS, *map(_cells, explanation.leaves)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [explanation.heading, *(_line(row, widths) for row in rows)]
    lines.insert(2, "  ".join("-" * width for width in widths))
    lines += ["", *_memory(explanation)]
    for _, note in _notes(explanation):
        lines += textwrap.wrap(note, width, subsequent_indent="  ")
    return "\n".join(lines)


def problem_lines(explanation: Explanation) -> list[str]:
    """What is wrong, a line each; what is wrong with a parameter is said once for its followers.

    >>> from shardflax.partitioning import explain, preset, LogicallyPartitioned
    >>> import jax.numpy as jnp
    >>> w = {"w": LogicallyPartitioned(jnp.ones(6), ("embed",))}
    >>> state = {"params": w, "mu": {"w": jnp.ones(6)}, "nu": {"w": jnp.ones(6)}}
    >>> for line in problem_lines(explain(state, "fsdp=4", preset("fsdp"))):
    ...     print(line.partition("Make")[0], "...", line.rpartition(".")[2])
    params/w, shape (6,): dim 0 'embed' of size 6 ... is not divisible by 4
    (fsdp=4; rule 'embed': 'fsdp'). ... (and 2 leaves as it)
    """
    followers, wrong = explanation.followers, explanation.problems
    broken = {problem.where.partition(", shape ")[0] for problem in wrong}
    heads = [followers.get(p.where.partition(", shape ")[0], "") for p in wrong]
    counts: Counter[str] = Counter(head for head in heads if head in broken)
    lines: list[str] = []
    for problem, head in zip(wrong, heads, strict=True):
        count = counts.pop(problem.where.partition(", shape ")[0], 0)
        more = f" (and {count} {'leaf' if count == 1 else 'leaves'} as it)" if count else ""
        if head not in broken:
            lines.append(f"{problem}{more}")
    return lines


def explanation_rich(explanation: Explanation) -> Group:
    """The same in colours: red is wrong, yellow is replicated without anybody having said so.

    Notes stand below the dims, and paths are broken at slashes: a terminal may be narrow.

    >>> from shardflax.partitioning import explain, preset
    >>> import jax.numpy as jnp
    >>> group = explanation_rich(explain({"step": jnp.int32(0)}, "fsdp=8", preset("dp")))
    >>> type(group).__name__
    'Group'
    """
    from rich import box  # slow to import, and seldom needed
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, column in enumerate(_COLUMNS[:-1]):
        justify = "right" if i == _RIGHT else "left"
        table.add_column(column, overflow="fold", justify=justify)
    for leaf, count in _shown(explanation):
        path, array, _, size, notes = _cells(leaf)
        if count:
            following = f"{count} {'leaf' if count == 1 else 'leaves'}, each as its parameter"
            table.add_row(PathCell(path, "dim"), "", Text(following, "dim"), Text(size, "dim"))
            continue
        style = "red" if leaf.problems else "" if leaf.named else "yellow"
        dims = _coloured(leaf)
        if notes:
            dims.append("\n" if dims else "").append(notes, style or "dim")
        table.add_row(PathCell(path, style), Text(array, "dim"), dims, size)
    notes = [Text(note, style) for style, note in _notes(explanation)]
    heading = Text(explanation.heading, "bold")
    return Group(heading, table, *map(Text, _memory(explanation)), *notes)


def _shown(explanation: Explanation) -> Iterator[tuple[LeafExplained, int]]:
    """The leaves; those that follow their parameters as one row, with their number."""
    followers = explanation.followers

    def prefix(leaf: LeafExplained) -> str:
        owner = followers.get(leaf.path, "")
        return leaf.path.removesuffix(owner.partition("/")[2]) if owner else ""

    for where, group in itertools.groupby(explanation.leaves, prefix):
        leaves = list(group)
        if not where or len(leaves) == 1:
            yield from ((leaf, 0) for leaf in leaves)
            continue
        total = sum(leaf.bytes_per_device for leaf in leaves)
        yield dataclasses.replace(leaves[0], path=f"{where}…", bytes_per_device=total), len(leaves)


def _coloured(leaf: LeafExplained) -> Text:
    """The dims, with their axes in colour and commas between."""
    from rich.text import Text

    text = Text()
    for i, dim in enumerate(leaf.dims):
        text.append(", " if i else "")
        text.append(dim.name or "-", "" if dim.name else "dim")
        if dim.taken:
            text.append("→", "dim").append("+".join(dim.taken), "cyan")
    return text


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """One row: all columns to the left but the one of numbers."""
    cells = [
        f"{cell:>{width}}" if i == _RIGHT else f"{cell:<{width}}"
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _cells(leaf: LeafExplained) -> tuple[str, ...]:
    dims = ", ".join(map(str, leaf.dims)) if leaf.named else "(unnamed)"
    size = bytes_text(leaf.bytes_per_device)
    return leaf.path, leaf.array, dims, size, "; ".join(_remarks(leaf))


def _remarks(leaf: LeafExplained) -> Iterator[str]:
    """What a reader may not expect: problems, names from elsewhere, axes given up."""
    if leaf.problems:
        yield f"{len(leaf.problems)} problem{'s'[: len(leaf.problems) > 1]}, see below"
    if leaf.origin != "its box":
        yield leaf.origin
    if leaf.rule_set != "stored" and leaf.origin != "as its parameter":
        yield f"rules for {leaf.rule_set}"
    for dim in leaf.dims:
        for axis, why in dim.losses:
            yield f"{dim.name} not {axis}: {why}"


def _memory(explanation: Explanation) -> list[str]:
    """The memory of a device as bars, one for each part of the state."""
    memory, total = explanation.memory, explanation.bytes_per_device
    whole = sum(leaf.bytes for leaf in explanation.leaves)
    top, width = max(memory.values(), default=0) or 1, max(map(len, memory), default=0)
    lines = [
        f"  {name:<{width}}  {bytes_text(size):>10}  {'█' * round(_BAR * size / top)}".rstrip()
        for name, size in memory.items()
        if len(memory) > 1
    ]
    said = f"{bytes_text(total)} on each of {explanation.mesh.size} devices"
    count = len(explanation.leaves)
    leaves = f"{count} {'leaf' if count == 1 else 'leaves'}"
    return [f"{said}: {leaves}, {bytes_text(whole)} in all.", *lines]


def _notes(explanation: Explanation) -> Iterator[tuple[str, str]]:
    """(style, text) of what nothing named or used, and of problems."""
    layout = explanation.layout
    said = (
        ("yellow", "replicated, for nothing names them", layout.unnamed),
        ("dim", "rules that nothing used", layout.unused_rules),
        ("yellow", "axes that nothing used", layout.unused_axes),
    )
    for style, what, items in said:
        if items:
            yield style, f"{what}: {', '.join(items)}"
    for line in problem_lines(explanation):
        yield "red", f"problem: {line}"
