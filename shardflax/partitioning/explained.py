"""What an explanation is made of: the mesh, and each leaf, dim by dim."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from shardflax.partitioning.leaf import Leaf
from shardflax.partitioning.mesh import make_abstract_mesh
from shardflax.partitioning.mesh_spec import parse_mesh_spec
from shardflax.partitioning.resolve import DimRecord, MeshAxes
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh, axis_kinds, free_axes
from shardflax.partitioning.slices import networks
from shardflax.partitioning.spec_check import spec_axes

__all__ = [
    "AxisExplained",
    "DimExplained",
    "LeafExplained",
    "MeshExplained",
    "explain_leaf",
    "mesh_of_spec",
]

_Spec = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class AxisExplained:
    """One mesh axis: how many parts DCN joins, how many devices each part has, and its type.

    >>> AxisExplained("data", 2, 4, "auto").size
    8
    """

    name: str
    dcn: int
    ici: int
    kind: str

    @property
    def size(self) -> int:
        """The size of the axis, over both networks."""
        return self.dcn * self.ici


@dataclass(frozen=True)
class MeshExplained:
    """A mesh: its axes in order, and the ids of its devices in mesh order, where it has devices.

    >>> mesh = MeshExplained((AxisExplained("data", 2, 4, "auto"),))
    >>> print(mesh)
    data=8 (2 slices)
    """

    axes: tuple[AxisExplained, ...]
    ids: tuple[int, ...] = ()
    platform: str = ""

    @staticmethod
    def of(mesh: AnyMesh, dcn: dict[str, int]) -> MeshExplained:
        """Reads a mesh; `dcn` says the sizes across slices of a mesh without devices."""
        kinds = [kind.name.lower() for _, kind in axis_kinds(mesh)]
        devices, across = list[Any](), dict(dcn)
        if isinstance(mesh, Mesh):
            devices = list(mesh.devices.flat)
            across |= {axis: parts for axis, (parts, _) in networks(mesh).items()}
        axes = tuple(
            AxisExplained(name, across.get(name, 1), size // across.get(name, 1), kind)
            for (name, size), kind in zip(mesh.shape.items(), kinds, strict=True)
        )
        platform = devices[0].device_kind if devices else ""
        return MeshExplained(axes, tuple(int(device.id) for device in devices), platform)

    @property
    def size(self) -> int:
        """How many devices."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def slices(self) -> int:
        """How many slices, joined by DCN."""
        return math.prod(axis.dcn for axis in self.axes)

    def __str__(self) -> str:
        sizes = ", ".join(f"{axis.name}={axis.size}" for axis in self.axes) or "one device"
        return f"{sizes} ({self.slices} slices)" if self.slices > 1 else sizes


@dataclass(frozen=True)
class DimExplained:
    """One dim: its size, name and rule; the axes it took, and those it gave up and why.

    `rule` is None where the dim has no name, and where its name is a mesh axis.  `local` is the
    size of the dim on each device.

    >>> DimExplained(8, "mlp", ("fsdp?", "tensor"), ("tensor",), (("fsdp", "size 1"),), 4).losses
    ()
    """

    size: int
    name: str | None
    rule: tuple[str, ...] | None
    taken: tuple[str, ...]
    given_up: tuple[tuple[str, str], ...]
    local: int

    @property
    def losses(self) -> tuple[tuple[str, str], ...]:
        """What was given up though the mesh has it: (axis, why)."""
        return tuple(
            (axis, why) for axis, why in self.given_up if why not in ("not in the mesh", "size 1")
        )

    def __str__(self) -> str:
        axes = "+".join(self.taken)
        return f"{self.name or '-'}→{axes}" if axes else self.name or "-"


