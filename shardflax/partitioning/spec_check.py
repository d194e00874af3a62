"""Checks of specs of mesh axes, and their one canonical form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from jax.sharding import PartitionSpec

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import (
    AxisConflictError,
    IndivisibleDimError,
    NamesRankError,
    Problem,
    UnknownAxisError,
)

__all__ = ["canonical_spec", "check_spec", "make_spec", "spec_axes", "spec_parts"]


def spec_axes(entry: Any) -> tuple[Any, ...]:
    """The axes of one entry of a spec.

    >>> spec_axes(("data", "fsdp")), spec_axes("data"), spec_axes(None)
    (('data', 'fsdp'), ('data',), ())
    """
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(cast(Iterable[Any], entry)) if isinstance(entry, (tuple, list)) else (entry,)


def make_spec(entries: Iterable[Any]) -> PartitionSpec:
    """A spec in its one form: no tuples of fewer than two axes, no None at the end.

    >>> make_spec([("fsdp",), (), ()])
    P('fsdp',)
    """
    parts: list[Any] = []
    for entry in entries:
        axes = spec_axes(entry)
        if entry is PartitionSpec.UNCONSTRAINED:
            parts.append(entry)
        else:
            parts.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def canonical_spec(spec: PartitionSpec, sizes: Mapping[str, int]) -> PartitionSpec:
    """`spec` without the axes of size 1.

    >>> canonical_spec(PartitionSpec("data", ("fsdp", "tensor")), {"fsdp": 2, "tensor": 1})
    P(None, 'fsdp')
    """

    def kept(entry: Any) -> Any:
        if entry is PartitionSpec.UNCONSTRAINED:
            return entry
        return tuple(axis for axis in spec_axes(entry) if sizes.get(axis, 1) != 1)

    return make_spec(kept(entry) for entry in spec)


def spec_parts(spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Into how many parts `spec` cuts an array.

    >>> spec_parts(PartitionSpec("data", "tensor"), {"data": 4, "tensor": 2})
    8
    """
    return math.prod(sizes.get(axis, 1) for entry in spec for axis in spec_axes(entry))


def check_spec(
    shape: tuple[int, ...], spec: PartitionSpec, sizes: Mapping[str, int], what: str
) -> list[Problem]:
    """What is wrong with a spec of mesh axes on an array of `shape`; `what` says whose it is.

    >>> [p.dim for p in check_spec((8, 3), PartitionSpec(None, "data"), {"data": 2}, "w")]
    [1]
    """
    if len(spec) > len(shape):
        text = (
            f"{what}: {len(spec)} names for an array of rank {len(shape)}, shape {shape}. Give "
            f"one name a dim; None for a dim that is replicated."
        )
        return [Problem(NamesRankError, text)]
    problems: list[Problem] = []
    owner: dict[Any, int] = {}
    for dim, entry in enumerate(spec):
        axes = spec_axes(entry)
        for axis in axes:
            if axis in owner:
                text = f"{what}: dims {owner[axis]} and {dim} both have the axis {axis!r}."
                if owner[axis] == dim:
                    text = f"{what}: dim {dim} has the axis {axis!r} twice."
                problems.append(Problem(AxisConflictError, text, dim))
            owner[axis] = dim
            if axis not in sizes:
                hint = did_you_mean(str(axis), sizes)
                if str(axis).endswith("?"):
                    hint = "an axis that may yield is for strict rules: write AxisRules([...])."
                text = f"{what}: dim {dim} names the axis {axis!r}, which the mesh lacks: {hint}"
                problems.append(Problem(UnknownAxisError, text, dim))
        factor = math.prod(sizes.get(axis, 1) for axis in axes)
        if shape[dim] % factor:
            cut = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in axes)
            text = (
                f"{what}: dim {dim} of size {shape[dim]} (shape {shape}) is not divisible by "
                f"{factor} ({cut}). Make it {-(-shape[dim] // factor) * factor}, or leave the "
                f"dim replicated (None)."
            )
            problems.append(Problem(IndivisibleDimError, text, dim))
    return problems
