"""The text of a compiled program (XLA's HLO), as far as its collectives need it.

Instructions lie in computations that call one another; a loop calls its body as often as it runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Instruction", "Program", "parse"]

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
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

    `partitions` is the number of devices it is for; 0 where it is not said.
    """

    entry: str = ""
    partitions: int = 0
    computations: dict[str, list[Instruction]] = field(default_factory=dict[str, list[Instruction]])
    tables: dict[str, dict[int, str]] = field(default_factory=dict[str, dict[int, str]])

    def counts(self) -> dict[str, int]:
        """How often each computation runs; a loop of unknown length counts as one step."""
        counts: Counter[str] = Counter({self.entry: 1})
        for name in self._callers_first():
            for instruction in self.computations[name]:
                for called, trips in _calls(instruction):
                    counts[called] += counts[name] * trips
        return dict(counts)

    def endless(self) -> set[str]:
        """The computations inside of a loop whose length the compiler does not know."""
        found: set[str] = set()
        for name in self._callers_first():
            for instruction in self.computations[name]:
                unknown = instruction.op == "while" and not instruction.attribute(_TRIPS.pattern)
                if unknown or name in found:
                    found.update(called for called, _ in _calls(instruction))
        return found

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
        if current is None and line in (
            "FileNames",
            "FunctionNames",
            "FileLocations",
            "StackFrames",
        ):
            table = program.tables.setdefault(line, {})
        elif current is None and (row := _ROW.match(line)) and table is not None:
            table[int(row[1])] = row[2] or row[3] or ""
        elif head := _HEAD.match(line):
            current = program.computations.setdefault(head[2], [])
            program.entry = head[2] if head[1] else program.entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (start := _LINE.match(line)):
            current.append(_instruction(start[2], line[start.end() :], start[1] is not None))
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


def _calls(instruction: Instruction) -> Iterator[tuple[str, int]]:
    trips = int(instruction.attribute(_TRIPS.pattern) or 1) if instruction.op == "while" else 1
    if instruction.op in ("async-update", "async-done"):
        return  # what the start has called already
    for kind, several, one in _CALLED.findall(instruction.attributes):
        names = re.findall(r"%?([\w.\-]+)", several) if several else [one]
        for name in names:
            yield name, trips if kind in ("body", "condition") else 1
