"""The shardings that compilers print, as specs of a mesh.

XLA writes where each device lies among the tiles (`{devices=[2,1,4]<=[8]
last_tile_dim_replicate}`), newer versions which axes cut each dim (`{mesh['a'=2,'b'=4], [{'a'},
{}]}`), and Shardy the latter in its own way (`<@mesh, [{"a"}, {}]>`).
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from shardflax.partitioning.replica_groups import device_numbers, ints
from shardflax.partitioning.scope import AnyMesh
from shardflax.partitioning.spec_check import make_spec

__all__ = ["spec_of_text", "spec_of_tiles", "tile_counts"]

_TILES = re.compile(r"devices=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))")
_SUBGROUPS = re.compile(r"last_tile_dims=\{([^}]*)\}")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?")
_DIMS = re.compile(r", ?\[((?:\{[^}]*\}(?:p\d+)?(?:, ?)?)*)\]")
_AXIS = re.compile(r"""['"]([^'"]+)['"](?::\((\d+)\)(\d+))?""")


def spec_of_text(text: str, mesh: AnyMesh) -> PartitionSpec | None:
    """The spec that a printed sharding means on `mesh`; None where no spec of it says the same.

    That is so for a part of an axis, devices in another order, one device alone, or manual axes.

    >>> from shardflax.partitioning import make_mesh
    >>> mesh = make_mesh("data=2,tensor=4")
    >>> spec_of_text("{devices=[1,4,2]<=[2,4]T(1,0) last_tile_dim_replicate}", mesh)
    P(None, 'tensor')
    >>> spec_of_text("{mesh['data'=2,'tensor'=4], [{'tensor', 'data'}, {}]}", mesh)
    P(('tensor', 'data'),)
    >>> spec_of_text('#sdy.sharding<@mesh, [{"data"}, {?}]>', mesh)
    P('data',)
    """
    if text.strip("{}") == "replicated":
        return PartitionSpec()
    tiles = _tiles(text, mesh)
    return None if tiles is None else spec_of_tiles(tiles, mesh)


def tile_counts(text: str, mesh: AnyMesh) -> tuple[int, ...]:
    """Into how many parts a printed sharding cuts each dim; empty where it does not say.

    >>> from shardflax.partitioning import make_mesh
    >>> tile_counts("{devices=[2,1,4]<=[8] last_tile_dim_replicate}", make_mesh("data=8"))
    (2, 1)
    """
    tiles = _tiles(text, mesh)
    return () if tiles is None else tuple(int(places.max()) + 1 for places in tiles)


def spec_of_tiles(tiles: list[Any], mesh: AnyMesh) -> PartitionSpec | None:
    """The spec under which device i holds the tile `tiles[dim][i]` of each dim, or None.

    Devices are numbered as in the mesh.

    >>> from shardflax.partitioning import make_mesh
    >>> spec_of_tiles([np.array([0, 0, 1, 1, 2, 2, 3, 3])], make_mesh("data=4,tensor=2"))
    P('data',)
    """
    entries = [_axes_of(places, mesh) for places in tiles]
    used = [axis for entry in entries for axis in entry or ()]
    if None in entries or len(used) != len(set(used)):
        return None
    return make_spec(entries)


def _axes_of(places: Any, mesh: AnyMesh) -> tuple[str, ...] | None:
    """The axes along which the tiles of one dim are counted, the slowest first."""
    shape = tuple(mesh.shape.values())
    if places.size != math.prod(shape):
        return None
    places = places.reshape(shape)
    steps = {
        axis: int(np.take(places, 1, dim).flat[0] - places.flat[0])
        for dim, (axis, size) in enumerate(mesh.shape.items())
        if size > 1 and (np.diff(places, axis=dim) != 0).any()
    }
    axes = sorted(steps, key=lambda axis: -steps[axis])
    rebuilt: Any = np.zeros(shape, int)
    for axis in axes:
        dim = mesh.axis_names.index(axis)
        index: Any = np.indices(shape)[dim]
        rebuilt = rebuilt * shape[dim] + index
    return tuple(axes) if (rebuilt == places).all() else None


def _tiles(text: str, mesh: AnyMesh) -> list[Any] | None:
    """For each dim, which tile of it each device holds."""
    if found := _TILES.search(text):
        return _tiles_by_number(text, found)
    if found := _MESH.search(text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", found[1])}
        over = found[2] or str(math.prod(sizes.values()))
        return _tiles_by_axes(text[found.end() :], sizes, device_numbers(over, found[3]))
    if "sdy.sharding" in text or "<@" in text:
        return _tiles_by_axes(text, dict(mesh.shape), np.arange(mesh.size))
    return None


def _tiles_by_number(text: str, found: re.Match[str]) -> list[Any]:
    counts = ints(found[1])
    devices = np.array(ints(found[4])) if found[4] else device_numbers(found[2], found[3])
    places = np.empty((len(counts), devices.size), int)
    places[:, devices.reshape(-1)] = np.indices(counts).reshape(len(counts), -1)
    subgroups = _SUBGROUPS.search(text)
    extra = len(subgroups[1].split(",")) if subgroups else "last_tile_dim_replicate" in text
    return list(places[: len(counts) - int(extra)])


def _tiles_by_axes(text: str, sizes: dict[str, int], devices: Any) -> list[Any] | None:
    listed = _DIMS.search(text)
    if listed is None:
        return None
    index = np.empty((len(sizes), devices.size), int)
    index[:, devices.reshape(-1)] = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    at = dict(zip(sizes, index, strict=True))
    tiles: list[Any] = []
    for entry in re.findall(r"\{([^}]*)\}", listed[1]):
        places = np.zeros(devices.size, int)
        for axis, before, part in _AXIS.findall(entry):
            if axis not in sizes:
                return None
            size = int(part) if part else sizes[axis]
            inner = sizes[axis] // (int(before) * size) if part else 1
            places = places * size + at[axis] // inner % size
        tiles.append(places)
    return tiles
