"""Rules of other codebases as `AxisRules`, with a report of what became of them.

Their lists are Linen's: tried in order, all axes of a rule or none.  Here a name has one rule, and
each axis counts by itself; what cannot be said so is an error and not a guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.default_table import DEFAULT_TABLE
from shardflax.partitioning.errors import InvalidRuleError, kind_of
from shardflax.partitioning.rules import AxisRules, RuleAxes
from shardflax.partitioning.vocabulary import AXIS_ALIASES, KNOWN_AXES, known_name

__all__ = ["ImportedRules", "from_levanter", "from_maxtext", "from_t5x"]

Pairs = Iterable[Sequence[Any]] | Mapping[str, Any]
Table = dict[str, tuple[str, ...]]
_MOST_YIELDING = 8  # axes of one rule; all sets of them are looked at


@dataclass(frozen=True)
class ImportedRules:
    """Rules from elsewhere, and what was done to them; printed, it is a report.

    `renamed` and `renamed_axes` are pairs of words, old and new.  `yielding` are the names of
    which several rules became one with `?`.  `own` are names outside of the default vocabulary
    and `own_axes` axes that no preset has: both are kept as they are.  `dropped` are axes that
    were left out, for the mesh lacks them, and `missing` default names without a rule: layers
    that bring them along want one (`preset("dp") | imported.rules`).

    >>> print(from_t5x([("kv", None), ("mlp", "model"), ("relpos_buckets", None)]))
    t5x rules: 3 names
    renamed: kv -> head_dim
    renamed axes: model -> tensor
    names of its own: relpos_buckets
    default names without a rule: batch, vocab_batch, moe_batch and 31 more
    """

    rules: AxisRules
    renamed: tuple[tuple[str, str], ...] = ()
    renamed_axes: tuple[tuple[str, str], ...] = ()
    yielding: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    own_axes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the default vocabulary that have no rule."""
        return tuple(name for name in DEFAULT_TABLE if name not in self.rules)

    def __str__(self) -> str:
        missing = self.missing
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        said = (
            ("renamed", ", ".join(f"{old} -> {new}" for old, new in self.renamed)),
            ("renamed axes", ", ".join(f"{old} -> {new}" for old, new in self.renamed_axes)),
            ("several rules as one with '?'", ", ".join(self.yielding)),
            ("names of its own", ", ".join(self.own)),
            ("axes of its own", ", ".join(self.own_axes)),
            ("axes left out", ", ".join(self.dropped)),
            ("default names without a rule", ", ".join(missing[:3]) + more),
        )
        title = f"{self.rules.title}: {len(self.rules)} names"
        return "\n".join([title, *(f"{what}: {text}" for what, text in said if text)])


def from_maxtext(
    rules: Pairs,
    *,
    axes: Iterable[str] | None = None,
    choose: Mapping[str, RuleAxes] | None = None,
) -> ImportedRules:
    """MaxText's `logical_axis_rules` (pairs of a name and a list of axes) as strict rules.

    `rules` may also be the whole configuration, as a dict.  `axes` are those of the mesh: others
    that the presets do not know are left out.  Several rules for a name become one if each has some
    of the axes of the one before, or if they say all combinations: axes that not all of them have
    may yield (`?`).  `choose` says the rule for a name where that does not hold.

    Raises `InvalidRuleError` for a name with rules that cannot become one, for no pairs, and for a
    name in `choose` that has no rule.

    >>> listed = [["mlp", ["fsdp_transpose", "tensor"]], ["embed", ["fsdp", "fsdp_transpose"]]]
    >>> from_maxtext([*listed, ["embed", ["fsdp"]]]).rules["embed"]
    ('fsdp', 'fsdp2?')
    """
    return _Import("maxtext rules", AXIS_ALIASES, axes, choose or {}).run(rules)


def from_t5x(
    rules: Pairs,
    *,
    axes: Iterable[str] | None = None,
    choose: Mapping[str, RuleAxes] | None = None,
) -> ImportedRules:
    """T5X's logical axis rules (pairs of a name and an axis, axes or None) as strict rules.

    See `from_maxtext` for the arguments.  The standard rules for 2-D activations have two rules
    for `embed`, `model` or else `data`; strict rules tell activations (`act_embed`) from weights:
    `choose={"embed": "data"}`.

    Raises `InvalidRuleError` for a name with rules that cannot become one, and for no pairs.

    >>> from_t5x([("batch", "data"), ("joined_kv", "model")]).rules["joined_kv"]
    ('tensor',)
    """
    return _Import("t5x rules", AXIS_ALIASES, axes, choose or {}).run(rules)


