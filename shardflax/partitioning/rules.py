"""`AxisRules`: strict rules from logical names to mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast, overload

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import (
    InvalidRuleError,
    OverrideError,
    UnknownNameError,
    kind_of,
)
from shardflax.partitioning.overrides import Overrides, call_paths, find_names, freeze, merge
from shardflax.partitioning.roles import Roles, roles_of
from shardflax.partitioning.rule_entries import RuleAxes, RuleTable, table_of
from shardflax.partitioning.rule_sets import (
    FOLLOWS,
    Table,
    check_changed,
    check_set,
    overlaid,
    united,
)
from shardflax.partitioning.rule_table import rules_table, rules_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["AxisRules", "LogicalRules", "RuleAxes", "as_standard"]

LogicalRules = Sequence[tuple[str, Any]]


@dataclass(frozen=True, init=False)
class AxisRules(Sequence[tuple[str, tuple[str, ...]]]):
    """Strict rules: which mesh axes each logical name takes.

    `rules` maps a name to its axes, as one string (`"fsdp fsdp2? expert"`), a sequence of axes,
    or None (replicated, said).  An axis with `?` may yield: if another dim of the array has taken
    it, or if it does not divide the dim.  Without `?` either is an error.  Rules are values:
    hashable, never changed, combined with `|` (the right side wins) and `+` (the axes of both).
    They are accepted wherever a sequence of pairs is, and are strict there.

    `rules` says how parameters are stored.  `compute`, `optimizer` and `eval` say what differs
    where one computes, in the optimizer's state, and in evaluation: a dict changes some rules,
    `AxisRules` replace all.  Unsaid, compute and optimizer are as stored, and eval as compute.
    Parameters and optimizer leaves of fewer than `min_size` elements are not sharded.  `own` are
    the names whose rules somebody wrote here: not those that a preset brought.

    Raises `InvalidRuleError` for what is no table of rules, a name with two rules, an axis twice in
    a rule, bad syntax, a set that lacks a name, or a dict that changes a name without a rule.

    >>> rules = AxisRules({"batch": "data fsdp", "embed": "fsdp", "mlp": "fsdp? tensor"})
    >>> rules["mlp"]
    ('fsdp?', 'tensor')
    >>> (rules | {"embed": None})["embed"]
    ()
    >>> AxisRules({"embed": None}, optimizer={"embed": "data"}).optimizer["embed"]
    ('data',)
    """

    entries: tuple[tuple[str, tuple[str, ...]], ...]
    sets: tuple[tuple[str, AxisRules], ...]
    param_overrides: Overrides
    activation_overrides: Overrides
    min_size: int
    title: str = field(compare=False, repr=False)
    own: frozenset[str] = field(compare=False, repr=False)
    _table: Table = field(compare=False, repr=False)
    _hash: int = field(compare=False, repr=False)
    _stored: AxisRules | None = field(compare=False, repr=False)

    def __init__(
        self,
        rules: RuleTable,
        *,
        compute: RuleTable | None = None,
        optimizer: RuleTable | None = None,
        eval: RuleTable | None = None,
        min_size: int = 0,
        title: str = "rules",
    ) -> None:
        table = table_of(rules, title)
        said = {"compute": compute, "optimizer": optimizer, "eval": eval}
        if not isinstance(rules, AxisRules):
            sets, own = _sets_of(table, said, title)
            self._fill(table, sets, (), (), min_size, title, own.union(table))
            return
        known = {kind: one._table for kind, one in rules.sets}
        sets, own = _sets_of(table, said, title, known)
        overrides, outputs = rules.param_overrides, rules.activation_overrides
        least = min_size or rules.min_size
        self._fill(table, sets, overrides, outputs, least, title, own | rules.own)

    def _fill(
        self,
        table: Table,
        sets: Mapping[str, Table],
        params: Overrides,
        activations: Overrides,
        min_size: int,
        title: str,
        own: frozenset[str],
    ) -> None:
        """Sets the fields; sets that say what they follow are left out, so that equal is equal."""
        if not isinstance(cast(Any, min_size), Integral) or min_size < 0:
            raise InvalidRuleError(f"{title}: min_size is a number of elements, not {min_size!r}.")
        entries, every, kept = tuple(table.items()), {"stored": table}, list[tuple[str, Any]]()
        for kind, before in FOLLOWS.items():
            every[kind] = sets.get(kind, every[before])
            if tuple(every[kind].items()) != tuple(every[before].items()):
                check_set(kind, every[kind], table, title)
                about = params, activations, min_size, f"{title}: {kind}", own
                kept.append((kind, _make(every[kind], {}, *about)))
        stored = _make(table, {}, params, activations, min_size, title, own) if kept else None
        for name, value in (
            ("entries", entries),
            ("sets", tuple(kept)),
            ("param_overrides", params),
            ("activation_overrides", activations),
            ("min_size", min_size),
            ("title", title),
            ("own", own),
            ("_table", dict(table)),
            ("_hash", hash((entries, tuple(kept), params, activations, min_size))),
            ("_stored", stored),
        ):
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        # The hash of a string is another one in each process: nothing of it may be pickled.
        sets = {kind: dict(rules._table) for kind, rules in self.sets}
        overrides = self.param_overrides, self.activation_overrides
        about = self.min_size, self.title, tuple(sorted(self.own))
        return _make, (dict(self._table), sets, *overrides, *about)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    @overload
    def __getitem__(self, index: int) -> tuple[str, tuple[str, ...]]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[str, tuple[str, ...]], ...]: ...
    @overload
    def __getitem__(self, index: str) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice | str) -> Any:
        """The axes of a name; raises `UnknownNameError` (did-you-mean) where no rule knows it."""
        if not isinstance(index, str):
            return self.entries[index]
        if index not in self._table:
            hint = did_you_mean(index, self._table)
            raise UnknownNameError(
                f"{self.title}: no rule for the name {index!r}: {hint} `get` gives None for a name "
                f"without a rule."
            )
        return self._table[index]

    def get(self, name: str) -> tuple[str, ...] | None:
        """The axes of `name`, or None where no rule knows it."""
        return self._table.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The logical names that have a rule, in order."""
        return tuple(self._table)

    @property
    def axes(self) -> frozenset[str]:
        """Every mesh axis that some rule of some set names, without `?`."""
        every = (self, *(rules for _, rules in self.sets))
        return frozenset(
            a.rstrip("?") for rules in every for _, axes in rules.entries for a in axes
        )

    @property
    def stored(self) -> AxisRules:
        """The rules for parameters as they are stored: these, without other sets."""
        return self._stored or self

    @property
    def compute(self) -> AxisRules:
        """The rules for activations, and for weights where they are used."""
        return self._set("compute")

    @property
    def optimizer(self) -> AxisRules:
        """The rules for the optimizer's state."""
        return self._set("optimizer")

    @property
    def eval(self) -> AxisRules:
        """The rules for evaluation: `use(mesh, rules, "eval")`."""
        return self._set("eval")

    def _set(self, kind: str) -> AxisRules:
        for name, rules in self.sets:
            if name == kind:
                return rules
        return self.stored if FOLLOWS[kind] == "stored" else self._set(FOLLOWS[kind])

    @property
    def roles(self) -> Roles:
        """Which axes are those of the batch, the context, experts and stages, in compute."""
        return roles_of(self.compute._table)

    def with_sets(
        self,
        *,
        compute: RuleTable | None = None,
        optimizer: RuleTable | None = None,
        eval: RuleTable | None = None,
    ) -> AxisRules:
        """These rules with other sets: a dict changes some rules of a set, `AxisRules` replace it.

        Raises `InvalidRuleError` for `AxisRules` that lack a name, and for a dict that changes one
        without a rule.

        >>> AxisRules({"embed": "fsdp"}).with_sets(compute={"embed": None}).compute["embed"]
        ()
        """
        said = {"compute": compute, "optimizer": optimizer, "eval": eval}
        known = {kind: rules._table for kind, rules in self.sets}
        sets, own = _sets_of(self._table, said, self.title, known)
        return self._changed(sets=sets, own=self.own | own)

    def with_overrides(
        self,
        *,
        params: Mapping[str, tuple[Any, ...]] | None = None,
        activations: Mapping[str, Any] | None = None,
    ) -> AxisRules:
        r"""These rules with names by path, for modules that one did not write.

        Keys are regular expressions that match a whole path: of a parameter below the root
        (`encoder/layers_3/kernel`), whose optimizer state follows; or of a module, or one of its
        methods, (`encoder/layers_3`, `encoder/layers_3/decode`), whose output is constrained.
        Names are tuples; for a method that returns a tuple, a list with one tuple, or None, for
        each element; for one that returns a dict, a dict of tuples.

        Raises `OverrideError` for a bad expression, or for names that are no tuple of names; and
        later, where they are used, for an expression that matches nothing, for two that match
        and differ, and for names of the wrong rank.

        >>> rules = AxisRules({"embed": "fsdp", "mlp": "tensor"})
        >>> rules = rules.with_overrides(params={r"block_\d+/up/kernel": ("embed", "mlp")})
        >>> rules.param_names("block_3/up/kernel")
        ('embed', 'mlp')
        """
        new_params = freeze(params or {}, "params")
        new_activations = freeze(activations or {}, "activations", lists=True)
        return self._changed(
            params=merge(self.param_overrides, new_params),
            activations=merge(self.activation_overrides, new_activations),
        )

    def with_min_size(self, min_size: int) -> AxisRules:
        """These rules with another threshold: smaller parameters and moments are not sharded.

        >>> AxisRules({"embed": "fsdp"}).with_min_size(2**16).min_size
        65536
        """
        return self._changed(min_size=min_size)

    def param_names(self, path: str) -> tuple[Any, ...] | None:
        """The names that an override gives to the parameter at `path`, or None.

        Raises `OverrideError` if two overrides match and differ.

        >>> AxisRules({}).param_names("Dense_0/kernel") is None
        True
        """
        return find_names(self.param_overrides, (path,), "params") if self.param_overrides else None

    def activation_names(self, path: str) -> Any:
        """The names that an override gives to what the method at `path` returns, or None.

        `path` is `encoder/layers_3/__call__`; an override of `encoder/layers_3` means this method
        too.  Raises `OverrideError` if two overrides match and differ.

        >>> rules = AxisRules({}).with_overrides(activations={"mlp": ("batch", "act_embed")})
        >>> rules.activation_names("mlp/__call__"), rules.activation_names("mlp/decode")
        (('batch', 'act_embed'), None)
        """
        if not self.activation_overrides:
            return None
        return find_names(self.activation_overrides, call_paths(path), "activations")

    def __or__(self, other: Mapping[str, RuleAxes] | AxisRules) -> AxisRules:
        """These rules with those of `other` in the place of their own, in every set."""
        more = other if isinstance(other, AxisRules) else AxisRules(other, title="overrides")
        own = (self.own - set(more._table)) | more.own
        return self._combined(more, overlaid, "|", more.min_size or self.min_size, own)

    def __add__(self, other: AxisRules) -> AxisRules:
        """These rules and those of `other`: names have the axes of both, in every set."""
        if not isinstance(cast(Any, other), AxisRules):
            raise InvalidRuleError(
                f"{self.title} + {kind_of(other)}: rules are added to rules. Write | to change "
                f"some, as in rules | {{'embed': 'fsdp'}}, or + AxisRules(...)."
            )
        for own, others in (
            (self.param_overrides, other.param_overrides),
            (self.activation_overrides, other.activation_overrides),
        ):
            for pattern, names in own:
                if dict(others).get(pattern, names) != names:
                    raise OverrideError(
                        f"{self.title} + {other.title}: {pattern!r} has the names {names!r} in "
                        f"one and {dict(others)[pattern]!r} in the other."
                    )
        least = max(self.min_size, other.min_size)
        return self._combined(other, united, "+", least, self.own | other.own)

    def _combined(
        self,
        other: AxisRules,
        how: Callable[[Table, Table], Table],
        sign: str,
        min_size: int,
        own: frozenset[str],
    ) -> AxisRules:
        kinds = {kind for rules in (self, other) for kind, _ in rules.sets}
        sets = {kind: how(self._set(kind)._table, other._set(kind)._table) for kind in kinds}
        return _make(
            how(self._table, other._table),
            sets,
            merge(self.param_overrides, other.param_overrides),
            merge(self.activation_overrides, other.activation_overrides),
            min_size,
            f"{self.title} {sign} {other.title}",
            own,
        )

    def _changed(self, **changes: Any) -> AxisRules:
        """These rules with some of their parts replaced."""
        parts: dict[str, Any] = {
            "sets": {kind: rules._table for kind, rules in self.sets},
            "params": self.param_overrides,
            "activations": self.activation_overrides,
            "min_size": self.min_size,
            "title": self.title,
            "own": self.own,
        }
        return _make(self._table, **(parts | changes))

    def with_rules(self, **rules: RuleAxes) -> AxisRules:
        """These rules, changed for names that have a rule already.

        Raises `InvalidRuleError` (did-you-mean) for another name; `|` adds names.

        >>> AxisRules({"embed": "fsdp"}).with_rules(embed=None)["embed"]
        ()
        """
        for name in rules:
            if name not in self._table:
                hint = did_you_mean(name, self._table)
                raise InvalidRuleError(
                    f"{self.title}: no rule for {name!r} to change: {hint} To add a name, write "
                    f"rules | {{{name!r}: ...}}."
                )
        return self | rules

    def __str__(self) -> str:
        return rules_text(self)

    def __rich__(self) -> RichTable:
        return rules_table(self)


