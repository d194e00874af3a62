"""Arrays that XLA gathers whole on every device, only to cut them anew.

It does so where it knows no better way from one sharding to another, and calls it an "involuntary
full rematerialization", in a line on stderr.  The same is seen in the compiled program: an
all-gather, and a slice of what it gave at a place that depends on the device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from shardflax.partitioning.dataflow import Dataflow, Place
from shardflax.partitioning.hlo import Instruction, Program
from shardflax.partitioning.origin import (
    module_path,
    operation_name,
    shapes_of,
    source_line,
    type_bytes,
)
from shardflax.partitioning.replica_groups import instruction_groups, mesh_axes
from shardflax.partitioning.scope import AnyMesh
from shardflax.partitioning.sharding_text import spec_of_text, spec_of_tiles, tile_counts
from shardflax.partitioning.spec_check import make_spec

__all__ = ["Rematerialization", "from_log", "from_program"]

_NOTE = re.compile(
    r"Involuntary full rematerialization.*?from sharding (?P<before>.+?) to (?P<after>.+?)"
    r" (?:efficiently|without doing).*?for HLO operation:? (?P<op>.+?)(?:\. As the last|$)"
)
_MOVES = {"bitcast", "copy", "reshape", "transpose", "convert", "pad", "all-gather-done"}
_TYPE = re.compile(r"\w+\[[\d,]*\]")


@dataclass(frozen=True)
class Rematerialization:
    """One array that is gathered whole and cut anew.

    `path` is the module path and `operation` the last part of JAX's name of the operation;
    `source` the file and line, where the compiled program is known.  `before` and `after` are the
    two specs, None where no spec of the mesh says what the compiler means (`shardings` has its own
    words).  `bytes` is the size of the whole array, which every device holds for a moment, `shape`
    its shape (of the part on one device, if the mesh is not known), `count` how often in one
    call.  `seen` is `log` or `program`.

    >>> found = Rematerialization("layers/up", "dot_general", (8, 4), 128, None, None)
    >>> found.where
    'layers/up (dot_general)'
    """

    path: str
    operation: str
    shape: tuple[int, ...]
    bytes: int
    before: PartitionSpec | None
    after: PartitionSpec | None
    shardings: tuple[str, str] = ("", "")
    source: str = ""
    count: int = 1
    seen: str = "log"
    op_name: str = ""

    @property
    def where(self) -> str:
        """Module path, operation, and the line in the source if it is known."""
        path = self.path or "outside of all modules"
        return f"{path} ({self.operation})" + (f", {self.source}" if self.source else "")

    def __str__(self) -> str:
        before, after = (
            text if spec is None else str(spec)
            for spec, text in zip((self.before, self.after), self.shardings, strict=True)
        )
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{self.where}: {self.shape}, {times}{self.bytes} B whole, {before} -> {after}"


def from_log(
    line: str, mesh: AnyMesh | None, program: Program | None = None
) -> Rematerialization | None:
    """What a line of XLA's log says, or None if it says something else.

    `program` is the compiled one, for the line in the source.

    >>> from shardflax.partitioning import make_mesh
    >>> line = (
    ...     "W0102 03:04:05.6 7 spmd_partitioner.cc:8] [SPMD] Involuntary full rematerialization. "
    ...     "The compiler cannot go from sharding {devices=[8,1]<=[8]} to {devices=[1,8]<=[8]} "
    ...     "efficiently for HLO operation %c = f32[2,16]{1,0} copy(%s), "
    ...     'metadata={op_name="jit(f)/block/mul"}. As the last resort, ...'
    ... )
    >>> print(from_log(line, make_mesh("data=8")))
    block (mul): (16, 16), 1024 B whole, P('data',) -> P(None, 'data')
    """
    found = _NOTE.search(line)
    if found is None:
        return None
    before, after, op = found["before"], found["after"], found["op"]
    name, _, rest = op.partition(" = ")
    kind = _TYPE.search(rest)  # of the part on one device
    shape, size = (shapes_of(kind[0])[0], type_bytes(kind[0])) if kind else ((), 0)
    counts = tile_counts(before, mesh) if mesh is not None else ()
    if len(counts) == len(shape):
        shape = tuple(d * n for d, n in zip(shape, counts, strict=True))
        size *= math.prod(counts)
    instruction = Instruction(name.strip("% "), "", "", (), rest)
    return Rematerialization(
        path=module_path(instruction.op_name),
        operation=operation_name(instruction.op_name) or name.strip("% "),
        shape=shape,
        bytes=size,
        before=spec_of_text(before, mesh) if mesh is not None else None,
        after=spec_of_text(after, mesh) if mesh is not None else None,
        shardings=(before, after),
        source=source_line(program or Program(), instruction),
        op_name=instruction.op_name,
    )


def from_program(program: Program, mesh: AnyMesh) -> list[Rematerialization]:
    """Every array that a compiled program gathers and then cuts by the number of the device.

    Collectives that the program calls itself (`jax.lax.all_gather`) do not count.

    >>> from shardflax.partitioning import make_mesh
    >>> from_program(Program(), make_mesh("data=8"))
    []
    """
    if not program.entry:
        return []
    flow, counts = Dataflow(program), program.counts()
    found: dict[tuple[str, str], Rematerialization] = {}
    for place, instruction in flow.walk():
        if instruction.op == "dynamic-slice":
            for one in _cut_anew(flow, place, instruction, mesh, counts):
                found.setdefault((place.computation, instruction.name), one)
    return list(found.values())


def _cut_anew(
    flow: Dataflow, place: Place, cut: Instruction, mesh: AnyMesh, counts: dict[str, int]
) -> Iterator[Rematerialization]:
    """The finding that a slice is the end of, if it is one."""
    offsets, by_device = _offsets(flow, place, cut, mesh.size)
    found = list(_gathers(flow, place, cut.operands[0])) if any(by_device) else []
    gathers = [gather for _, gather in found]
    if not gathers or any(g.op_name.endswith("/all_gather") for g in gathers):
        return
    if not _only_cut(flow, *found[0], devices=mesh.size):
        return
    tiles = [
        offset // size if cuts else np.zeros(mesh.size, int)
        for offset, size, cuts in zip(offsets, shapes_of(cut.type)[0], by_device, strict=True)
    ]
    before, parts = _gathered(gathers, mesh)
    last = gathers[0]
    kind, shape = _TYPE.findall(last.type)[-1], shapes_of(last.type)[-1]
    yield Rematerialization(
        path=module_path(last.op_name),
        operation=operation_name(last.op_name) or last.name,
        shape=shape,
        bytes=type_bytes(kind),
        before=before,
        after=spec_of_tiles(tiles, mesh) if len(tiles) == len(shape) else None,
        shardings=(parts, "cut by the number of the device"),
        source=source_line(flow.program, last),
        count=counts.get(place.computation, 1),
        seen="program",
        op_name=last.op_name,
    )


def _only_cut(flow: Dataflow, place: Place, made: Instruction, devices: int) -> bool:
    """True if nothing uses a value whole: all that is made of it are slices by the device."""
    uses = flow.uses(place, made.name)
    return bool(uses) and all(
        _only_cut(flow, at, user, devices)
        if user.op in _MOVES
        else user.op == "dynamic-slice" and any(_offsets(flow, at, user, devices)[1])
        for at, user in uses
    )


def _offsets(
    flow: Dataflow, place: Place, cut: Instruction, devices: int
) -> tuple[list[Any], list[bool]]:
    """Where a slice starts in each dim, by device where that is known; and where it differs."""
    offsets = [flow.integer(place, o, devices) for o in cut.operands[1:]]
    return offsets, [o is not None and np.unique(o).size > 1 for o in offsets]


def _gathers(flow: Dataflow, place: Place, name: str) -> Iterator[tuple[Place, Instruction]]:
    """The all-gathers that a value comes from, the last first, if it is just what they gave."""
    place, made = flow.source(place, name)
    while made.operands and (made.op in _MOVES or made.op.startswith("all-gather")):
        if made.op in ("all-gather", "all-gather-start"):
            yield place, made
        place, made = flow.source(place, made.operands[0])


def _gathered(gathers: list[Instruction], mesh: AnyMesh) -> tuple[PartitionSpec | None, str]:
    """Which axes lay on which dims before; no spec, but words, if it was a part of an axis."""
    axes: dict[int, tuple[str, ...]] = {}
    for gather in gathers:
        dim = int(gather.attribute(r"dimensions=\{(\d+)") or 0)
        groups = instruction_groups(gather, mesh.size)
        over = mesh_axes(groups, mesh)
        if len(groups[0]) != math.prod(mesh.shape[axis] for axis in over):
            return None, f"dim {dim} in {len(groups[0])} parts, over a part of {', '.join(over)}"
        axes[dim] = (*axes.get(dim, ()), *over)
    return make_spec(axes.get(dim, ()) for dim in range(max(axes) + 1)), "gathered"