_LEVANTER_AXES = {"replica_dcn": "data", "replica": "data", "data": "fsdp", "model": "tensor"}
_LEVANTER_KEYS = (
    "axis_resources",
    "shared_mapping",
    "compute_mapping",
    "parameter_axis_resources",
    "param_mapping",
    "batch_axis",
    "fsdp_axis",
    "tensor_parallel_axes",
)


def from_levanter(
    trainer: Mapping[str, Any], *, axes: Iterable[str] | None = None
) -> ImportedRules:
    """The axis mappings of Levanter's trainer configuration as strict rules with a compute set.

    Read are `batch_axis`, `fsdp_axis` and `tensor_parallel_axes`, `axis_resources` and
    `parameter_axis_resources`, and the `shared_mapping`, `compute_mapping` and `param_mapping` of
    `mesh`; other keys are passed over.  Levanter shards parameters over its axis `data`, which
    is `fsdp` here; `replica` and `replica_dcn` are `data`.

    Raises `InvalidRuleError` if none of those keys is there.

    >>> rules = from_levanter({"fsdp_axis": "embed", "tensor_parallel_axes": ["mlp"]}).rules
    >>> rules["embed"], rules.compute["embed"], rules.compute["mlp"]
    (('fsdp',), (), ('tensor',))
    """
    if not isinstance(cast(Any, trainer), Mapping):
        raise InvalidRuleError(
            f"levanter rules: {kind_of(trainer)} is no configuration. Give the trainer's as a "
            f"dict: that of a dataclass is dataclasses.asdict(trainer)."
        )
    said: dict[str, Any] = {**trainer, **_mapping(trainer, "mesh")}
    if not any(key in said for key in _LEVANTER_KEYS):
        raise InvalidRuleError(
            f"levanter rules: none of {', '.join(_LEVANTER_KEYS)} in {sorted(trainer)}. Give the "
            f"configuration of the trainer, or of its mesh, as a dict."
        )
    shared = {**_mapping(said, "axis_resources"), **_mapping(said, "shared_mapping")}
    shared.update(dict.fromkeys(_names(said.get("tensor_parallel_axes")), "model"))
    batch = dict.fromkeys(_names(said.get("batch_axis")), ("replica_dcn", "replica", "data"))
    compute = {**batch, **shared, **_mapping(said, "compute_mapping")}
    fsdp = dict.fromkeys(_names(said.get("fsdp_axis")), "data")
    weights = {**_mapping(said, "parameter_axis_resources"), **_mapping(said, "param_mapping")}
    stored = {**compute, **fsdp, **weights}
    found = _Import("levanter rules", _LEVANTER_AXES, axes, {})
    result = found.run(stored.items())
    table = _Import("levanter rules", _LEVANTER_AXES, axes, {}).run(compute.items()).rules
    used = {name: table.get(name) or () for name in result.rules.names}
    return ImportedRules(result.rules.with_sets(compute=used), *found.report())


