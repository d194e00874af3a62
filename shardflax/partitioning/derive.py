"""The names of optimizer leaves, derived from the parameters that they belong to.

An optimizer's state repeats the tree of the parameters, somewhere under paths of its own.  A leaf
belongs to the parameter whose path is the longest end of the leaf's path (a trailing index is
allowed: some optimizers keep a list for each parameter), and takes over its names by shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardflax.partitioning.paths import Path
from shardflax.partitioning.rules import LogicalRules

__all__ = ["Derived", "Parameter", "derive", "find_parameter"]

Names = tuple[Any, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter: its path in the whole state, shape, names, and the rules for its names.

    `rules` None says that the names are mesh axes.
    """

    path: Path
    shape: tuple[int, ...]
    names: Names
    rules: LogicalRules | None = None


@dataclass(frozen=True)
class Derived:
    """Names for a leaf, or None, and the words that say where they came from."""

    names: Names | None
    origin: str


def find_parameter(path: Path, parameters: Mapping[Path, Parameter]) -> Parameter | None:
    """The parameter that the leaf at `path` belongs to; `parameters` are keyed below their root.

    >>> kernel = Parameter(("params", "a", "w"), (2,), ("embed",))
    >>> find_parameter(("opt_state", 0, "mu", "a", "w"), {("a", "w"): kernel}) is kernel
    True
    """
    ends = [path]
    if path and isinstance(path[-1], int):
        ends.append(path[:-1])
    for end in ends:
        for start in range(len(end)):
            found = parameters.get(end[start:])
            if found is not None and found.path != path:
                return found
    return None


def derive(path: Path, shape: tuple[int, ...], parameter: Parameter) -> Derived:
    """The names of a leaf of `shape` that belongs to `parameter`.

    The same shape: the same names.  Dims left out (factored moments): their names left out.  Dims
    reduced to 1: None there.  Dims put in front (a history): None there.  A single number:
    replicated.  Anything else has no names.

    >>> kernel = Parameter(("params", "w"), (4, 8), ("embed", "mlp"))
    >>> derive(("v_row", "w"), (4,), kernel).names
    ('embed',)
    """
    names, full = parameter.names, parameter.shape
    if shape == full:
        return Derived(names, "as its parameter")
    if shape in ((), (1,)):
        return Derived((None,) * len(shape), "a single number")
    if len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True)):
        kept = tuple(
            name if size == whole else None
            for name, size, whole in zip(names, shape, full, strict=True)
        )
        return Derived(kept, "its parameter, dims reduced to 1")
    if len(shape) > len(full) and shape[len(shape) - len(full) :] == full:
        extra = len(shape) - len(full)
        return Derived((None,) * extra + names, "its parameter, more dims in front")
    return _factored(path, shape, parameter)


def _factored(path: Path, shape: tuple[int, ...], parameter: Parameter) -> Derived:
    """The names of a leaf that kept some dims of its parameter, in order."""
    full, names = parameter.shape, parameter.names
    choices = [
        dims
        for dims in itertools.combinations(range(len(full)), len(shape))
        if tuple(full[dim] for dim in dims) == shape
    ]
    kept = list(dict.fromkeys(tuple(names[dim] for dim in dims) for dims in choices))
    if len(kept) == 1:
        return Derived(kept[0], "its parameter, factored")
    if choices:
        dims = _square(path, full)
        if dims in choices:
            return Derived(tuple(names[dim] for dim in dims), "its parameter, factored")
    return Derived(None, "a shape that does not follow from its parameter")


def _square(path: Path, full: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dims that optax's factored moments keep, where sizes alone do not tell.

    Adafactor (Shazeer and Stern, 2018): of two equal dims, `v_row` keeps the earlier and `v_col`
    the later.  SM3 (Anil et al., 2019): a list of vectors, one for each dim.
    """
    if path and isinstance(path[-1], int) and path[-1] < len(full):
        return (path[-1],)
    order = sorted(range(len(full)), key=lambda dim: (full[dim], dim))
    dropped = order[-1] if "v_row" in path else order[-2] if "v_col" in path else None
    return None if dropped is None else tuple(d for d in range(len(full)) if d != dropped)
