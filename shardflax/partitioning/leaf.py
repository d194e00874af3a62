"""One leaf of a layout."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import PartitionSpec

from shardflax.partitioning.errors import Problem
from shardflax.partitioning.linen_rules import linen_axes
from shardflax.partitioning.paths import Path, path_text
from shardflax.partitioning.resolve import DimRecord, MeshAxes, resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh, free_axes
from shardflax.partitioning.spec_check import canonical_spec, check_spec, spec_parts
from shardflax.partitioning.state_names import NamedLeaf

__all__ = ["Leaf", "place_leaf", "resolve_leaf"]


@dataclass(frozen=True)
class Leaf:
    """The layout of one array: where it is in the state, and how it lies on the mesh.

    `names` is None for a leaf that nothing names (it is replicated); `origin` says in words where
    the names are from; `dims` is the resolver's record (under strict rules), by the rules of
    `rule_set`: "stored", "optimizer" or "compute".

    >>> import numpy as np
    >>> leaf = Leaf(
    ...     ("w",),
    ...     (8, 4),
    ...     np.dtype("float32"),
    ...     ("embed", None),
    ...     "its box",
    ...     PartitionSpec("fsdp"),
    ...     (),
    ...     parts=4,
    ... )
    >>> leaf.where, leaf.bytes_per_device
    ('w', 32)
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any
    names: tuple[Any, ...] | None
    origin: str
    spec: PartitionSpec
    dims: tuple[DimRecord, ...]
    parts: int
    problems: tuple[Problem, ...] = ()
    rule_set: str = "stored"

    @property
    def where(self) -> str:
        """The path as text."""
        return path_text(self.path)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds of this array."""
        return math.prod(self.shape) // self.parts * int(self.dtype.itemsize)


def resolve_leaf(
    path: Path,
    value: Any,
    names: tuple[Any, ...] | None,
    origin: str,
    mesh: AnyMesh,
    rules: LogicalRules | None,
) -> Leaf:
    """Resolves and checks one leaf; `rules` None says that its names are mesh axes.

    >>> import numpy as np
    >>> from shardflax.partitioning import make_mesh, preset
    >>> w = np.zeros((8, 16), "float32")
    >>> mesh, rules = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
    >>> resolve_leaf(("w",), w, ("embed", "mlp"), "box", mesh, rules).bytes_per_device
    64
    """
    return place_leaf(path, value, NamedLeaf(names, origin, rules), free_axes(mesh))


def place_leaf(path: Path, value: Any, named: NamedLeaf, axes: MeshAxes) -> Leaf:
    """Resolves and checks one leaf that has its names; `axes` are the mesh's (axis, size) pairs.

    >>> import numpy as np
    >>> from shardflax.partitioning import preset
    >>> named = NamedLeaf(("embed",), "its box", preset("fsdp"), min_size=16)
    >>> place_leaf(("b",), np.zeros(8), named, (("fsdp", 8),)).dims[0].given_up
    (('fsdp', 'below the threshold of 16 elements'),)
    """
    shape = tuple(value.shape)
    spec, dims, parts, found = _WHOLE
    if named.names is not None and isinstance(named.rules, AxisRules):
        spec, dims, parts, found = _strict(named.names, named.rules, shape, axes, named.min_size)
    elif named.names is not None:
        spec, parts, found = _plain(named.names, named.rules, shape, axes)
    problems = (*named.problems, *found)
    if problems:
        where = f"{path_text(path)}, shape {shape}"
        problems = tuple(replace(p, where=where) for p in problems)
    names, origin, kind = named.names, named.origin, named.rule_set
    return Leaf(path, shape, value.dtype, names, origin, spec, dims, parts, problems, kind)


_Placed = tuple[PartitionSpec, tuple[DimRecord, ...], int, tuple[Problem, ...]]
_WHOLE: _Placed = (PartitionSpec(), (), 1, ())


@functools.lru_cache(maxsize=65536)
def _strict(
    names: tuple[Any, ...], rules: AxisRules, shape: tuple[int, ...], axes: MeshAxes, least: int
) -> _Placed:
    """Spec, record, number of parts, problems; whole if it has less than `least` elements."""
    found = resolve(names, rules, shape, axes, least)
    if found.problems:
        return PartitionSpec(), (), 1, found.problems
    return found.spec, found.dims, spec_parts(found.spec, dict(axes)), ()


def _plain(
    names: tuple[Any, ...], rules: LogicalRules | None, shape: tuple[int, ...], axes: MeshAxes
) -> tuple[PartitionSpec, int, tuple[Problem, ...]]:
    """Spec, number of parts and problems by plain pairs, or for names that are mesh axes."""
    spec = PartitionSpec(*(names if rules is None else linen_axes(names, rules)[0]))
    found = check_spec(shape, spec, dict(axes), f"names {names!r}")
    if found:
        return PartitionSpec(), 1, tuple(found)
    spec = canonical_spec(spec, dict(axes))
    return spec, spec_parts(spec, dict(axes)), ()