def _mapping(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found: Any = said.get(key)
    if found and not isinstance(found, Mapping):
        raise InvalidRuleError(f"levanter rules: {key!r} is {kind_of(found)}, and no dict.")
    return cast(Mapping[str, Any], found or {})


def _names(names: Any) -> tuple[str, ...]:
    """One name, several, or None."""
    return (names,) if isinstance(names, str) else tuple(names or ())


class _Import:
    """One import: what it has renamed, merged and dropped so far."""

    def __init__(
        self,
        title: str,
        aliases: Mapping[str, str],
        axes: Iterable[str] | None,
        choose: Mapping[str, RuleAxes],
    ) -> None:
        self.title, self.aliases, self.choose = title, aliases, choose
        self.mesh = None if axes is None else {*axes, *KNOWN_AXES}
        self.names: dict[str, str] = {}
        self.axes: dict[str, str] = {}
        self.yielding: list[str] = []
        self.own: list[str] = []
        self.dropped: dict[str, None] = {}

    def run(self, pairs: Pairs) -> ImportedRules:
        """Reads all pairs, in their order."""
        if not isinstance(cast(Any, pairs), Iterable):
            raise InvalidRuleError(f"{self.title}: pairs of a name and axes, not {pairs!r}.")
        alternatives: dict[str, list[tuple[str, ...]]] = {}
        if isinstance(pairs, Mapping):
            found = cast(Mapping[str, Any], pairs)
            pairs = found.get("logical_axis_rules", found.items())  # of a whole configuration
        for name, axes in map(self.pair, cast("Iterable[Any]", pairs)):
            alternatives.setdefault(name, []).append(axes)
        for name in self.choose:
            if name not in alternatives:
                hint = did_you_mean(name, alternatives)
                raise InvalidRuleError(f"{self.title}: choose={{{name!r}: ...}}: no rule: {hint}")
        chosen = {name: self.rule(name, found) for name, found in alternatives.items()}
        table: Table = {}
        for name, axes in chosen.items():
            known = known_name(name)
            if known != name and (known in chosen or table.get(known, axes) != axes):
                known = name  # taken by another rule: this one keeps its own word
            table[known] = axes
            if known != name:
                self.names[name] = known
            elif known not in DEFAULT_TABLE:
                self.own.append(name)
        return ImportedRules(AxisRules(table, title=self.title), *self.report())

    def report(self) -> tuple[Any, ...]:
        """The fields of `ImportedRules` after its rules."""
        renamed = tuple((old, new) for old, new in self.axes.items() if old != new)
        own = tuple(a for a in dict.fromkeys(self.axes.values()) if a not in KNOWN_AXES)
        names = tuple(self.names.items()), renamed, tuple(self.yielding), tuple(self.own)
        return (*names, own, tuple(self.dropped))

    def pair(self, pair: Any) -> tuple[str, tuple[str, ...]]:
        """A name and its axes, in the words of this library."""
        parts = cast(Sequence[Any], pair if isinstance(pair, Sequence) else ())
        if isinstance(pair, str) or len(parts) != 2 or not isinstance(parts[0], str):
            raise InvalidRuleError(f"{self.title}: a pair of a name and axes, not {pair!r}.")
        name, axes = parts
        if axes is not None and not isinstance(axes, Sequence):
            raise InvalidRuleError(f"{self.title}: {name!r} takes {axes!r}, and no names of axes.")
        kept = (self.axis(axis) for axis in _names(axes))
        return name, tuple(dict.fromkeys(axis for axis in kept if axis))

    def axis(self, axis: str) -> str:
        """The word of the presets for an axis; empty for one that is left out."""
        known = self.aliases.get(axis, axis)
        if self.mesh is not None and known not in self.mesh:
            self.dropped[axis] = None
            return ""
        self.axes[axis] = known
        return known

    def rule(self, name: str, alternatives: list[tuple[str, ...]]) -> tuple[str, ...]:
        """One rule for all alternatives of a name, of which the first that is free would win."""
        if name in self.choose:
            return AxisRules({name: self.choose[name]})[name]
        tried = _that_are_tried(alternatives)
        if not _is_chain(tried) and not _takes_what_is_free(tried):
            raise InvalidRuleError(self.exclusive(name, tried))
        if len(tried) > 1:
            self.yielding.append(name)
        firm = set(tried[0]).intersection(*tried)
        return tuple(axis if axis in firm else f"{axis}?" for axis in tried[0])

    def exclusive(self, name: str, alternatives: Sequence[tuple[str, ...]]) -> str:
        """The text for alternatives that no `?` can say."""
        said = ", or else ".join(" ".join(axes) or "nothing" for axes in alternatives)
        return (
            f"{self.title}: {name!r} takes {said}. Strict rules have one rule a name, of which "
            f"single axes may yield: give the dims that differ names of their own, or say which "
            f"rule holds, choose={{{name!r}: {' '.join(alternatives[-1])!r}}}."
        )


def _that_are_tried(alternatives: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The alternatives of which one can win: none that has all axes of one before it.

    Where that one was not free, neither is this; and what is empty always fits.
    """
    tried: list[tuple[str, ...]] = []
    for axes in alternatives:
        if not any(set(before) <= set(axes) for before in tried):
            tried.append(axes)
    return tried


def _is_chain(tried: Sequence[tuple[str, ...]]) -> bool:
    """Each has some of the axes of the one before."""
    return all(set(axes) < set(before) for before, axes in itertools.pairwise(tried))


def _takes_what_is_free(tried: Sequence[tuple[str, ...]]) -> bool:
    """Whichever axes are taken, the first alternative without them has all that are left."""
    every, may_yield = set(tried[0]), set(tried[0]).difference(set(tried[0]).intersection(*tried))
    if len(may_yield) > _MOST_YIELDING:
        return False
    for count in range(len(may_yield) + 1):
        for taken in itertools.combinations(sorted(may_yield), count):
            wins = next((axes for axes in tried if not set(axes) & set(taken)), ())
            if set(wins) != every - set(taken):
                return False
    return True