@dataclass(frozen=True)
class LeafExplained:
    """One leaf of a state: what it is, where its names are from, and how each dim lies.

    >>> dim = DimExplained(8, "embed", ("fsdp",), ("fsdp",), (), 2)
    >>> leaf = LeafExplained("params/w", "float32", "its box", (dim,), (("fsdp",),), 32, 8, 4)
    >>> print(leaf.array, leaf.dims[0], leaf.parts)
    float32[8] embed→fsdp 4
    """

    path: str
    dtype: str
    origin: str
    dims: tuple[DimExplained, ...]
    spec: tuple[tuple[str, ...], ...]
    bytes: int
    bytes_per_device: int
    parts: int
    named: bool = True
    problems: tuple[str, ...] = ()
    rule_set: str = "stored"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return tuple(dim.size for dim in self.dims)

    @property
    def array(self) -> str:
        """dtype and shape, as `float32[8,16]`."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def group(self) -> str:
        """The first part of the path: `params`, `opt_state`, ..."""
        return self.path.partition("/")[0]


def mesh_of_spec(
    spec: str | Mapping[str, int],
    devices: int | None = None,
    *,
    across_dcn: Collection[str] = (),
    other_axes: Collection[str] = (),
) -> tuple[AbstractMesh, dict[str, int]]:
    """A mesh of any size, without devices, and the sizes across slices that its spec says.

    The arguments are those of `make_abstract_mesh`.  Raises `MeshSpecError` for a spec that cannot
    be read or leaves a size open.

    >>> mesh, dcn = mesh_of_spec("dcn(data=2) ici(fsdp=16,tensor=8)")
    >>> mesh.size, dcn["data"]
    (256, 2)
    """
    mesh = make_abstract_mesh(spec, devices, across_dcn=across_dcn, other_axes=other_axes)
    parsed = parse_mesh_spec(spec, other_axes)
    if devices is not None:
        parsed = parsed.fill(devices, None)
    return mesh, dict(zip(parsed.axes, parsed.dcn, strict=True))


def explain_leaf(leaf: Leaf, mesh: AnyMesh, rules: LogicalRules) -> LeafExplained:
    """Everything about one leaf of a layout.

    >>> from shardflax.partitioning import make_mesh
    >>> from shardflax.partitioning.leaf import resolve_leaf
    >>> import numpy as np
    >>> rules, mesh = AxisRules({"mlp": "fsdp? tensor", "embed": "fsdp"}), make_mesh("fsdp=8")
    >>> leaf = resolve_leaf(("w",), np.zeros((8, 4)), ("embed", "mlp"), "its box", mesh, rules)
    >>> explain_leaf(leaf, mesh, rules).dims[1].losses
    (('fsdp', "taken by dim 0 'embed'"),)
    """
    axes = free_axes(mesh)
    if leaf.dims or not leaf.shape:
        dims, spec = _lies(leaf.shape, leaf.spec, leaf.dims, axes)
    else:
        records = _records(leaf, _entries(leaf.spec, len(leaf.shape)), axes, rules)
        dims, spec = _lies(leaf.shape, leaf.spec, records, axes)
    return LeafExplained(
        leaf.where,
        _dtype(leaf.dtype),
        leaf.origin,
        dims,
        spec,
        math.prod(leaf.shape) * int(leaf.dtype.itemsize),
        leaf.bytes_per_device,
        leaf.parts,
        leaf.names is not None,
        tuple([problem.text for problem in leaf.problems]),
        leaf.rule_set,
    )


@functools.lru_cache(maxsize=256)
def _dtype(dtype: Any) -> str:
    return str(dtype)


@functools.lru_cache(maxsize=65536)
def _lies(
    shape: tuple[int, ...], spec: PartitionSpec, records: tuple[DimRecord, ...], axes: MeshAxes
) -> tuple[tuple[DimExplained, ...], _Spec]:
    """The dims, and the axes of each.  Models have thousands of leaves, of which few are unlike."""
    entries, sizes = _entries(spec, len(shape)), dict(axes)
    parts = [math.prod(sizes[axis] for axis in entry) for entry in entries]
    dims = map(_dim, shape, records, parts)
    return tuple(dims), entries


def _entries(spec: PartitionSpec, rank: int) -> _Spec:
    """The axes of each dim."""
    entries = tuple(tuple(map(str, spec_axes(entry))) for entry in spec)
    return entries + ((),) * (rank - len(entries))


def _dim(size: int, record: DimRecord, parts: int) -> DimExplained:
    """The parts that a dim is cut into are those of its spec: one, if the leaf has problems."""
    name = "unconstrained" if record.name is PartitionSpec.UNCONSTRAINED else record.name
    return DimExplained(size, name, record.rule, record.taken, record.given_up, size // parts)


def _records(leaf: Leaf, spec: _Spec, axes: MeshAxes, rules: LogicalRules) -> tuple[DimRecord, ...]:
    """What strict rules would have recorded, for a leaf that they did not resolve."""
    if leaf.names is None or len(leaf.names) != len(leaf.shape):
        return (DimRecord(None, None),) * len(leaf.shape)
    pairs = [] if isinstance(rules, AxisRules) else [(name, _flat(axes)) for name, axes in rules]
    large = {axis for axis, size in axes if size > 1}
    dims = range(len(leaf.names))
    return tuple(_record(dim, leaf.names, spec, pairs, large) for dim in dims)


def _record(
    dim: int,
    names: Sequence[Any],
    spec: _Spec,
    pairs: Sequence[tuple[str, tuple[str, ...]]],
    large: set[str],
) -> DimRecord:
    """Which of the plain pairs fired for a dim, and which were passed over."""
    name, taken = names[dim], spec[dim]
    given_up: dict[str, str] = {}
    for axes in [axes for other, axes in pairs if other == name]:
        wanted = tuple(axis for axis in axes if axis in large)
        owned = _owner(wanted, dim, spec)
        if wanted == taken or owned is None:
            return DimRecord(name, axes, taken, tuple(given_up.items()))
        axis, owner = owned
        given_up |= dict.fromkeys(wanted, f"{axis} is taken by dim {owner} {names[owner]!r}")
    text = name if isinstance(name, str) or name is None else "+".join(_flat(name))
    return DimRecord(text, None, taken, tuple(given_up.items()))


def _owner(axes: tuple[str, ...], dim: int, spec: _Spec) -> tuple[str, int] | None:
    """The first of `axes` that another dim has, and that dim."""
    others = [other for other in range(len(spec)) if other != dim]
    return next(((axis, d) for axis in axes for d in others if axis in spec[d]), None)


def _flat(axes: Any) -> tuple[str, ...]:
    return tuple(map(str, spec_axes(axes)))
