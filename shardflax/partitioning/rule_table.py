"""Rules as text, and as a rich table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from shardflax.partitioning.rules import AxisRules

__all__ = ["rules_table", "rules_text"]


def rules_text(rules: AxisRules) -> str:
    """A line for each rule, then what other sets change, then names by path and the threshold.

    >>> from shardflax.partitioning import AxisRules
    >>> print(rules_text(AxisRules({"embed": "fsdp", "norm": None}, optimizer={"norm": "fsdp?"})))
    rules
    embed  fsdp
    norm   -
    in the optimizer's state:
    norm   fsdp?
    """
    width = max((len(name) for name in rules.names), default=0)
    lines = [rules.title, *(f"{name:<{width}}  {_text(axes)}" for name, axes in rules)]
    for kind, before, own in _sets(rules):
        lines.append(f"{_WHERE[kind]}:")
        lines += [f"{n:<{width}}  {_text(axes)}" for n, axes in own if axes != before.get(n)]
    return "\n".join(lines + _notes(rules))


def rules_table(rules: AxisRules) -> Table:
    """The same for a terminal: a row for each name, a column for each set that differs."""
    from rich.table import Table  # slow to import, and seldom needed
    from rich.text import Text

    table = Table(title=rules.title, title_justify="left", caption_justify="left")
    others = list(_sets(rules))
    for column in ("name", "stored" if others else "axes", *(kind for kind, _, _ in others)):
        table.add_column(column)
    known = dict.fromkeys(
        name for one in (rules, *(own for *_, own in others)) for name in one.names
    )
    for name in known:
        cells = [_text(rules.get(name))]
        for _, before, own in others:
            axes = own.get(name)
            cells.append("" if axes == before.get(name) else _text(axes))
        table.add_row(*map(Text, (name, *cells)))
    table.caption = Text("\n".join(_notes(rules)))
    return table


_WHERE = {
    "compute": "in compute",
    "optimizer": "in the optimizer's state",
    "eval": "in evaluation",
}


def _sets(rules: AxisRules) -> list[tuple[str, AxisRules, AxisRules]]:
    """The sets that differ: their kind, the set that they follow, their rules."""
    before = {"eval": rules.compute}
    return [(kind, before.get(kind, rules.stored), own) for kind, own in rules.sets]


def _text(axes: tuple[str, ...] | None) -> str:
    return " ".join(axes or ()) or "-"


def _notes(rules: AxisRules) -> list[str]:
    """What stands under the rules."""
    notes = [f"names of the parameters {p}: {_names(n)}" for p, n in rules.param_overrides]
    notes += [f"names of what {p} returns: {_names(n)}" for p, n in rules.activation_overrides]
    if rules.min_size:
        notes.append(f"parameters below {rules.min_size:,} elements are not sharded")
    return notes


def _names(names: object) -> str:
    return str(names).replace("'", "")
