"""What XLA made of a program, as figures that can be compared."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

__all__ = ["Cost", "cost_of", "differences", "instructions"]

_COLLECTIVE = re.compile(
    r"= (?P<shape>\(?[^=]*?) "
    r"(?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_LAYOUT = re.compile(r"\{[^}]*\}")
_METADATA = re.compile(r", (?:metadata|stack_frame_id)=\{[^}]*\}")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%|^\s*(?:ENTRY )?%?\S+ \(")
_NAME = re.compile(r"%[\w.-]+")


@dataclass(frozen=True)
class Cost:
    """Figures of one compiled program, for one device."""

    flops: float
    bytes_accessed: float
    collectives: Counter[str]  # operation and shape -> how often
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    alias_bytes: int


def cost_of(compiled: Any) -> Cost:
    """The figures of a `jax.stages.Compiled`.

    >>> import jax
    >>> cost_of(jax.jit(lambda x: x @ x).lower(jax.numpy.ones((4, 4))).compile()).flops
    128.0
    """
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Cost(
        flops=analysis["flops"],
        bytes_accessed=analysis["bytes accessed"],
        collectives=collectives(compiled.as_text()),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
    )


def instructions(compiled: Any) -> str:
    """The HLO of a `jax.stages.Compiled`, without where it comes from and how things are called.

    Two programs of equal instructions are the same to the processor.

    >>> import jax, jax.numpy as jnp
    >>> def twice(x):
    ...     return 2.0 * x
    >>> compiled = [jax.jit(f).lower(jnp.ones(3)).compile() for f in (twice, lambda x: x * 2.0)]
    >>> instructions(compiled[0]) == instructions(compiled[1])
    True
    """
    text = _METADATA.sub("", compiled.as_text())
    text = "\n".join(line for line in text.splitlines() if _INSTRUCTION.search(line))
    numbers: dict[str, str] = {}
    return _NAME.sub(lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), text)


def collectives(hlo: str) -> Counter[str]:
    """The collective operations of an HLO text, with the shapes they give.

    >>> collectives("%a = f32[8,4]{1,0} all-gather(f32[4,4]{1,0} %b), dimensions={0}")
    Counter({'all-gather f32[8,4]': 1})
    """
    found = _COLLECTIVE.finditer(_LAYOUT.sub("", hlo))
    return Counter(f"{m['op']} {m['shape']}" for m in found)


def differences(a: Cost, b: Cost) -> dict[str, tuple[Any, Any]]:
    """The figures in which two programs differ."""
    left, right = vars(a), vars(b)
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}
