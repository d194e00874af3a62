"""The one place where meshes are built."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import MeshSpecError, kind_of
from shardflax.partitioning.grid import device_grid
from shardflax.partitioning.mesh_spec import MeshSpec, parse_mesh_spec
from shardflax.partitioning.slices import granules, hardware_slices, remember_runs
from shardflax.partitioning.untyped import jx
from shardflax.partitioning.vocabulary import INSIDE_A_SLICE

__all__ = ["make_abstract_mesh", "make_mesh"]

AxisTypes = str | AxisType | Mapping[str, str | AxisType]

_TYPES = {kind.name.lower(): kind for kind in AxisType}


def make_mesh(
    spec: str | Mapping[str, int],
    devices: Sequence[Any] | None = None,
    axis_types: AxisTypes = "auto",
    *,
    other_axes: Collection[str] = (),
    across_dcn: Collection[str] = (),
    allow_split_physical_axes: bool | None = None,
) -> Mesh:
    """The mesh that `spec` describes, on `devices` (default: all).

    `spec` is `"fsdp=4,tensor=2"` (also as a mapping), or, where several slices are joined by the
    data-centre network, `"dcn(data=2) ici(fsdp=16,tensor=4)"`; an axis may be in both.  One size
    of each network may be -1: what is left.  Axes come in the order data, stage, fsdp, fsdp2,
    expert, context, tensor (slowest network first), then others as written.

    `axis_types` is 'auto', 'explicit' or 'manual', for all axes or by axis; the spec may say it
    too (`"fsdp=4,tensor=2:explicit"`), and wins.  `other_axes` names axes that look like a slip
    for a known one and are not.  `across_dcn` names those of `tensor` and `context` that may
    cross slices.

    The physical order is JAX's (`mesh_utils`).  `allow_split_physical_axes` None lets an axis lie
    across a part of a physical axis where it fits no other way; False refuses that.  GPUs and CPUs
    know no slices: there, `dcn(...)` cuts them into equal runs in the order of process and id (so
    that a slice is a process, or several, or a part of one); `dcn(...=-1)` is the number of
    processes.

    Raises `MeshSpecError` for a spec that cannot be read or does not fit the devices, and
    `UnknownAxisError` for a misspelt axis.

    >>> dict(make_mesh("tensor=2,fsdp=-1").shape)
    {'fsdp': 4, 'tensor': 2}
    """
    devices = _flat(jx.devices() if devices is None else devices)
    if not devices:
        raise MeshSpecError(f"mesh {spec!r}: devices is empty. Pass some, or None for all.")
    parsed = _read(spec, other_axes, across_dcn)
    types = _axis_types(parsed, axis_types)
    known = hardware_slices(devices)
    groups = granules(devices)
    count = groups if known is None and groups > 1 and -1 in parsed.dcn else known
    filled = parsed.fill(len(devices), count)
    grid = device_grid(filled, devices, allow_split_physical_axes)
    mesh = Mesh(grid, filled.axes, axis_types=types)
    remember_runs(mesh, filled.dcn, known is not None)
    return mesh


def make_abstract_mesh(
    spec: str | Mapping[str, int],
    devices: int | None = None,
    axis_types: AxisTypes = "auto",
    *,
    slices: int | None = None,
    other_axes: Collection[str] = (),
    across_dcn: Collection[str] = (),
) -> AbstractMesh:
    """The mesh that `spec` describes with no devices: to resolve, explain, trace and lower.

    `spec`, `axis_types`, `other_axes` and `across_dcn` are those of `make_mesh`.  `devices` and
    `slices` are numbers: what -1 is filled from, and what the sizes are checked against.

    Raises like `make_mesh`, and `MeshSpecError` for -1 where `devices` is None.

    >>> dict(make_abstract_mesh("dcn(data=2) ici(fsdp=16,tensor=4)").shape)
    {'data': 2, 'fsdp': 16, 'tensor': 4}
    >>> make_abstract_mesh("fsdp=-1,tensor=4", 256).axis_sizes
    (64, 4)
    """
    parsed = _read(spec, other_axes, across_dcn)
    types = _axis_types(parsed, axis_types)
    for what, number in (("devices", devices), ("slices", slices)):
        if number is not None and not isinstance(cast(Any, number), int):
            raise MeshSpecError(
                f"make_abstract_mesh: {what} is a number, such as 8, not {kind_of(number)}."
            )
        if number is not None and number < 1:
            raise MeshSpecError(f"make_abstract_mesh: {what}={number}: there is at least one.")
    if devices is not None:
        parsed = parsed.fill(devices, slices)
    elif -1 in (*parsed.ici, *parsed.dcn):
        raise MeshSpecError(
            f"mesh {parsed.text!r}: nothing says how many devices there are, of which -1 is what "
            f"is left. Write the size, or make_abstract_mesh(..., devices=256)."
        )
    return AbstractMesh(parsed.sizes, parsed.axes, axis_types=types)


def _flat(devices: Any) -> list[Any]:
    """Devices as a list; those of an array in its order."""
    if not isinstance(devices, Iterable):
        raise MeshSpecError(
            f"make_mesh: devices are a list, such as jax.devices()[:4], not {kind_of(devices)}."
        )
    return list(np.array(devices, dtype=object).ravel())


def _several(names: str | Collection[str]) -> Collection[str]:
    """One name, which is a collection of letters too, as a collection of names."""
    return (names,) if isinstance(names, str) else names


def _read(
    spec: str | Mapping[str, int], other_axes: Collection[str], across_dcn: Collection[str]
) -> MeshSpec:
    """The spec, if no axis is across slices that should not be."""
    parsed, across_dcn = parse_mesh_spec(spec, _several(other_axes)), _several(across_dcn)
    for axis, size in zip(parsed.axes, parsed.dcn, strict=True):
        if size != 1 and axis in INSIDE_A_SLICE and axis not in across_dcn:
            raise MeshSpecError(
                f"mesh {parsed.text!r}: {axis!r} across slices would put its collectives, one "
                f"or more a layer, on the data-centre network. Move it to ici(...), or, if that "
                f"is meant, say make_mesh(..., across_dcn=({axis!r},))."
            )
    return parsed


def _axis_types(spec: MeshSpec, types: AxisTypes) -> tuple[AxisType, ...]:
    """The type of each axis: what the spec says, or else what `types` says."""
    if isinstance(types, Mapping):
        for axis in types:
            if axis not in spec.axes:
                hint = did_you_mean(axis, spec.axes)
                raise MeshSpecError(f"axis_types: the mesh has no axis {axis!r}: {hint}")
        default = [types.get(axis, "auto") for axis in spec.axes]
    elif isinstance(cast(Any, types), (str, AxisType)):
        default = [types] * len(spec.axes)
    else:
        raise MeshSpecError(
            f"axis_types: found {kind_of(types)}. Write one type for all axes, 'explicit', or "
            f"types by axis, {{{spec.axes[0]!r}: 'explicit'}}: axes come in an order of their own."
        )
    return tuple(_axis_type(said or kind) for said, kind in zip(spec.types, default, strict=True))


def _axis_type(kind: str | AxisType) -> AxisType:
    """An axis type by its name."""
    if isinstance(kind, AxisType):
        return kind
    if not isinstance(cast(Any, kind), str):
        raise MeshSpecError(f"axis_types: {kind_of(kind)} is no axis type. Write 'explicit'.")
    if kind not in _TYPES:
        raise MeshSpecError(f"axis_types: no axis type {kind!r}: {did_you_mean(kind, _TYPES)}")
    return _TYPES[kind]
