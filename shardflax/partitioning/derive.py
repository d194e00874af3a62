"""The names of optimizer leaves, derived from the parameters that they belong to.

An optimizer's state repeats the tree of the parameters, somewhere under paths of its own.  A leaf
belongs to the parameter whose path is the longest end of the leaf's path (a trailing index is
allowed: some optimizers keep a list for each parameter), and takes over its names by shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardflax.partitioning.boxes import Partitioned
from shardflax.partitioning.paths import Path
from shardflax.partitioning.rules import LogicalRules

__all__ = ["Derived", "Parameter", "derive", "find_parameter"]

Names = tuple[Any, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter: its path in the whole state, shape, names, and the rules for its names.

    `rules` None says that the names are mesh axes; `box` is the box around it, if there is one.
    """

    path: Path
    shape: tuple[int, ...]
    names: Names
    rules: LogicalRules | None = None
    box: Any = None

    def copied_to(self, box: Partitioned, rank: int) -> bool:
        """True if `box`, around an array of that rank, is this parameter's, copied.

        An optimizer that was given boxed parameters leaves their boxes around whatever it makes
        of them.

        >>> box = Partitioned(0.0, ("embed", "mlp"))
        >>> Parameter(("w",), (4, 8), box.names, box=box).copied_to(box.replace(value=1.0), 2)
        True
        """
        if len(box.names) != rank:
            return True
        return type(box) is type(self.box) and box.names == self.box.names


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

    The same shape: the same names.  One number, or none: replicated.  Dims reduced to 1: None
    there.  Dims put in front (a history): None there.  Dims left out (factored moments): their
    names left out.  A square matrix of one dim (Shampoo): that dim's name, and None.  Anything
    else has no names, and neither has a leaf whose shape can be read in two ways.

    >>> kernel = Parameter(("params", "w"), (4, 8), ("embed", "mlp"))
    >>> derive(("v_row", "w"), (4,), kernel).names
    ('embed',)
    >>> derive(("statistics", "w", 1), (8, 8), kernel).names
    ('mlp', None)
    """
    names, full = parameter.names, parameter.shape
    if shape == full:
        return Derived(names, "as its parameter")
    if math.prod(shape) <= 1:
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
    return _factored(path, shape, parameter) or _square(path, shape, parameter) or _UNKNOWN


_UNKNOWN = Derived(None, "a shape that does not follow from its parameter")


def _factored(path: Path, shape: tuple[int, ...], parameter: Parameter) -> Derived | None:
    """The names of a leaf that kept some dims of its parameter, in order."""
    full, names = parameter.shape, parameter.names
    choices = [
        dims
        for dims in itertools.combinations(range(len(full)), len(shape))
        if tuple(full[dim] for dim in dims) == shape
    ]
    kept = list(dict.fromkeys(tuple(names[dim] for dim in dims) for dims in choices))
    if len(kept) > 1:
        kept = [
            tuple(names[dim] for dim in dims) for dims in [_kept(path, full)] if dims in choices
        ]
    return Derived(kept[0], "its parameter, factored") if kept else None


def _kept(path: Path, full: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dims that a factored leaf kept, where sizes alone do not tell.

    Adafactor (Shazeer and Stern, 2018) reduces the two largest dims: `v_row` lacks the largest,
    `v_col` the second.  Which of equal dims counts as larger is NumPy's sort's choice in optax.
    SM3 (Anil et al., 2019): a list of vectors, one for each dim.
    """
    if path and isinstance(path[-1], int) and path[-1] < len(full):
        return (path[-1],)
    order = [int(dim) for dim in np.argsort(full)]
    dropped = order[-1] if "v_row" in path else order[-2] if "v_col" in path else None
    return None if dropped is None else tuple(d for d in range(len(full)) if d != dropped)


def _square(path: Path, shape: tuple[int, ...], parameter: Parameter) -> Derived | None:
    """The names of a matrix of products of one dim with itself, behind dims that are stacked.

    Shampoo (Gupta et al., 2018): a list of them, one for each dim, or two by name.
    """
    full, lead = parameter.shape, len(shape) - 2
    if lead < 0 or shape[-1] != shape[-2] or shape[:lead] != full[:lead]:
        return None
    dims = [dim for dim in range(lead, len(full)) if full[dim] == shape[-1]]
    if len(dims) > 1 and path and isinstance(path[-1], int):
        dims = [dim for dim in dims if dim == lead + path[-1]]
    if len(dims) != 1:
        return None
    names = (*parameter.names[:lead], parameter.names[dims[0]], None)
    return Derived(names, "products of one dim of its parameter")
