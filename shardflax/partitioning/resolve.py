"""The strict resolver: names + rules + shape + mesh axes -> spec, with a record of why.

One pure, cached function.  It never raises: what is wrong comes back as `problems`, so that a
layout can list everything wrong with a train state at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import (
    AxisConflictError,
    IndivisibleDimError,
    NamesRankError,
    Problem,
    RepeatedNameError,
    UnknownAxisError,
    UnknownNameError,
)
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.spec_check import make_spec
from shardflax.partitioning.vocabulary import AXIS_ALIASES, KNOWN_AXES, known_name, tie_rank

__all__ = ["DimRecord", "MeshAxes", "Resolution", "check_mesh_axes", "resolve"]

MeshAxes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class DimRecord:
    """How one dim got its axes: its name, its rule, the axes taken, those given up and why.

    >>> resolve(("mlp",), AxisRules({"mlp": "fsdp? tensor"}), (8,), (("tensor", 2),)).dims[0]
    DimRecord(name='mlp', rule=('fsdp?', 'tensor'), taken=('tensor',),
              given_up=(('fsdp', 'not in the mesh'),))
    """

    name: Any
    rule: tuple[str, ...] | None
    taken: tuple[str, ...] = ()
    given_up: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Resolution:
    """A spec, a record for each dim, and what is wrong (nothing, where `problems` is empty).

    >>> [p.error.__name__ for p in resolve(("x",), AxisRules({"y": None})).problems]
    ['UnknownNameError']
    """

    spec: PartitionSpec
    dims: tuple[DimRecord, ...]
    problems: tuple[Problem, ...] = ()


@functools.lru_cache(maxsize=65536)
def resolve(
    names: tuple[Any, ...],
    rules: AxisRules,
    shape: tuple[int, ...] | None = None,
    axes: MeshAxes | None = None,
    min_size: int = 0,
) -> Resolution:
    """The layout of one array under strict `rules`.

    `names` has one entry a dim: a logical name, None (replicated), or
    `PartitionSpec.UNCONSTRAINED`.  `shape` None skips the checks of sizes; `axes`, the mesh's
    (axis, size) pairs, None takes every axis of a rule to be there and claims nothing about
    sizes.  Axes of size 1 are never in the spec, and a spec never ends in None.  An array of
    fewer than `min_size` elements takes no axis: `rules.min_size` for parameters and optimizer
    leaves, 0 for activations.

    Axes without `?` are assigned first, on all dims; then those with `?`, in the order of
    `tie_rank` and then of the dims, each if it is free and divides what is left of the dim.

    >>> rules = AxisRules({"embed": "fsdp", "mlp": "fsdp? tensor"})
    >>> resolve(("embed", "mlp"), rules, (8, 8), (("fsdp", 4), ("tensor", 2))).spec
    P('fsdp', 'tensor')
    """
    problems = _check_names(names, rules, shape)
    if problems:
        return Resolution(PartitionSpec(), (), tuple(problems))
    return _Assignment(names, rules, shape, axes, min_size).run()


def check_mesh_axes(rules: AxisRules, axes: Mapping[str, int]) -> tuple[Problem, ...]:
    """What is wrong between `rules` and a mesh as a whole, whatever the arrays.

    An axis of a rule, in any set, that the mesh lacks (the presets' own axes count as size 1
    there), and a mesh axis that no rule names and that looks like a slip for one that some rule
    does.

    >>> [str(p) for p in check_mesh_axes(AxisRules({"a": "fsdp"}), {"fspd": 2})]
    ["no rule names the mesh axis 'fspd' (size 2): did you mean 'fsdp'?"]
    """
    every = (rules, *(one for _, one in rules.sets))
    lacking = dict.fromkeys(
        _lacks(name, axis.rstrip("?"), rule, tuple(axes))
        for one in every
        for name, rule in one.entries
        for axis in rule
        if axis.rstrip("?") not in axes and axis.rstrip("?") not in KNOWN_AXES
    )
    problems = list(lacking)
    for axis in sorted(set(axes) - rules.axes):
        absent = [a for a in rules.axes if a not in axes]
        meant = AXIS_ALIASES.get(axis)
        hint = f"did you mean {meant!r}?" if meant in absent else did_you_mean(axis, absent)
        if axes[axis] > 1 and hint.startswith("did") and axis not in KNOWN_AXES:
            text = f"no rule names the mesh axis {axis!r} (size {axes[axis]}): {hint}"
            problems.append(Problem(UnknownAxisError, text))
    return tuple(problems)


def _lacks(name: str, axis: str, rule: Sequence[str], axes: Sequence[str]) -> Problem:
    """The problem of a rule whose axis the mesh lacks."""
    meant = AXIS_ALIASES.get(axis)
    hint = f"did you mean {meant!r}?" if meant else did_you_mean(axis, {*axes, *KNOWN_AXES})
    text = (
        f"the rule {name!r}: '{' '.join(rule)}' names the axis {axis!r}, which the mesh "
        f"({', '.join(axes) or 'no axes'}) lacks: {hint}"
    )
    return Problem(UnknownAxisError, text)


def _check_names(
    names: tuple[Any, ...], rules: AxisRules, shape: tuple[int, ...] | None
) -> list[Problem]:
    """What is wrong with the names alone; needs no mesh."""
    problems: list[Problem] = []
    if shape is not None and len(shape) != len(names):
        text = (
            f"{len(names)} names {names!r} for an array of rank {len(shape)}, shape {shape}. "
            f"Give one name a dim; None for a dim that is replicated."
        )
        return [Problem(NamesRankError, text)]
    for dim, name in enumerate(names):
        if not isinstance(name, str):
            if name is not None and name is not PartitionSpec.UNCONSTRAINED:
                text = f"dim {dim} of {names!r}: a name is a string or None, not {name!r}."
                problems.append(Problem(UnknownNameError, text, dim))
        elif name not in rules:
            problems.append(Problem(UnknownNameError, _unknown(dim, name, names, rules), dim))
        elif name in names[:dim]:
            text = (
                f"the name {name!r} stands on dims {names.index(name)} and {dim} of {names!r}. "
                f"Give the dims different names."
            )
            problems.append(Problem(RepeatedNameError, text, dim))
    return problems


def _unknown(dim: int, name: str, names: tuple[Any, ...], rules: AxisRules) -> str:
    """The text for a name that no rule knows."""
    meant = known_name(name)
    hint = f"did you mean {meant!r}?" if meant in rules else did_you_mean(name, rules.names)
    return (
        f"no rule for the name {name!r} (dim {dim} of {names!r}): "
        f"{hint} Correct the name, add a rule with "
        f"rules | {{{name!r}: ...}}, or say that the dim is replicated with None."
    )


class _Assignment:
    """The state of one resolution: which axis went to which dim."""

    def __init__(
        self,
        names: tuple[Any, ...],
        rules: AxisRules,
        shape: tuple[int, ...] | None,
        axes: MeshAxes | None,
        min_size: int,
    ) -> None:
        self.names = names
        self.shape = shape
        self.axes = None if axes is None else dict(axes)
        self.rules = [rules[n] if isinstance(n, str) else None for n in names]
        self.owner: dict[str, int] = {}
        self.given_up: list[dict[str, str]] = [{} for _ in names]
        self.problems: list[Problem] = []
        self.small = ""
        if shape is not None and math.prod(shape) < min_size:
            self.small = f"below the threshold of {min_size:,} elements"

    def run(self) -> Resolution:
        dims = range(len(self.names))
        for dim in dims:
            self.take_firm(dim)
        for dim in sorted(dims, key=lambda d: (tie_rank(str(self.names[d])), d)):
            self.take_yielding(dim)
        records = tuple(self.record(dim) for dim in dims)
        free = PartitionSpec.UNCONSTRAINED
        spec = make_spec(r.name if r.name is free else r.taken for r in records)
        return Resolution(spec, records, tuple(self.problems))

    def size(self, axis: str) -> int:
        """The size of `axis`; with no mesh, a size that is not 1 and that divides nothing."""
        return 0 if self.axes is None else self.axes.get(axis, 1)

    def wanted(self, dim: int, yielding: bool) -> list[str]:
        """The axes of the dim's rule that may, or must not, yield; none of size 1."""
        wanted: list[str] = []
        for entry in self.rules[dim] or ():
            axis = entry.rstrip("?")
            if entry.endswith("?") != yielding:
                continue
            if self.axes is not None and axis not in self.axes:
                self.given_up[dim][axis] = "not in the mesh"
                if axis not in KNOWN_AXES:
                    rule = self.rules[dim] or ()
                    problem = _lacks(self.names[dim], axis, rule, tuple(self.axes))
                    self.problems.append(problem)
            elif self.size(axis) == 1:
                self.given_up[dim][axis] = "size 1"
            elif self.small:
                self.given_up[dim][axis] = self.small
            else:
                wanted.append(axis)
        return wanted

    def factor(self, dim: int) -> int:
        """Into how many parts the axes taken so far cut `dim`."""
        return math.prod(self.size(axis) for axis, owner in self.owner.items() if owner == dim)

    def take_firm(self, dim: int) -> None:
        """Assigns the axes of `dim` that must not yield."""
        for axis in self.wanted(dim, yielding=False):
            if axis in self.owner:
                self.problems.append(self.conflict(axis, dim))
            else:
                self.owner[axis] = dim
        factor = self.factor(dim)
        if self.shape is not None and self.axes is not None and self.shape[dim] % factor:
            self.problems.append(self.indivisible(dim, factor))

    def take_yielding(self, dim: int) -> None:
        """Assigns the axes of `dim` that may yield, where they are free and divide."""
        for axis in self.wanted(dim, yielding=True):
            if axis in self.owner:
                other = self.owner[axis]
                self.given_up[dim][axis] = f"taken by dim {other} {self.names[other]!r}"
            elif self.shape is not None and self.axes is not None:
                factor = self.factor(dim) * self.size(axis)
                if self.shape[dim] % factor:
                    self.given_up[dim][axis] = f"{factor} does not divide {self.shape[dim]}"
                else:
                    self.owner[axis] = dim
            else:
                self.owner[axis] = dim

    def record(self, dim: int) -> DimRecord:
        rule = self.rules[dim]
        order = [entry.rstrip("?") for entry in rule or ()]
        taken = tuple(axis for axis in order if self.owner.get(axis) == dim)
        return DimRecord(self.names[dim], rule, taken, tuple(self.given_up[dim].items()))

    def conflict(self, axis: str, dim: int) -> Problem:
        other = self.owner[axis]
        first, second = self.names[other], self.names[dim]
        text = (
            f"dims {other} {first!r} and {dim} {second!r} of {self.names!r} both claim the axis "
            f"{axis!r} (rules {first!r}: '{' '.join(self.rules[other] or ())}', {second!r}: "
            f"'{' '.join(self.rules[dim] or ())}')."
        )
        cure = f"Write '{axis}?' in the rule that may yield."
        return Problem(AxisConflictError, f"{text} {cure}", dim, cure=cure)

    def indivisible(self, dim: int, factor: int) -> Problem:
        assert self.shape is not None
        size, name, rule = self.shape[dim], self.names[dim], self.rules[dim] or ()
        mine = [axis for axis, owner in self.owner.items() if owner == dim]
        cut = " x ".join(f"{axis}={self.size(axis)}" for axis in mine)
        text = (
            f"dim {dim} {name!r} of size {size} (shape {self.shape}, names {self.names!r}) is "
            f"not divisible by {factor} ({cut}; rule {name!r}: '{' '.join(rule)}')."
        )
        cure = (
            f"Make it {-(-size // factor) * factor}, let the axis yield ('{mine[-1]}?'), or "
            f"replicate the dim (None, or rules | {{{name!r}: None}})."
        )
        return Problem(IndivisibleDimError, f"{text} {cure}", dim, cure=cure)
