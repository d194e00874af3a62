"""One leaf of a layout."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from shardflax.partitioning.errors import Problem
from shardflax.partitioning.linen_rules import linen_axes
from shardflax.partitioning.paths import Path, path_text
from shardflax.partitioning.resolve import DimRecord, MeshAxes, resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh, free_axes
from shardflax.partitioning.spec_check import canonical_spec, check_spec, spec_parts

__all__ = ["Leaf", "resolve_leaf"]


@dataclass(frozen=True)
class Leaf:
    """The layout of one array: where it is in the state, and how it lies on the mesh.

    `names` is None for a leaf that nothing names (it is replicated); `origin` says in words where
    the names are from; `dims` is the resolver's record (under strict rules).

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

    >>> from shardflax.partitioning import make_mesh, preset
    >>> w = np.zeros((8, 16), "float32")
    >>> mesh, rules = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
    >>> resolve_leaf(("w",), w, ("embed", "mlp"), "box", mesh, rules).bytes_per_device
    64
    """
    shape, axes = tuple(np.shape(value)), free_axes(mesh)
    dims = tuple[DimRecord, ...]()
    if names is None:
        spec, found = PartitionSpec(), list[Problem]()
    elif isinstance(rules, AxisRules):
        resolution = resolve(tuple(names), rules, shape, axes)
        spec, found, dims = resolution.spec, list(resolution.problems), resolution.dims
    else:
        spec = PartitionSpec(*(names if rules is None else linen_axes(names, rules)[0]))
        found = check_spec(shape, spec, dict(axes), f"names {names!r}")
        spec = canonical_spec(spec, dict(axes))
    if not found:
        return Leaf(path, shape, value.dtype, names, origin, spec, dims, _parts(spec, axes))
    where = f"{path_text(path)}, shape {shape}"
    problems = tuple(Problem(p.error, p.text, p.dim, where) for p in found)
    return Leaf(path, shape, value.dtype, names, origin, PartitionSpec(), dims, 1, problems)


@functools.lru_cache(maxsize=4096)
def _parts(spec: PartitionSpec, axes: MeshAxes) -> int:
    return spec_parts(spec, dict(axes))
