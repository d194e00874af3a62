"""What a layout made of each rule: who used it, which axes it took, which it gave up and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shardflax.partitioning.layout import Layout, check_layout
from shardflax.partitioning.rules import AxisRules

__all__ = ["RuleUsage", "UsedRule", "rule_usage"]

_NOT_THERE = ("not in the mesh", "size 1")


@dataclass(frozen=True)
class UsedRule:
    """One rule of a layout: how many `leaves` have its name, and what became of its axes.

    `constraints` says that no leaf has the name, but a constraint that the init met.
    `taken` counts axes, `given_up` axes and reasons, over the leaves and on axes above size 1.
    `own` is false for a rule that a preset brought.

    >>> UsedRule("embed", ("fsdp",), 2, False, (("fsdp", 2),), ()).is_used
    True
    """

    name: str
    axes: tuple[str, ...]
    leaves: int
    constraints: bool
    taken: tuple[tuple[str, int], ...]
    given_up: tuple[tuple[str, str, int], ...]
    own: bool = True

    @property
    def is_used(self) -> bool:
        """Whether anything has the name."""
        return self.leaves > 0 or self.constraints


@dataclass(frozen=True)
class RuleUsage:
    """The rules of a layout, those in use first, and the axes that nothing used.

    >>> print(RuleUsage((UsedRule("norm", (), 3, True, (), ()),), ("stage",)))
    rule  axes  leaves  taken  given up
    norm  -     3       -      -
    axes that nothing used: stage
    """

    rules: tuple[UsedRule, ...]
    unused_axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("rule", "axes", "leaves", "taken", "given up")]
        rows += [_cells(rule) for rule in self.rules if rule.is_used]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        idle = [rule for rule in self.rules if not rule.is_used]
        said = (
            ("rules that nothing used", [rule.name for rule in idle if rule.own]),
            ("rules of presets that nothing used", [rule.name for rule in idle if not rule.own]),
            ("axes that nothing used", self.unused_axes),
        )
        lines += [f"{what}: {', '.join(items)}" for what, items in said if items]
        return "\n".join(lines)


def rule_usage(layout: Layout) -> RuleUsage:
    """What `layout` made of each of its strict rules; of plain pairs nothing is known.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import LogicallyPartitioned, make_mesh
    >>> state = {"w": LogicallyPartitioned(jnp.ones((8, 15)), ("embed", "mlp"))}
    >>> rules = AxisRules({"embed": "fsdp", "mlp": "tensor?", "heads": "tensor"})
    >>> print(rule_usage(Layout(state, make_mesh("fsdp=4,tensor=2"), rules)))
    rule   axes     leaves  taken   given up
    embed  fsdp     1       fsdp 1  -
    mlp    tensor?  1       -       tensor 1: does not divide
    rules that nothing used: heads
    axes that nothing used: tensor
    """
    check_layout(layout)
    rules = layout.rules if isinstance(layout.rules, AxisRules) else AxisRules({})
    leaves = Counter[str]()
    taken: dict[str, Counter[str]] = {}
    given_up: dict[str, Counter[tuple[str, str]]] = {}
    for leaf in layout.leaves:
        leaves.update(name for name in leaf.names or () if isinstance(name, str))
        for dim in leaf.dims:
            if isinstance(dim.name, str):
                taken.setdefault(dim.name, Counter()).update(dim.taken)
                said = ((axis, _reason(why)) for axis, why in dim.given_up if why not in _NOT_THERE)
                given_up.setdefault(dim.name, Counter()).update(said)
    unused = {*layout.unused_rules, *layout.unused_defaults}
    every = tuple(
        UsedRule(
            name,
            axes,
            leaves[name],
            name not in unused and not leaves[name],
            tuple(taken.get(name, Counter()).items()),
            tuple((*said, count) for said, count in given_up.get(name, Counter()).items()),
            name in rules.own,
        )
        for name, axes in rules
    )
    return RuleUsage(every, layout.unused_axes)


def _reason(why: str) -> str:
    """Why an axis was given up, without the sizes of the one array."""
    if "does not divide" in why:
        return "does not divide"
    return "taken by another dim" if why.startswith("taken") else why


def _cells(rule: UsedRule) -> tuple[str, ...]:
    taken = ", ".join(f"{axis} {count}" for axis, count in rule.taken)
    gone = ", ".join(f"{axis} {count}: {why}" for axis, why, count in rule.given_up)
    leaves = str(rule.leaves) if rule.leaves else "constraints"
    return rule.name, " ".join(rule.axes) or "-", leaves, taken or "-", gone or "-"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    return "  ".join(cells).rstrip()
