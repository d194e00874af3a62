"""Slices: which devices share a fast network (ICI), and which see each other over a slow one (DCN).

Hardware says it (`slice_index`).  Emulated devices have no slices; a program without hardware is
tested as if they had: `fake_slices`, or a mesh whose spec says `dcn(...)`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh

from shardflax.partitioning.errors import MeshSpecError, kind_of
from shardflax.partitioning.untyped import jx

__all__ = [
    "fake_slices",
    "granules",
    "hardware_slices",
    "in_order",
    "networks",
    "remember_runs",
    "slice_of",
    "slices_of",
]

# The slice of each emulated device, by id, while `fake_slices` is entered.
_faked: list[dict[int, int]] = []
# How many runs the spec of a mesh of emulated devices cut it into.  JAX gives one object for equal
# meshes, so the last spec that described one says it.
_runs: weakref.WeakKeyDictionary[Mesh, tuple[int, ...]] = weakref.WeakKeyDictionary()


@contextmanager
def fake_slices(count: int) -> Generator[tuple[tuple[Any, ...], ...]]:
    """Groups the emulated (CPU) devices of this process into `count` slices, as hardware would be.

    Inside, `make_mesh` is as strict as on several slices of TPUs (`dcn(...)` must multiply to
    `count`, or be -1), and `collectives`, `networks` and `mesh_picture` tell ICI from DCN.
    Slices are equal runs of the devices in the order of process and id; they are what `with`
    gives.

    Raises `MeshSpecError` if `count` does not divide the devices.

    >>> from shardflax.partitioning import make_mesh
    >>> with fake_slices(2) as slices:
    ...     mesh = make_mesh("dcn(data=-1) ici(fsdp=-1)")
    ...     networks(mesh)
    {'data': (2, 1), 'fsdp': (1, 4)}
    >>> [device.id for device in slices[1]]
    [4, 5, 6, 7]
    """
    devices = in_order(jx.devices("cpu"))
    if not isinstance(cast(Any, count), int) or count < 1 or len(devices) % count:
        raise MeshSpecError(
            f"fake_slices({count!r}): {len(devices)} devices are no {count} slices of equal size. "
            f"Write a divisor of {len(devices)}."
        )
    size = len(devices) // count
    _faked.append({device.id: i // size for i, device in enumerate(devices)})
    try:
        yield tuple(tuple(devices[i * size : (i + 1) * size]) for i in range(count))
    finally:
        _faked.pop()


def in_order(devices: Sequence[Any]) -> list[Any]:
    """`devices` in the order of slice, process and id.

    >>> import jax
    >>> [device.id for device in in_order(jax.devices()[::-1])]
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return sorted(devices, key=lambda d: (slice_of(d), d.process_index, d.id))


def slice_of(device: Any) -> int:
    """The slice that a device is in; 0 where nothing says that there are several.

    >>> import jax
    >>> with fake_slices(4):
    ...     [slice_of(device) for device in jax.devices()]
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    if device.platform == "cpu":
        return _faked[-1].get(device.id, 0) if _faked else 0
    return getattr(device, "slice_index", None) or 0


def hardware_slices(devices: Sequence[Any]) -> int | None:
    """How many slices a mesh of `devices` has to respect; None where the spec decides.

    TPUs know their slices, and `fake_slices` says so of CPUs.  GPUs are one domain of a fast
    network or many, however a cluster is built.

    >>> import jax
    >>> hardware_slices(jax.devices()) is None
    True
    """
    platform = devices[0].platform if devices else "cpu"
    if platform == "gpu" or (platform == "cpu" and not _faked):
        return None
    return len({slice_of(device) for device in devices})


def granules(devices: Sequence[Any]) -> int:
    """Into how many groups devices without known slices fall: by slice, if any, or by process.

    >>> import jax
    >>> granules(jax.devices())
    1
    """
    slices = len({slice_of(device) for device in devices})
    return slices if slices > 1 else len({device.process_index for device in devices})


def remember_runs(mesh: Mesh, dcn: tuple[int, ...], fast: bool) -> None:
    """Notes how a spec cut a mesh of devices without slices; `fast` says that they have some.

    >>> from shardflax.partitioning import make_mesh
    >>> remember_runs(make_mesh("data=4,fsdp=2"), (2, 1), False)
    >>> networks(make_mesh("dcn(data=2) ici(data=2,fsdp=2)"))
    {'data': (2, 2), 'fsdp': (1, 2)}
    """
    if fast or math.prod(dcn) == 1:
        _runs.pop(mesh, None)
    else:
        _runs[mesh] = dcn


def slices_of(mesh: Mesh) -> Any:
    """The slice of each device of `mesh`, as an array of integers in the shape of the mesh.

    >>> from shardflax.partitioning import make_mesh
    >>> slices_of(make_mesh("dcn(data=2) ici(fsdp=4)")).tolist()
    [[0, 0, 0, 0], [1, 1, 1, 1]]
    """
    known = np.vectorize(slice_of, otypes=[int])(mesh.devices)
    dcn = _runs.get(mesh)
    if dcn is None or _faked or known.max() > 0:
        return known
    shape = mesh.devices.shape
    index = np.indices(shape)
    parts = [i // (size // runs) for i, size, runs in zip(index, shape, dcn, strict=True)]
    return np.ravel_multi_index(parts, dcn)


def networks(mesh: Mesh) -> dict[str, tuple[int, int]]:
    """How many parts of each axis the slow network joins, and how many devices each part has.

    The product of the two is the size of the axis: (2, 4) is an axis of 8 devices in two slices.
    An axis whose parts are of unequal size, which no spec gives, counts as DCN as a whole.  Raises
    `MeshSpecError` for a mesh without devices.

    >>> from shardflax.partitioning import make_mesh
    >>> networks(make_mesh("dcn(data=2) ici(data=2,tensor=2)"))
    {'data': (2, 2), 'tensor': (1, 2)}
    """
    if not isinstance(cast(Any, mesh), Mesh):
        raise MeshSpecError(f"networks: a mesh with devices is expected, not {kind_of(mesh)}.")
    slices = slices_of(mesh)
    found: dict[str, tuple[int, int]] = {}
    for dim, axis in enumerate(mesh.axis_names):
        lines = np.moveaxis(slices, dim, -1).reshape(-1, slices.shape[dim])
        parts = max(len(set(line)) for line in lines.tolist())
        size = slices.shape[dim]
        found[axis] = (parts, size // parts) if size % parts == 0 else (size, 1)
    return found
