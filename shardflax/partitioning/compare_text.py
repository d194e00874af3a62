"""Comparisons of presets as text, and as a rich table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shardflax.partitioning.table import bytes_text

if TYPE_CHECKING:
    from rich.table import Table

    from shardflax.partitioning.compare import Comparison, PresetCost

__all__ = ["comparison_table", "comparison_text"]

_HELD = ("params", "rest", "batch", "held")
_SENT = ("gathered", "summed", "across")
_MOST = 4  # presets in a row; on a mesh of one axis many are alike
_SAID = """Bytes on each device. gathered and summed: sent in a train step for weights and \
gradients, counted from the layout; what activations send is not in it, nor what they hold."""


def comparison_text(comparison: Comparison, width: int = 100) -> str:
    """A plain table, one line for all presets of one meaning, and below it what is wrong.

    >>> from shardflax.partitioning.compare import Comparison, PresetCost
    >>> row = PresetCost(("dp", "zero1"), "data=8", 4096, 0, 64, 0, 4096, 0)
    >>> print(comparison_text(Comparison((row,))))
    presets    mesh     params  rest  batch     held  gathered   summed
    ---------  ------  -------  ----  -----  -------  --------  -------
    dp, zero1  data=8  4.0 KiB   0 B   64 B  4.1 KiB       0 B  4.0 KiB
    <BLANKLINE>
    Bytes on each device. ...
    """
    columns = _columns(comparison)
    rows = [columns, *(_cells(row, columns) for row in comparison.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [comparison.title] if comparison.title else []
    lines += [_line(row, widths, columns) for row in rows]
    lines.insert(len(lines) - len(rows) + 1, "  ".join("-" * width for width in widths))
    lines += ["", *textwrap.wrap(_SAID, width)]
    for note in _notes(comparison):
        lines += textwrap.wrap(note, width, subsequent_indent="  ")
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> Table:
    """The same in colours: red is wrong, dim leaves an axis idle.

    >>> from shardflax.partitioning.compare import Comparison
    >>> comparison_table(Comparison(())).row_count
    0
    """
    from rich import box  # slow to import, and seldom needed
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=comparison.title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption_justify="left",
    )
    numbers = [name for name in _columns(comparison) if name in (*_HELD, *_SENT)]
    table.add_column("presets")  # and the mesh below them: a terminal may be narrow
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.rows:
        where = "; ".join((row.mesh, *_remarks(row)))
        style = "red" if row.problems else "dim" if row.idle else None
        cell = Text(_titles(row)).append(f"\n{where}", "dim")
        table.add_row(cell, *map(Text, _cells(row, numbers)), style=style)
    table.caption = Text("\n".join([_SAID, *_notes(comparison)]))
    return table


def _columns(comparison: Comparison) -> tuple[str, ...]:
    """Those that some row has something to say in."""
    rows = comparison.rows
    across = any(row.across for row in rows)
    notes = any(row.idle or row.problems for row in rows)
    sent = _SENT if across else _SENT[:-1]
    return ("presets", "mesh", *_HELD, *sent, *(("notes",) if notes else ()))


def _cells(row: PresetCost, columns: Sequence[str]) -> tuple[str, ...]:
    texts = {"presets": _titles(row), "mesh": row.mesh, "notes": "; ".join(_remarks(row))}
    return tuple(
        texts[name] if name in texts else bytes_text(getattr(row, name)) for name in columns
    )


def _titles(row: PresetCost) -> str:
    more = len(row.presets) - _MOST
    rest = f" and {more} more" if more > 0 else ""
    return f"{', '.join(row.presets[:_MOST])}{rest}"


def _remarks(row: PresetCost) -> Iterator[str]:
    if row.problems:
        yield f"{len(row.problems)} problem{'s'[: len(row.problems) > 1]}"
    if row.idle:
        yield f"{', '.join(row.idle)} idle{'s'[: len(row.idle) == 1]}"


def _line(row: Sequence[str], widths: Sequence[int], columns: Sequence[str]) -> str:
    """One row: numbers to the right."""
    cells = [
        f"{cell:>{width}}" if column in (*_HELD, *_SENT) else f"{cell:<{width}}"
        for cell, width, column in zip(row, widths, columns, strict=True)
    ]
    return "  ".join(cells).rstrip()


def _notes(comparison: Comparison) -> Iterator[str]:
    """The first problem of each row that has some; of several rows once."""
    said: dict[str, list[str]] = {}
    for row in comparison.rows:
        for problem in row.problems[:1]:
            said.setdefault(str(problem), []).append(f"{_titles(row)} on {row.mesh}")
    for problem, where in said.items():
        yield f"{'; '.join(where)}: {problem}"
