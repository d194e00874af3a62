"""The one place where meshes are built."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import MeshSpecError
from shardflax.partitioning.mesh_spec import MeshSpec, parse_mesh_spec
from shardflax.partitioning.untyped import jx

__all__ = ["make_mesh"]

_TYPES = {kind.name.lower(): kind for kind in AxisType}
_INSIDE_A_SLICE = ("context", "tensor")


def make_mesh(
    spec: str | Mapping[str, int],
    devices: Sequence[Any] | None = None,
    axis_types: str | Mapping[str, str] = "auto",
    *,
    other_axes: Collection[str] = (),
    across_dcn: Collection[str] = (),
) -> Mesh:
    """The mesh that `spec` describes, on `devices` (default: all).

    `spec` is `"fsdp=4,tensor=2"` (also as a mapping), or, where several slices are joined by the
    data-centre network, `"dcn(data=2) ici(fsdp=16,tensor=4)"`; an axis may be in both.  One size
    of each network may be -1: what is left.  Axes come in the order data, stage, fsdp, fsdp2,
    expert, context, tensor (slowest network first), then others as written.

    `axis_types` is 'auto', 'explicit' or 'manual', for all axes or by axis.  `other_axes` names
    axes that look like a slip for a known one and are not.  `across_dcn` names those of `tensor`
    and `context` that may cross slices.

    The physical order is JAX's (`mesh_utils`).  CPU devices have no slices: there, `dcn(...)`
    cuts them into equal runs in the order of their process and id.

    Raises `MeshSpecError` for a spec that cannot be read or does not fit the devices, and
    `UnknownAxisError` for a misspelt axis.

    >>> dict(make_mesh("tensor=2,fsdp=-1").shape)
    {'fsdp': 4, 'tensor': 2}
    """
    devices = list(jx.devices() if devices is None else devices)
    parsed = parse_mesh_spec(spec, other_axes)
    types = _axis_types(parsed, axis_types)
    for axis, size in zip(parsed.axes, parsed.dcn, strict=True):
        if size != 1 and axis in _INSIDE_A_SLICE and axis not in across_dcn:
            raise MeshSpecError(
                f"mesh {parsed.text!r}: {axis!r} across slices would put its collectives, one "
                f"or more a layer, on the data-centre network. Move it to ici(...), or, if that "
                f"is meant, say make_mesh(..., across_dcn=({axis!r},))."
            )
    slices = _slices(devices)
    filled = parsed.fill(len(devices), slices)
    return Mesh(_grid(filled, devices, slices), filled.axes, axis_types=types)


def _axis_types(spec: MeshSpec, types: str | Mapping[str, str]) -> tuple[AxisType, ...]:
    """The type of each axis of `spec`."""
    if not isinstance(types, str):
        for axis in types:
            if axis not in spec.axes:
                hint = did_you_mean(axis, spec.axes)
                raise MeshSpecError(f"axis_types: the mesh has no axis {axis!r}: {hint}")
    by_axis = {
        axis: types if isinstance(types, str) else types.get(axis, "auto") for axis in spec.axes
    }
    for kind in by_axis.values():
        if kind not in _TYPES:
            hint = did_you_mean(kind, _TYPES)
            raise MeshSpecError(f"axis_types: no axis type {kind!r}: {hint}")
    return tuple(_TYPES[by_axis[axis]] for axis in spec.axes)


def _slices(devices: Sequence[Any]) -> int | None:
    """How many slices the devices are in; None on CPU, which has none."""
    if not devices or devices[0].platform == "cpu":
        return None
    if devices[0].platform == "gpu":
        return None  # one NVLink domain or many: the spec says
    return len({getattr(device, "slice_index", 0) for device in devices})


def _grid(spec: MeshSpec, devices: Sequence[Any], slices: int | None) -> Any:
    """The devices of a filled spec as an array with one dim for each axis."""
    if math.prod(spec.dcn) == 1:
        return _slice_grid(spec.ici, devices)
    if slices is not None:
        return mesh_utils.create_hybrid_device_mesh(
            spec.ici, spec.dcn, devices, allow_split_physical_axes=True
        )
    return _hybrid_grid(spec, devices)


def _slice_grid(shape: tuple[int, ...], devices: Sequence[Any]) -> Any:
    """The devices of one slice, in the physical order that suits `shape`."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # a torus whose axes the shape does not fit
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _hybrid_grid(spec: MeshSpec, devices: Sequence[Any]) -> Any:
    """A hybrid mesh over devices without slices: equal runs in order of process and id."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    runs = np.array(ordered, dtype=object).reshape(math.prod(spec.dcn), -1)
    grids = np.array([_slice_grid(spec.ici, list(run)) for run in runs], dtype=object)
    grid = grids.reshape(*spec.dcn, *spec.ici)
    rank = len(spec.axes)
    order = [dim for axis in range(rank) for dim in (axis, rank + axis)]
    shape = [d * i for d, i in zip(spec.dcn, spec.ici, strict=True)]
    return grid.transpose(order).reshape(shape)
