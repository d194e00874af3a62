"""Which devices take part in a collective, and along which mesh axes they differ."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

__all__ = ["groups_of", "mesh_axes"]

_RANGE = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\(\[(.*?)\](?:T\((.*?)\))?\))? ?\{(.*?)\}")


def groups_of(text: str, size: int) -> list[list[int]]:
    """The groups of device numbers in what HLO writes: listed, as a range, or by mesh axes.

    An empty list means all `size` devices.  Raises ValueError for anything else.

    >>> groups_of("[2,2]<=[4]", 4), groups_of("{{0,2},{1,3}}", 4)
    ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    >>> groups_of("mesh['data'=2,'tensor'=2] {'tensor'}", 4)
    [[0, 1], [2, 3]]
    """
    if text.startswith("{"):
        listed = [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]
        return listed or [list(range(size))]
    if found := _RANGE.match(text):
        return _shaped(found[2], found[3]).reshape(_ints(found[1])).tolist()
    if found := _MESH.match(text):
        return _by_axes(*found.groups(), size=size)
    raise ValueError(f"unknown replica groups in HLO: {text!r}")


def _by_axes(sizes: str, over: str | None, order: str | None, names: str, size: int) -> Any:
    """Groups along some axes of a mesh that HLO describes itself."""
    axes = re.findall(r"'([^']*)'=(\d+)", sizes)
    numbers = _shaped(over or str(size), order).reshape([int(n) for _, n in axes])
    wanted = re.findall(r"'([^']*)'", names)
    inside = [i for i, (name, _) in enumerate(axes) if name in wanted]
    outside = [i for i in range(len(axes)) if i not in inside]
    count = math.prod(int(axes[i][1]) for i in inside)
    return numbers.transpose([*outside, *inside]).reshape(-1, count).tolist()


def _shaped(over: str, order: str | None) -> Any:
    shape = _ints(over)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def mesh_axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the devices of a group differ; device numbers follow the mesh.

    >>> from shardflax.partitioning import make_mesh
    >>> mesh_axes([[0, 1], [2, 3], [4, 5], [6, 7]], make_mesh("data=4,tensor=2"))
    ('tensor',)
    """
    shape = tuple(mesh.shape.values())
    varies = [False] * len(shape)
    for group in groups:
        for dim, places in enumerate(np.unravel_index(group, shape)):
            varies[dim] |= bool((places != places[0]).any())
    return tuple(str(a) for a, v in zip(mesh.axis_names, varies, strict=True) if v)
