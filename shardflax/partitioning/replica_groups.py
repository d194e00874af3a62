"""Which devices take part in a collective, and along which mesh axes they differ."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardflax.partitioning.hlo import Instruction
from shardflax.partitioning.scope import AnyMesh

__all__ = ["device_numbers", "groups_of", "instruction_groups", "ints", "mesh_axes"]

_RANGE = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\(\[(.*?)\](?:T\((.*?)\))?\))? ?\{(.*?)\}")
_WANTED = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


def groups_of(text: str, size: int) -> list[list[int]]:
    """The groups of device numbers in what HLO writes: listed, as a range, or by mesh axes.

    An empty list means all `size` devices.  Raises ValueError for anything else.

    >>> groups_of("[2,2]<=[4]", 4), groups_of("{{0,2},{1,3}}", 4)
    ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    >>> groups_of("mesh['data'=2,'tensor'=2] {'tensor'}", 4)
    [[0, 1], [2, 3]]
    """
    if text.startswith("{"):
        listed = [ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]
        return listed or [list(range(size))]
    if found := _RANGE.match(text):
        return device_numbers(found[2], found[3]).reshape(ints(found[1])).tolist()
    if found := _MESH.match(text):
        return _by_axes(*found.groups(), size=size)
    raise ValueError(f"unknown replica groups in HLO: {text!r}")


def instruction_groups(instruction: Instruction, size: int) -> list[list[int]]:
    """The groups of a collective instruction; of a permutation, its pairs of different devices.

    >>> gather = Instruction("g", "f32[8]", "all-gather", ("a",), ", replica_groups=[1,2]<=[2]")
    >>> instruction_groups(gather, 2)
    [[0, 1]]
    """
    pairs = instruction.attribute(r"source_target_pairs=(\{\{[\d,{}]*\}\})")
    if pairs:
        return [g for g in groups_of(pairs, size) if len(set(g)) > 1]
    text = instruction.attribute(r"replica_groups=(\{\{[\d,{}]*\}\}|\{\}|\[.*|mesh.*)")
    return groups_of(text or "{}", size)


def _by_axes(sizes: str, over: str | None, order: str | None, names: str, size: int) -> Any:
    """Groups along some axes, or parts of axes, of a mesh that HLO describes itself."""
    parts = {name: (before, n) for name, before, n in _WANTED.findall(names)}
    shape: list[int] = []
    inside: list[int] = []
    for name, text in re.findall(r"'([^']*)'=(\d+)", sizes):
        length, cut = int(text), parts.get(name)
        before, along = (int(cut[0]), int(cut[1])) if cut and cut[1] else (1, length if cut else 1)
        inside += [len(shape) + 1]
        shape += [before, along, length // (before * along)]
    numbers = device_numbers(over or str(size), order).reshape(shape)
    outside = [i for i in range(len(shape)) if i not in inside]
    count = math.prod(shape[i] for i in inside)
    return numbers.transpose([*outside, *inside]).reshape(-1, count).tolist()


def device_numbers(over: str, order: str | None = None) -> Any:
    """The device numbers 0, 1, ... in the shape `over`, its dims in the `order` that HLO says.

    >>> device_numbers("2,2", "1,0").tolist()
    [[0, 2], [1, 3]]
    """
    shape = ints(over)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(ints(order)) if order else numbers


def ints(text: str) -> list[int]:
    """The numbers of a list.

    >>> ints("1,2")
    [1, 2]
    """
    return [int(n) for n in text.split(",") if n]


def mesh_axes(groups: Sequence[Sequence[int]], mesh: AnyMesh) -> tuple[str, ...]:
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