def _make(
    table: Table,
    sets: Mapping[str, Table],
    params: Overrides,
    activations: Overrides,
    min_size: int,
    title: str,
    own: Iterable[str],
) -> AxisRules:
    """Rules of parts that are known to be good."""
    rules = object.__new__(AxisRules)
    about = min_size, title, frozenset(own)
    rules._fill(table, sets, params, activations, *about)  # pyright: ignore[reportPrivateUsage]
    return rules


def as_standard(rules: AxisRules) -> AxisRules:
    """The same rules as nobody's own: what a layout leaves unused of them is not worth a word.

    >>> as_standard(AxisRules({"embed": "fsdp"})).own
    frozenset()
    """
    return rules._changed(own=())  # pyright: ignore[reportPrivateUsage]


def _sets_of(
    stored: Table,
    said: Mapping[str, RuleTable | None],
    title: str,
    known: Mapping[str, Table] | None = None,
) -> tuple[dict[str, Table], frozenset[str]]:
    """The tables of the sets that are said, over those `known` already; whose rules are new."""
    every, own = {"stored": stored}, set[str]()
    for kind, before in FOLLOWS.items():
        every[kind] = (known or {}).get(kind, every[before])
        rules = said[kind]
        if isinstance(rules, AxisRules):
            every[kind] = dict(rules.entries)
            own |= rules.own
        elif rules is not None:
            changed = table_of(rules, f"{title}: {kind}")
            own |= changed.keys()
            check_changed(kind, changed, every[kind], title)
            every[kind] = overlaid(every[kind], changed)
    there = [kind for kind in FOLLOWS if said[kind] is not None or kind in (known or {})]
    return {kind: every[kind] for kind in there}, frozenset(own)
