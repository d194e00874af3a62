"""Programs for several slices of TPUs: what they send to the other slices, and who is who in them.

XLA compiles such a program for the devices of *one* slice, and numbers those.  What crosses slices
is no collective instruction: it is handed to the host, which sends it over the data-centre network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from shardflax.partitioning.hlo import Instruction
from shardflax.partitioning.origin import shapes_of, type_bytes
from shardflax.partitioning.slices import slices_of

__all__ = ["Crossing", "crossings", "in_mesh"]

_KIND = r'_xla_megascale_transfer_type="(\w+)"'
_TARGET = r'_xla_megascale_target="([^"]*)"'
_MEETING = r'_xla_host_transfer_rendezvous="([^"]*)"'
_KINDS = {"ONE_TO_ONE": "collective-permute"}


@dataclass(frozen=True)
class Crossing:
    """What one device sends to other slices in one go; `groups` are positions in the mesh.

    >>> Crossing("all-reduce", ((0, 4),), 256, (8, 8)).kind
    'all-reduce'
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    bytes: int
    shape: tuple[int, ...]


def in_mesh(groups: Sequence[Sequence[int]], mesh: Mesh, partitions: int) -> list[list[int]]:
    """Groups of positions in `mesh`, from those of a program of so many `partitions`.

    They are the same, unless the program is that of one slice of several.

    >>> from shardflax.partitioning import make_mesh
    >>> mesh = make_mesh("dcn(fsdp=2) ici(data=2,fsdp=2)")
    >>> in_mesh([[0, 1], [2, 3]], mesh, 4)
    [[0, 1], [4, 5], [2, 3], [6, 7]]
    """
    members = _members(mesh)
    if len(members) == 1 or partitions * len(members) != mesh.size:
        return [list(group) for group in groups]
    return [[int(slice_[i]) for i in group] for slice_ in members for group in groups]


def crossings(
    instructions: Sequence[Instruction], mesh: Mesh
) -> Iterator[tuple[Instruction, Crossing]]:
    """What a computation sends to other slices: which instruction does, and what it is.

    >>> from shardflax.partitioning import make_mesh
    >>> list(crossings([], make_mesh("data=8")))
    []
    """
    got = {
        i.attribute(_MEETING): _first(i.type)
        for i in instructions
        if i.op == "recv" and i.attribute(_KIND)
    }
    for instruction in instructions:
        kind = instruction.attribute(_KIND) if instruction.op == "send" else None
        if kind is None:
            continue
        sent = _first(instruction.type)
        given = got.get(instruction.attribute(_MEETING), sent)
        yield (
            instruction,
            Crossing(
                _KINDS.get(kind, kind.lower().replace("_", "-")),
                tuple(_groups(instruction.attribute(_TARGET) or "", mesh)),
                max(type_bytes(sent), type_bytes(given)),
                shapes_of(given)[0],
            ),
        )


def _first(kind: str) -> str:
    """The array in the type of a send or a receive, which has its state beside it."""
    found = re.match(r"\(?(\w+\[[\d,]*\])", kind)
    return found[1] if found else kind


def _members(mesh: Mesh) -> list[Any]:
    """The positions in the mesh of the devices of each slice, in order."""
    slices = slices_of(mesh).ravel()
    return [np.flatnonzero(slices == one) for one in np.unique(slices)]


def _groups(target: str, mesh: Mesh) -> Iterator[tuple[int, ...]]:
    """The groups of a target such as `{1,2}x{0:15}`: slices by devices of a slice."""
    members = _members(mesh)
    slices, _, inside = target.partition("x")
    several = [_numbers(text) for text in re.findall(r"\{([^}]*)\}", slices)]
    places = [i for text in re.findall(r"\{([^}]*)\}", inside) for i in _numbers(text)]
    # Slices are numbered from 0 on hardware, and from 1 in programs compiled without it.
    base = int(max((max(group) for group in several), default=0) >= len(members))
    for group in several or [list(range(len(members)))]:
        for place in places or range(len(members[0])):
            yield tuple(int(members[one - base][place]) for one in group)


def _numbers(text: str) -> list[int]:
    """The numbers of `0,2` or of `0:15`, whose end is one of them."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
