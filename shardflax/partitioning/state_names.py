"""Where the names of each leaf of a state come from, and which rules are for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardflax.partitioning.boxes import LogicallyPartitioned, Partitioned
from shardflax.partitioning.derive import Parameter, derive, find_parameter
from shardflax.partitioning.errors import OverrideError, Problem
from shardflax.partitioning.overrides import Overrides, find_names, unmatched
from shardflax.partitioning.paths import Path, path_text
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.state_leaves import StateLeaf

__all__ = ["FEW", "NamedLeaf", "StateNames"]

FEW = 32
"""So many numbers may be replicated without anybody having said so, where no parameter is near."""

_BY_PATH = "said by path"


@dataclass(frozen=True)
class NamedLeaf:
    """The names of a leaf (None: nothing names it), whose they are, and the rules for them.

    `rules` None says that the names are mesh axes; `rule_set` is which of the sets of strict rules
    they are.  Leaves of fewer than `min_size` elements are not sharded.

    >>> NamedLeaf(("embed",), "its box").rule_set
    'stored'
    """

    names: tuple[Any, ...] | None
    origin: str
    rules: LogicalRules | None = None
    rule_set: str = "stored"
    min_size: int = 0
    problems: tuple[Problem, ...] = ()


class StateNames:
    """The names of every leaf of a state.

    What is said for a leaf by path comes first: `said`, for any leaf, and the overrides of strict
    rules, for parameters.  Then its box, then the parameter that it belongs to.

    >>> import jax
    >>> leaf = StateLeaf(("w",), None, jax.ShapeDtypeStruct((8,), "float32"))
    >>> StateNames([leaf], (), [], (("w", ("embed",)),)).of(leaf).names
    ('embed',)
    """

    def __init__(
        self, leaves: Sequence[StateLeaf], root: Path, rules: LogicalRules, said: Overrides = ()
    ) -> None:
        self._root, self._rules, self._said = root, rules, said
        strict = isinstance(rules, AxisRules)
        self._overrides: Overrides = rules.param_overrides if strict else ()
        self._sets: dict[tuple[int, str], tuple[AxisRules, int]] = {}
        self._of_parameters = {
            leaf.path: self._of_parameter(leaf) for leaf in leaves if self._holds(leaf.path)
        }
        self._parameters = self._find_parameters(leaves)
        self.problems: tuple[Problem, ...] = self._unmatched(leaves)

    def of(self, leaf: StateLeaf) -> NamedLeaf:
        """The names of one leaf."""
        parameter = self._of_parameters.get(leaf.path)
        owner = None if parameter else find_parameter(leaf.path, self._parameters)
        kind = "stored" if parameter else "compute" if owner is None else "optimizer"
        if self._said and (found := self._by_path(self._said, leaf.path, "the state", kind)):
            return found
        if parameter:
            return parameter
        if owner and self._of_parameters[owner.path].problems:
            return NamedLeaf(None, "nothing names its parameter")  # which says why
        shape, box = tuple(leaf.value.shape), leaf.box
        if isinstance(box, Partitioned) and not (owner and owner.copied_to(box, len(shape))):
            return self._named(tuple(box.names), "its box", self._rules_of(box), kind)
        if owner is not None:
            found = derive(leaf.path, shape, owner)
            if found.names is not None:
                return self._named(found.names, found.origin, owner.rules, "optimizer")
            other = self._by_path(self._overrides, leaf.path, "params", kind)
            return NamedLeaf(None, found.origin) if other is None else other
        return (
            self._by_path(self._overrides, leaf.path, "params", kind)
            or _number(shape, FEW)
            or NamedLeaf(None, "nothing names it")
        )

    def _of_parameter(self, leaf: StateLeaf) -> NamedLeaf:
        """The names of a parameter."""
        below = leaf.path[len(self._root) :]
        if self._overrides and (found := self._by_path(self._overrides, below, "params", "stored")):
            return found
        if isinstance(leaf.box, Partitioned):
            rules = self._rules_of(leaf.box)
            return self._named(tuple(leaf.box.names), "its box", rules, "stored")
        return _number(leaf.value.shape, 1) or NamedLeaf(None, "nothing names it")

    def _by_path(self, overrides: Overrides, path: Path, what: str, kind: str) -> NamedLeaf | None:
        """The names that one of `overrides` gives to a path, for the rules of the set `kind`."""
        try:
            names = find_names(overrides, (path_text(path),), what) if overrides else None
        except OverrideError as error:
            return NamedLeaf(None, _BY_PATH, problems=(Problem(OverrideError, str(error)),))
        if names is None:
            return None
        return self._named(names, _BY_PATH, self._rules, kind)

    def _named(
        self, names: tuple[Any, ...], origin: str, rules: LogicalRules | None, kind: str
    ) -> NamedLeaf:
        """A leaf under the rules of one set; what is computed with has no threshold."""
        if not isinstance(rules, AxisRules):
            return NamedLeaf(names, origin, rules, kind)
        known = self._sets.get((id(rules), kind))
        if known is None:
            known = getattr(rules, kind), 0 if kind == "compute" else rules.min_size
            self._sets[id(rules), kind] = known
        return NamedLeaf(names, origin, known[0], kind, known[1])

    def _holds(self, path: Path) -> bool:
        """True for the path of a parameter."""
        return path[: len(self._root)] == self._root

    def _rules_of(self, box: Partitioned) -> LogicalRules | None:
        """The rules for the names of a box, or None if they are mesh axes."""
        if not isinstance(box, LogicallyPartitioned):
            return None
        return self._rules if box.rules is None else box.rules

    def _find_parameters(self, leaves: Iterable[StateLeaf]) -> dict[Path, Parameter]:
        """The named parameters by their path below the root.

        Optimizers see the parameters without what some states wrap them in: a collection
        `params` beside others, or the two copies of `optax.LookaheadParams`.
        """
        found: dict[Path, Parameter] = {}
        for leaf in leaves:
            named = self._of_parameters.get(leaf.path)
            if named is not None and (named.names is not None or named.problems):
                by_box = named.origin != _BY_PATH and isinstance(leaf.box, Partitioned)
                rules = self._rules_of(leaf.box) if by_box else self._rules
                below, shape = leaf.path[len(self._root) :], tuple(leaf.value.shape)
                said = named.names or ()
                found[below] = Parameter(leaf.path, shape, said, rules, leaf.box)
        for path, parameter in list(found.items()):
            if len(path) > 1 and path[0] in _WRAPPERS:
                found.setdefault(path[1:], parameter)
        return found

    def _unmatched(self, leaves: Iterable[StateLeaf]) -> tuple[Problem, ...]:
        """A problem for each expression that matches no path."""
        if not self._said and not self._overrides:
            return ()
        every = [leaf.path for leaf in leaves]
        below = [path[len(self._root) :] if self._holds(path) else path for path in every]
        return (
            *unmatched(self._said, map(path_text, every), "the state"),
            *unmatched(self._overrides, map(path_text, below), "params"),
        )


_WRAPPERS = ("params", "fast", "slow")


def _number(shape: Sequence[int], most: int) -> NamedLeaf | None:
    """A leaf of at most so many numbers, which need no names."""
    size = math.prod(shape)
    if size > most:
        return None
    return NamedLeaf((None,) * len(shape), "a single number" if size <= 1 else "a few numbers")
