"""Where the devices of a mesh lie: the physical order, which is JAX's.

Neighbours in a mesh should be neighbours in the machine.  On TPUs `jax.experimental.mesh_utils`
knows how; nothing here reshapes the devices of a TPU by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from shardflax.partitioning.errors import MeshSpecError
from shardflax.partitioning.mesh_spec import MeshSpec
from shardflax.partitioning.slices import granules, hardware_slices, in_order

__all__ = ["device_grid"]


def device_grid(spec: MeshSpec, devices: Sequence[Any], split: bool | None = None) -> Any:
    """The devices of a filled spec as an array with one dim for each axis.

    `split` says whether an axis may lie across only a part of a physical axis of the machine;
    None: where it fits no other way.  Raises `MeshSpecError` for devices, or a split, that
    `mesh_utils` refuses, and for slices that would cut a process in two.

    >>> from shardflax.partitioning.mesh_spec import parse_mesh_spec
    >>> import jax
    >>> [[d.id for d in row] for row in device_grid(parse_mesh_spec("a=4,b=2"), jax.devices())]
    [[0, 1], [2, 3], [4, 5], [6, 7]]
    """
    if math.prod(spec.dcn) == 1:
        return _slice_grid(spec, devices, split)
    if devices[0].platform not in ("cpu", "gpu"):

        def hybrid(split: bool) -> Any:
            return mesh_utils.create_hybrid_device_mesh(
                spec.ici, spec.dcn, devices, allow_split_physical_axes=split
            )

        return _ordered(spec, devices, split, hybrid)
    return _hybrid_grid(spec, devices, split)


def _slice_grid(spec: MeshSpec, devices: Sequence[Any], split: bool | None) -> Any:
    """The devices of one slice, in the physical order that suits the spec."""

    def one(split: bool) -> Any:
        return mesh_utils.create_device_mesh(spec.ici, devices, allow_split_physical_axes=split)

    return _ordered(spec, devices, split, one)


def _ordered(
    spec: MeshSpec, devices: Sequence[Any], split: bool | None, make: Callable[[bool], Any]
) -> Any:
    """What `make` gives, with the splits that are allowed, if need be."""
    try:
        try:
            return make(bool(split))
        except NotImplementedError:  # a torus whose axes the spec does not fit
            if split is not None:
                raise
            return make(True)
    except NotImplementedError as error:
        raise MeshSpecError(
            f"mesh {spec.text!r}: its axes are no products of the physical axes of these "
            f"{len(devices)} devices ({devices[0].device_kind}). Choose sizes that are, or say "
            f"allow_split_physical_axes=True: some neighbours are then more than one link apart."
        ) from error
    except (AssertionError, ValueError) as error:
        raise MeshSpecError(
            f"mesh {spec.text!r}: JAX knows no physical order of these {len(devices)} devices "
            f"({devices[0].device_kind}). Pass all devices of a slice, or a block of them whose "
            f"coordinates are a box without holes. JAX says: {_start(error)}"
        ) from error


def _start(error: Exception) -> str:
    """The beginning of what JAX says, which may list thousands of devices."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _hybrid_grid(spec: MeshSpec, devices: Sequence[Any], split: bool | None) -> Any:
    """A hybrid mesh over devices without slices of their own: equal runs of them, in order."""
    runs = math.prod(spec.dcn)
    if hardware_slices(devices) is None:
        _check_runs(spec, granules(devices))
    pieces = np.array(in_order(devices), dtype=object).reshape(runs, -1)
    grids = np.array([_slice_grid(spec, list(run), split) for run in pieces], dtype=object)
    grid = grids.reshape(*spec.dcn, *spec.ici)
    rank = len(spec.axes)
    order = [dim for axis in range(rank) for dim in (axis, rank + axis)]
    return grid.transpose(order).reshape(spec.sizes)


def _check_runs(spec: MeshSpec, groups: int) -> None:
    """Refuses slices that would hold a part of one process and a part of another."""
    runs = math.prod(spec.dcn)
    if runs % groups and groups % runs:
        raise MeshSpecError(
            f"mesh {spec.text!r}: dcn(...) multiplies to {runs}, and the devices are in {groups} "
            f"processes: a slice would be parts of several. Write sizes in dcn(...) that multiply "
            f"to {groups}, or to a divisor of it."
        )
