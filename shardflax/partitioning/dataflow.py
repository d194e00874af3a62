"""Following values through a compiled program: into fusions, out of them, and into loops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardflax.partitioning.hlo import Instruction, Program

__all__ = ["Dataflow", "Place"]

_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_ARITHMETIC: dict[str, Any] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "divide": np.floor_divide,
    "remainder": np.remainder,
}
_SAME = ("bitcast", "convert", "copy", "reshape", "broadcast")


@dataclass(frozen=True)
class Place:
    """A computation as one instruction calls it, itself in a place; the entry has no `call`."""

    computation: str
    call: Instruction | None = None
    outer: Place | None = None


@dataclass
class Dataflow:
    """The instructions of a program, each in its place, and where their operands are made."""

    program: Program
    _roots: dict[str, Instruction] = field(default_factory=dict[str, Instruction])
    _uses: dict[str, dict[str, list[Instruction]]] = field(
        default_factory=dict[str, dict[str, list[Instruction]]]
    )
    _named: dict[str, dict[str, Instruction]] = field(
        default_factory=dict[str, dict[str, Instruction]]
    )

    def __post_init__(self) -> None:
        for name, instructions in self.program.computations.items():
            self._named[name] = {i.name: i for i in instructions}
            self._roots[name] = next((i for i in instructions if i.root), instructions[-1])
            uses = self._uses.setdefault(name, {})
            for instruction in instructions:
                for operand in dict.fromkeys(instruction.operands):
                    uses.setdefault(operand, []).append(instruction)

    def walk(self) -> Iterator[tuple[Place, Instruction]]:
        """Every instruction that the entry reaches, once for each way of being called."""
        places = [Place(self.program.entry)]
        while places:
            place = places.pop()
            for instruction in self.program.computations.get(place.computation, ()):
                yield place, instruction
                called = _CALLED.search(instruction.attributes)
                if called and called[1] in self._named:
                    places.append(Place(called[1], instruction, place))

    def source(self, place: Place, name: str) -> tuple[Place, Instruction]:
        """What makes the value `name`: through fusions and tuples, and into or out of calls."""
        instruction = self._named[place.computation][name]
        if instruction.op == "get-tuple-element":
            return self._element(place, instruction)
        if (
            instruction.op == "parameter"
            and place.outer
            and place.call
            and place.call.op != "while"
        ):
            return self.source(place.outer, place.call.operands[int(instruction.inside)])
        if instruction.op in ("fusion", "call") and (inner := self._inside(place, instruction)):
            return self.source(inner, self._roots[inner.computation].name)
        return place, instruction

    def uses(self, place: Place, name: str) -> list[tuple[Place, Instruction]]:
        """Who uses a value: inside of fusions, and outside where a fusion gives it; or tuples."""
        found: list[tuple[Place, Instruction]] = []
        for user in self._uses[place.computation].get(name, ()):
            inner = self._inside(place, user) if user.op in ("fusion", "call") else None
            if inner is None:
                found.append((place, user))
                continue
            for parameter in self.program.computations[inner.computation]:
                number = int(parameter.inside) if parameter.op == "parameter" else -1
                if number >= 0 and user.operands[number] == name:
                    found += self.uses(inner, parameter.name)
        if self._roots[place.computation].name == name and place.outer and place.call:
            known = place.call.op in ("fusion", "call")
            here = (place.outer, place.call)
            found += self.uses(place.outer, place.call.name) if known else [here]
        return found

    def _inside(self, place: Place, call: Instruction) -> Place | None:
        called = _CALLED.search(call.attributes)
        return Place(called[1], call, place) if called and called[1] in self._named else None

    def _element(self, place: Place, get: Instruction) -> tuple[Place, Instruction]:
        """What makes one element of a tuple; of a loop's state, if no step changes it."""
        index = int(get.attribute(r"index=(\d+)") or 0)
        at, made = self.source(place, get.operands[0])
        if made.op == "parameter" and at.outer and at.call and self._kept(at, index):
            at, made = self.source(at.outer, at.call.operands[0])
        if made.op == "tuple":
            return self.source(at, made.operands[index])
        return place, get

    def _kept(self, body: Place, index: int) -> bool:
        """True if the body of a loop hands the element `index` of its state on as it was."""
        root = self._roots[body.computation]
        if root.op != "tuple":
            return False
        last = self._named[body.computation][root.operands[index]]
        same = last.op == "get-tuple-element" and last.attribute(r"index=(\d+)") == str(index)
        return same and self._named[body.computation][last.operands[0]].op == "parameter"

    def integer(self, place: Place, name: str, devices: int) -> Any:
        """The integer `name` on each device, as an array; None if it is not known when compiled."""
        value = self._value(place, name, devices)
        return None if value is None or value.shape[1] != 1 else value[:, 0]

    def _value(self, place: Place, name: str, devices: int) -> Any:
        """A small array of integers on each device, flat: devices x elements."""
        place, made = self.source(place, name)
        if made.op == "partition-id":
            return np.arange(devices)[:, None]
        if made.op == "constant":
            numbers = re.findall(r"-?\d+|true|false", made.inside)
            values = [int(n) if n.lstrip("-").isdigit() else n == "true" for n in numbers]
            return np.tile(np.array(values, int), (devices, 1)) if len(values) < 1 << 16 else None
        known = made.op in _SAME or made.op in _ARITHMETIC or made.op in ("clamp", "dynamic-slice")
        operands = [self._value(place, o, devices) for o in made.operands] if known else []
        if not operands or any(o is None for o in operands):
            return None
        return _applied(made.op, operands)


def _applied(op: str, operands: list[Any]) -> Any:
    """The result of one operation on integers."""
    if op in _SAME:
        return operands[0]
    if op == "clamp":
        return np.clip(operands[1], operands[0], operands[2])
    if op == "dynamic-slice":  # of one element of a table
        table, *indices = operands
        if len(indices) != 1:
            return None
        index = np.clip(indices[0], 0, table.shape[1] - 1)
        return np.take_along_axis(table, index, axis=1)
    return _ARITHMETIC[op](*operands)
