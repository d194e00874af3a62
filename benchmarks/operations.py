"""Which operations a compiled program does, in whichever order and however they are fused."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from shardflax.partitioning.hlo import Instruction, parse

__all__ = ["operations"]

_NAME = re.compile(r"%([\w.-]+)")
_METADATA = re.compile(
    r", (?:metadata|backend_config|stack_frame_id|frontend_attributes)=\{.*$", re.DOTALL
)
_COMMENT = re.compile(r"/\*.*?\*/")
_FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "fusion", "call")
_COMMUTE = ("add", "multiply", "maximum", "minimum", "and", "or")

# What an operation gives: told by a digest, or, of a tuple, by those of its parts.
Value = str | tuple[Any, ...]


def operations(compiled: Any) -> Counter[str]:
    """How often a `jax.stages.Compiled` does what to what.

    An operation is told by its opcode, shape and attributes and by the operations that it is
    applied to, down to the arguments of the program (sums and products in either order).  Programs
    of equal operations compute the same from the same, at other moments or in other loops at most.

    >>> import jax, jax.numpy as jnp
    >>> def made(fn):
    ...     return jax.jit(fn).lower(*[jnp.ones(3)] * 3).compile()
    >>> one = operations(made(lambda a, b, c: jnp.sin(a + b) @ c))
    >>> one == operations(made(lambda a, b, c: jnp.sin(b + a) @ c))
    True
    >>> one == operations(made(lambda a, b, c: jnp.sin(a + c) @ b))
    False
    """
    parsed = parse(_COMMENT.sub("", compiled.as_text()))
    program = _Program(parsed.computations)
    given = program.run(parsed.entry, None)
    program.found[f"returned: {given}"] += 1
    return program.found


@dataclass
class _Program:
    """Runs computations on digests instead of numbers, and counts what they do."""

    computations: dict[str, list[Instruction]]
    found: Counter[str] = field(default_factory=Counter)

    def run(self, name: str, arguments: list[Value] | None) -> Value:
        """What a computation gives; without arguments, of those that it is told."""
        values: dict[str, Value] = {}
        result: Value = ""
        for one in self.computations[name]:
            operands = [values[operand] for operand in one.operands]
            values[one.name] = value = self._value(one, operands, arguments)
            result = value if one.root else result
        return result

    def _value(self, one: Instruction, operands: list[Value], arguments: Any) -> Value:
        rest = _METADATA.sub("", one.attributes)
        match one.op:
            case "parameter" if arguments is not None:
                return arguments[int(one.inside)]
            case "tuple":
                return tuple(operands)
            case "get-tuple-element" if isinstance(operands[0], tuple):
                return operands[0][int(rest.rpartition("=")[2])]
            case "fusion" | "call":
                (called,) = _NAME.findall(rest)
                return self.run(called, operands)
        rest = _NAME.sub(lambda m: self._called(m[1]), rest)
        parts = sorted(map(str, operands)) if one.op in _COMMUTE else list(map(str, operands))
        literal = "" if operands else one.inside
        text = f"{one.type} {one.op}({literal}{', '.join(parts)}){rest}"
        if one.op not in _FREE:
            self.found[text] += 1
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _called(self, name: str) -> str:
        """A computation that is a part of an operation (the body of a loop), as it is told."""
        return str(self.run(name, None)) if name in self.computations else ""
