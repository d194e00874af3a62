"""Values between the operations of a compiled program that every device holds whole."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from shardflax.partitioning.dataflow import Dataflow, Place
from shardflax.partitioning.hlo import Instruction, Program
from shardflax.partitioning.origin import (
    module_path,
    operation_name,
    shapes_of,
    source_line,
    type_bytes,
)
from shardflax.partitioning.replica_groups import ints

__all__ = ["WholeValue", "lowered_names", "tensor_shape", "whole_values"]

_LOC = re.compile(r'^(#loc\d+) = loc\("([^"]+)"')
_MADE = re.compile(  # on one line, or the last of an operation with a body
    r"^\s*(?:%[\w#]+ = \"?(?:stablehlo|chlo)\.(\w+)|\}\) : ).*tensor<([^<>]*)> loc\((#loc\d+)\)$"
)
_TRIVIAL = {"constant", "iota", "broadcast_in_dim", "optimization_barrier"}
# What makes no new value: the arguments of a program, and arrays as they were under another name.
_NO_VALUES = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "broadcast"}
_MOVES = {"bitcast", "copy", "reshape", "transpose", "convert"}


@dataclass(frozen=True)
class WholeValue:
    """A value that lies whole on every device.

    >>> WholeValue("block", "exp", "model.py:3", (8, 8), 256).bytes
    256
    """

    path: str
    operation: str
    source: str
    shape: tuple[int, ...]
    bytes: int


def whole_values(
    program: Program, lowered: str, known: Collection[tuple[int, ...]], above: int
) -> Iterator[WholeValue]:
    """Values of more than `above` bytes whose part on one device is all of it, the first of each.

    Values of the shapes `known` (of weights, which are gathered for their use) do not count, nor
    what a collective gives.

    >>> list(whole_values(Program(), "", (), 0))
    []
    """
    if not program.entry:
        return
    flow, written, seen = Dataflow(program), _written(lowered), set[str]()
    for place, made in flow.walk():
        inside = place.call is not None and place.call.op != "while"
        if inside or made.op in _NO_VALUES or made.op_name in seen:
            continue
        if made.type.startswith("(") or type_bytes(made.type) <= above:
            continue
        whole = _shape_of(made.op_name, written)
        local = shapes_of(made.type)[0]
        if whole is None or math.prod(whole) != math.prod(local) or whole in known:
            continue
        if not _gathered(flow, place, made):
            seen.add(made.op_name)
            yield WholeValue(
                path=module_path(made.op_name),
                operation=operation_name(made.op_name),
                source=source_line(program, made),
                shape=whole,
                bytes=type_bytes(made.type),
            )


def _gathered(flow: Dataflow, place: Place, made: Instruction) -> bool:
    """True for what a collective gave, moved about or not."""
    place, made = flow.source(place, made.name)
    while made.op in _MOVES and made.operands:
        place, made = flow.source(place, made.operands[0])
    return made.op.startswith(("all-", "collective-", "reduce-scatter")) or made.op == "parameter"


def _shape_of(op_name: str, written: dict[str, list[tuple[int, ...]]]) -> tuple[int, ...] | None:
    """The shape of an operation as it was written, the largest if its name stands for several."""
    while op_name and op_name not in written:
        op_name = op_name.partition("/")[2]
    return max(written.get(op_name, ()), key=math.prod, default=None)


def _written(lowered: str) -> dict[str, list[tuple[int, ...]]]:
    names = lowered_names(lowered)
    found: dict[str, list[tuple[int, ...]]] = {}
    for line in lowered.splitlines():
        made = _MADE.match(line)
        if made and made[1] not in _TRIVIAL and made[3] in names:
            found.setdefault(names[made[3]], []).append(tensor_shape(made[2]))
    return found


def lowered_names(lowered: str) -> dict[str, str]:
    """JAX's names of operations by the location that a lowered program gives them.

    >>> lowered_names('#loc7 = loc("jit(f)/up/add"(#loc3))')
    {'#loc7': 'jit(f)/up/add'}
    """
    return {found[1]: found[2] for line in lowered.splitlines() if (found := _LOC.match(line))}


def tensor_shape(text: str) -> tuple[int, ...]:
    """The shape in what stands between the brackets of a tensor's type.

    >>> tensor_shape("8x16xf32"), tensor_shape("f32")
    ((8, 16), ())
    """
    return tuple(ints(",".join(part for part in text.split("x")[:-1] if part.isdigit())))
