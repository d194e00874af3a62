"""The text of a compiled program (XLA's HLO), as far as its collectives need it.

Instructions lie in computations that call one another; a loop calls its body as often as it runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Instruction", "Program", "parse"]

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_END = re.compile(r"^\}(?:,? execution_thread=.*)?$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = r"condition=%?([\w.\-]+)"
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_ROW = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")


@dataclass(frozen=True)
class Instruction:
    """One line: what it gives (`type`), what it does, with which operands and attributes.

    `inside` is what stands between the brackets; `root` marks what its computation gives.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    inside: str = ""
    root: bool = False

    @property
    def op_name(self) -> str:
        """The name that JAX gave the operation, or nothing."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression found in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclass
class Program:
    """All computations of a program, and where in the source its instructions come from.

    `partitions` is the number of devices it is for; 0 where it is not said.  `stacks` is what
    `origin` finds out about module paths, and keeps.
    """

    entry: str = ""
    partitions: int = 0
    computations: dict[str, list[Instruction]] = field(default_factory=dict[str, list[Instruction]])
    tables: dict[str, dict[int, str]] = field(default_factory=dict[str, dict[int, str]])
    stacks: dict[str, Any] = field(default_factory=dict[str, Any])

    def counts(self) -> dict[str, int]:
        """How often each computation runs; a loop of unknown length counts as one step."""
        counts: Counter[str] = Counter({self.entry: 1})
        for name in self._callers_first():
            for instruction in self.computations[name]:
                for called, looped in _calls(instruction):
                    trips = (self.trips(name, instruction) or 1) if looped else 1
                    counts[called] += counts[name] * trips
        return dict(counts)

    def endless(self) -> set[str]:
        """The computations inside of a loop whose length the compiler does not know."""
        found: set[str] = set()
        for name in self._callers_first():
            for instruction in self.computations[name]:
                unknown = instruction.op == "while" and not self.trips(name, instruction)
                if unknown or name in found:
                    found.update(called for called, _ in _calls(instruction))
        return found

    def trips(self, name: str, loop: Instruction) -> int | None:
        """How often a loop of the computation `name` runs, or None if nothing tells.

        Compilers for TPUs do not write it down: there, it is the bound of a counter of JAX's own
        loops (`fori_loop`, `scan`), which counts by one and begins at 0, or at the number of steps
        that were taken out of the loop.
        """
        known = loop.attribute(_TRIPS.pattern)
        if known:
            return int(known)
        test = {i.name: i for i in self.computations.get(loop.attribute(_CONDITION) or "", ())}
        root = next((i for i in test.values() if i.root), None)
        if root is None or not root.op_name.endswith("cond/lt"):
            return None
        if root.op != "compare" or root.attribute("direction=(LT)") is None:
            return None
        counter, bound = (test.get(operand) for operand in root.operands)
        place = counter and counter.attribute(r"index=(\d+)")
        if place is None or bound is None or bound.op != "constant" or not bound.inside.isdigit():
            return None
        here = {i.name: i for i in self.computations[name]}
        begin = here.get(loop.operands[0])
        while begin is not None and begin.op in ("tuple", "copy", "bitcast"):
            at = int(place) if begin.op == "tuple" else 0
            begin = here.get(begin.operands[at]) if at < len(begin.operands) else None
        if begin is None or begin.op != "constant" or not begin.inside.isdigit():
            return None
        return int(bound.inside) - int(begin.inside)

    def fused(self) -> dict[str, Instruction]:
        """The computations that are fusions, each with (one of) the instructions that run it."""
        every = (i for found in self.computations.values() for i in found if i.op == "fusion")
        return {called: i for i in every for called, _ in _calls(i)}

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for instruction in self.computations[name]:
                for called, _ in _calls(instruction):
                    visit(called)
            order.append(name)

        visit(self.entry)
        return order[::-1]

    def frames(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Files and lines of the calls that led to an instruction, innermost first."""
        file = instruction.attribute(r'source_file="([^"]*)"')
        line = instruction.attribute(r"source_line=(\d+)")
        if file and line:  # as older versions write it
            yield file, int(line)
        frame = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0)
        while frame:
            row = self._row("StackFrames", frame)
            at = self._row("FileLocations", row.get("file_location_id", 0))
            name = self.tables.get("FileNames", {}).get(at.get("file_name_id", 0))
            if name:
                yield name, at.get("line", 0)
            frame = row.get("parent_frame_id", 1) - 1

    def _row(self, table: str, number: int) -> dict[str, int]:
        text = self.tables.get(table, {}).get(number, "")
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}


def parse(text: str) -> Program:
    """The program that an HLO text describes.

    >>> program = parse('''HloModule m
    ...
    ... ENTRY %main (a: f32[4]) -> f32[8] {
    ...   %a = f32[4]{0} parameter(0)
    ...   ROOT %g = f32[8]{0} all-gather(%a), replica_groups=[1,2]<=[2], dimensions={0}
    ... }''')
    >>> program.computations["main"][1].operands
    ('a',)
    """
    program, current, table = Program(), None, None
    if partitions := re.match(r"HloModule .*\bnum_partitions=(\d+)", text):
        program.partitions = int(partitions[1])
    for line in text.splitlines():
        if current is None and line in _TABLES:
            table = program.tables.setdefault(line, {})
        elif current is None and (row := _ROW.match(line)) and table is not None:
            table[int(row[1])] = row[2] or row[3] or ""
        elif head := _HEAD.match(line):
            current = program.computations.setdefault(head[2], [])
            program.entry = head[2] if head[1] else program.entry
        elif _END.match(line):
            current = None
        elif current is not None and (start := _LINE.match(line)):
            current.append(_instruction(start[2], line[start.end() :], start[1] is not None))
        elif current:  # attributes of kernels (Pallas) go on in the next line
            attributes = f"{current[-1].attributes}\n{line}"
            current[-1] = replace(current[-1], attributes=attributes)
    return program


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing(rest, len(op))
    inside = rest[len(op) + 1 : close - 1]
    operands = re.findall(r"%([\w.\-]+)", inside)
    return Instruction(name, kind, op, tuple(operands), rest[close:], inside, root)


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _calls(instruction: Instruction) -> Iterator[tuple[str, bool]]:
    """The computations that an instruction calls, and whether it does so in a loop."""
    if instruction.op in ("async-update", "async-done"):
        return  # what the start has called already
    for kind, several, one in _CALLED.findall(instruction.attributes):
        for name in re.findall(r"%?([\w.\-]+)", several) if several else [one]:
            yield name, kind in ("body", "condition") and instruction.op == "while"
