"""What is done to tables of rules: overlaying, adding, and sets that follow one another.

A train state has four layouts: parameters as they are stored, weights and activations as they are
computed with, the optimizer's state, and evaluation.  What is not said follows: compute and
optimizer are as stored, eval is as compute.  The optimizer follows the *stored* layout and not
that of compute: its state is as large as the parameters and lies beside them, and where compute
has fewer axes (weights gathered once and kept) it must not be gathered with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.default_table import DEFAULT_TABLE
from shardflax.partitioning.errors import InvalidRuleError
from shardflax.partitioning.vocabulary import KNOWN_AXES

__all__ = ["FOLLOWS", "Table", "check_changed", "check_set", "overlaid", "united"]

Table = Mapping[str, tuple[str, ...]]

FOLLOWS = {"compute": "stored", "optimizer": "stored", "eval": "compute"}


def overlaid(first: Table, second: Table) -> dict[str, tuple[str, ...]]:
    """Both tables; where both have a name, the second's rule.

    >>> overlaid({"a": ("x",), "b": ()}, {"a": ("y",)})
    {'a': ('y',), 'b': ()}
    """
    return {**first, **second}


def united(first: Table, second: Table) -> dict[str, tuple[str, ...]]:
    """Both tables; where both have a name, all axes of the two rules.

    Axes come in the order of the default rules.  An axis that must not yield in one of the two
    must not yield.

    >>> united({"mlp": ("tensor",)}, {"mlp": ("fsdp2?",), "norm": ()})
    {'mlp': ('fsdp2?', 'tensor'), 'norm': ()}
    """
    both = {name: _united(name, first[name], second[name]) for name in first if name in second}
    return {**first, **second, **both}


def _united(name: str, first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """The axes of two rules for `name`, in order."""
    firm = {axis for axis in (*first, *second) if not axis.endswith("?")}
    one = [axis.rstrip("?") for axis in first]
    two = [axis.rstrip("?") for axis in second]
    if set(two) <= set(one):
        order = one
    elif set(one) <= set(two):
        order = two
    else:
        places = _places(name)
        order = sorted(dict.fromkeys(one + two), key=lambda axis: (places.get(axis, 99), axis))
    return tuple(axis if axis in firm else f"{axis}?" for axis in order)


def _places(name: str) -> dict[str, int]:
    """Where an axis stands in a rule for `name`."""
    own = (DEFAULT_TABLE.get(name) or "").replace("?", "").split()
    return {axis: place for place, axis in enumerate(dict.fromkeys((*own, *KNOWN_AXES)))}


def check_set(kind: str, table: Table, stored: Table, title: str) -> None:
    """Raises `InvalidRuleError` unless a set knows every name that the stored rules know.

    >>> check_set("optimizer", {"embed": ("data",)}, {"embed": ()}, "mine")
    """
    missing = [name for name in stored if name not in table]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InvalidRuleError(
            f"{title}: the rules for {kind} have none for {', '.join(missing[:3])}{more}. Give "
            f"{kind}= a dict to change some rules of the set before, or rules for every name."
        )


def check_changed(kind: str, changed: Table, before: Table, title: str) -> None:
    """Raises `InvalidRuleError` if a set changes a rule that is not there: it may be a slip.

    >>> check_changed("compute", {"embed": ()}, {"embed": ("data",)}, "mine")
    """
    for name in changed:
        if name not in before:
            raise InvalidRuleError(
                f"{title}: {kind}= changes the rule for {name!r}, and there is none: "
                f"{did_you_mean(name, before)} Give the name a rule for stored parameters first "
                f"({{{name!r}: None}})."
            )
