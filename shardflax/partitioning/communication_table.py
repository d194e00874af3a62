"""The communication of a program as text, as a rich table, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from shardflax.partitioning.communication import Collective
from shardflax.partitioning.table import bytes_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["communication_json", "communication_table", "communication_text"]

_COLUMNS = ("collective", "axes", "network", "module", "source", "pass", "times", "bytes", "in all")
_NUMBERS = 3


def communication_text(found: Iterable[Collective]) -> str:
    """The collectives as a table of plain text: the most bytes first, equal ones in one row.

    `times` is per call of the program, `bytes` what a device sends or gets each time, `in all`
    their product; the sums of each network stand below.

    >>> where = ("layers/up", "model.py:4")
    >>> gather = Collective("all-gather", ("fsdp",), "ICI", 2048, 3, True, *where)
    >>> print(communication_text([gather, gather]))
    collective  axes  network  module     source      pass     times    bytes    in all
    ----------  ----  -------  ---------  ----------  -------  -----  -------  --------
    all-gather  fsdp  ICI      layers/up  model.py:4  forward      6  2.0 KiB  12.0 KiB
    ICI: 12.0 KiB in 6 collectives.
    """
    found = _merged(found)
    rows = [_COLUMNS, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *_sums(found)])


def communication_table(found: Iterable[Collective]) -> Table:
    """The same as a rich table, DCN in yellow.

    >>> communication_table([]).row_count
    0
    """
    from rich.table import Table  # slow to import, and seldom needed
    from rich.text import Text

    found = _merged(found)
    table = Table(title="Communication", title_justify="left", caption_justify="left")
    for i, column in enumerate(_COLUMNS):
        number = i >= len(_COLUMNS) - _NUMBERS
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for one in found:
        table.add_row(*map(Text, _cells(one)), style="yellow" if one.network == "DCN" else None)
    table.caption = Text("\n".join(_sums(found)))
    return table


def communication_json(found: Iterable[Collective]) -> str:
    """The same as JSON: a list of objects with the fields of `Collective`.

    >>> text = communication_json([Collective("all-reduce", ("data",), "DCN", 4, 1)])
    >>> json.loads(text)[0]["axes"], json.loads(text)[0]["total"]
    (['data'], 4)
    """
    return json.dumps([{**asdict(one), "total": one.total} for one in _merged(found)], indent=1)


def _merged(found: Iterable[Collective]) -> list[Collective]:
    """One for all that differ in nothing but how often; the most bytes first."""
    merged: dict[Collective, int] = {}
    for one in found:
        key = replace(one, count=1)
        merged[key] = merged.get(key, 0) + one.count
    every = [replace(one, count=count) for one, count in merged.items()]
    return sorted(every, key=lambda one: (-one.total, one.what, one.path))


def _cells(one: Collective) -> tuple[str, ...]:
    direction = "backward" if one.backward else "forward"
    times = str(one.count) if one.exact else f"{one.count} a step"
    where = (one.kind, ",".join(one.axes), one.network, one.path or "-", one.source or "-")
    return (*where, direction, times, bytes_text(one.bytes), bytes_text(one.total))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    texts = len(row) - _NUMBERS
    cells = [
        f"{cell:<{width}}" if i < texts else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells)


def _sums(found: Sequence[Collective]) -> list[str]:
    """A line for each network."""
    if not found:
        return ["Nothing is sent."]
    lines: list[str] = []
    for network in ("ICI", "DCN"):
        every = [one for one in found if one.network == network]
        if every:
            size = bytes_text(sum(one.total for one in every))
            more = "" if all(one.exact for one in every) else ", more in loops of unknown length"
            lines.append(f"{network}: {size} in {sum(o.count for o in every)} collectives{more}.")
    return lines
