"""Matrix products and convolutions that several devices of a mesh do in full, each for itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from shardflax.partitioning.hlo import Instruction, Program
from shardflax.partitioning.origin import (
    module_path,
    operation_name,
    shapes_of,
    source_line,
    type_bytes,
)
from shardflax.partitioning.replica_groups import ints
from shardflax.partitioning.scope import AnyMesh
from shardflax.partitioning.sharding_text import spec_of_text
from shardflax.partitioning.spec_check import spec_parts
from shardflax.partitioning.whole_values import lowered_names, tensor_shape

__all__ = ["Repeated", "repeated_operations"]

_LINE = re.compile(r"^\s*%([\w#]+)(?::\d+)? = (?:\"?)([\w.]+)\"? ?(.*) loc\((#loc\d+)\)$")
_TENSOR = re.compile(r"tensor<([^<>]*)>")
_WORK = ("stablehlo.dot_general", "stablehlo.convolution")


@dataclass(frozen=True)
class Repeated:
    """An operation that `times` devices do alike.

    >>> Repeated("up", "dot_general", "model.py:3", (8, 8), 256, 2, None).times
    2
    """

    path: str
    operation: str
    source: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    asked: PartitionSpec | None


@dataclass(frozen=True)
class _Whole:
    """An operation as the program was written: over the whole mesh."""

    work: float
    shape: tuple[int, ...]
    asked: PartitionSpec | None


def repeated_operations(program: Program, lowered: str, mesh: AnyMesh) -> list[Repeated]:
    """Operations of which one device does more than its part.

    `lowered` is the text of what was compiled, with debug information.  The part of a device is
    taken from the constraint on the result, if there is one; without one, an operation counts only
    if each device does all of it.

    >>> from shardflax.partitioning import make_mesh
    >>> repeated_operations(Program(), "", make_mesh("data=8"))
    []
    """
    written = _written(lowered, mesh)
    return [
        one
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.op in ("dot", "convolution")
        for one in _repeated(program, instructions, instruction, written, mesh)
    ]


def _repeated(
    program: Program,
    instructions: list[Instruction],
    made: Instruction,
    written: dict[str, list[_Whole]],
    mesh: AnyMesh,
) -> Iterator[Repeated]:
    types = {i.name: i.type for i in instructions}
    shapes = [shapes_of(types[o])[0] for o in made.operands[:2]] + [shapes_of(made.type)[0]]
    batch = ints(made.attribute(r"lhs_batch_dims=\{([\d,]*)\}") or "")
    done = _work(shapes, batch)
    name, wholes = made.op_name, list[_Whole]()
    while name and not wholes:
        wholes = written.get(name, [])
        name = name.partition("/")[2]
    # One name may stand for several operations: the largest is the one to compare with.
    whole = max(wholes, key=lambda w: w.work, default=None)
    if whole is None or not done:
        return
    parts = mesh.size if whole.asked is None else spec_parts(whole.asked, dict(mesh.shape))
    cut = whole.work / done
    if cut >= parts or (whole.asked is None and cut > 1):
        return
    yield Repeated(
        path=module_path(made.op_name),
        operation=operation_name(made.op_name),
        source=source_line(program, made),
        shape=whole.shape,
        bytes=type_bytes(made.type),
        times=max(round(parts / max(cut, 1)), 2),
        asked=whole.asked,
    )


def _work(shapes: list[tuple[int, ...]], batch: list[int]) -> float:
    """The multiplications of a product of two operands, from the sizes of all three arrays."""
    elements = math.prod(math.prod(shape) for shape in shapes)
    return math.sqrt(elements / math.prod(shapes[0][dim] for dim in batch))


def _written(text: str, mesh: AnyMesh) -> dict[str, list[_Whole]]:
    """The products and convolutions of a lowered program by JAX's name of them."""
    names = lowered_names(text)
    found: list[tuple[str, float, tuple[int, ...], str, int]] = []
    asked: dict[tuple[int, str], PartitionSpec | None] = {}
    function = 0
    for line in text.splitlines():
        if "func.func" in line:
            function += 1
        elif (made := _LINE.match(line)) and made[2] == "sdy.sharding_constraint":
            operand, _, sharding = made[3].partition(" ")
            asked[function, operand.lstrip("%")] = spec_of_text(sharding, mesh)
        elif made and made[2] in _WORK:
            shapes = [tensor_shape(t) for t in _TENSOR.findall(made[3])][-3:]
            batch = re.search(r"batching_dims = \[([\d, ]*)\]", made[3])
            work = _work(shapes, ints(batch[1].replace(" ", "")) if batch else [])
            found.append((made[4], work, shapes[-1], made[1], function))
    written: dict[str, list[_Whole]] = {}
    for loc, work, shape, value, inside in found:
        whole = _Whole(work, shape, asked.get((inside, value)))
        written.setdefault(names.get(loc, ""), []).append(whole)
    return written
