"""Where a compiled program comes from: its mesh; the module and the line of an instruction."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Mesh, NamedSharding

from shardflax.partitioning.hlo import Instruction, Program
from shardflax.partitioning.untyped import jx

__all__ = ["mesh_of", "module_path", "operation_name", "shapes_of", "source_line", "type_bytes"]

_PACKAGES = tuple(f"{Path(file).parent}{os.sep}" for file in (jax.__file__, Path(__file__).parent))
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_CALLS = os.path.join("shardflax", "core", "calls.py")  # a line of it for each call of a module
_MOST = 2  # paths of one operation that are shown
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# What JAX adds to the names of operations: around a part of the path, and as a part of its own.
_AROUND = re.compile(r"^(?:jvp|transpose|vmap|rematted_computation|custom_vjp|checkpoint)\((.*)\)$")
_BRANCH = re.compile(r"branch_\d+_fun")
_BETWEEN = {"", "body", "checkpoint", "closed_call", "cond", "eval_jaxpr", "pjit", "remat"} | {
    "rematted_computation",
    "scan",
    "shard_map",
    "while",
}


def module_path(called: str) -> str:
    """The module path in the name that JAX gave an operation; its last part is the primitive.

    What XLA makes of several operations has all of their names, and so several paths here.

    >>> module_path("jit(step)/transpose(jvp(layers))/while/body/layers.project/up/dot_general")
    'layers/up'
    >>> module_path("jit(step)/cond/branch_1_fun/up/dot_general")
    'up'
    >>> module_path("jit(step)/jvp(layers)/(up/dot_general:gate/dot_general:norm/mul:down/mul)")
    'layers/(up, gate and 2 more)'
    """
    every = [_module_path(one) for one in _operations(called)]
    paths = [path.split("/") for path in dict.fromkeys(every) if path]
    if len(paths) < 2:
        return "/".join(*paths) if paths else ""
    common = 0
    while common < min(map(len, paths)) - 1 and len({path[common] for path in paths}) == 1:
        common += 1
    rest = ["/".join(path[common:]) for path in paths]
    more = f" and {len(rest) - _MOST} more" if len(rest) > _MOST else ""
    return "/".join([*paths[0][:common], f"({', '.join(rest[:_MOST])}{more})"])


def operation_name(called: str) -> str:
    """The primitive in the name that JAX gave an operation: the last part.

    >>> operation_name("jit(step)/layers/(up/dot_general:norm/mul)")
    'mul'
    """
    return _operations(called)[-1].rpartition("/")[2]


def _operations(called: str) -> list[str]:
    """All names that a name stands for: XLA writes `a/b` and `a/c` as `a/(b:c)`."""
    head, _, rest = f"/{called}".partition("/(")
    if not rest.endswith(")"):
        return [called]
    names: list[str] = [""]
    depth = 0
    for char in rest[:-1]:
        depth += (char == "(") - (char == ")")
        if char == ":" and depth == 0:
            names.append("")
        else:
            names[-1] += char
    return [f"{head}/{name}".lstrip("/") for name in names]


def _module_path(called: str) -> str:
    """The same for the name of one operation."""
    parts: list[str] = []
    for part in called.split("/")[:-1]:
        while found := _AROUND.match(part):
            part = found[1]
        method = parts and part.startswith(f"{parts[-1]}.")  # of the module that was there before
        between = part in _BETWEEN or _BRANCH.fullmatch(part)
        if not between and not method and not part.startswith(("jit(", "pjit(")):
            parts.append(part)
    half = len(parts) // 2
    # A rematerialised region says its path twice: as it was, and where it is computed anew.
    for n in range(half, 0, -1):
        if parts[-n:] == parts[-2 * n : -n]:
            parts = parts[:-n]
            break
    return "/".join(parts)


def mesh_of(compiled: Any) -> Mesh | None:
    """The mesh of the arguments or results of a compiled program, if one of them has one.

    >>> mesh_of(jax.jit(lambda x: x).lower(1.0).compile()) is None
    True
    """
    shardings = jx.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = (cast(Mesh, s.mesh) for s in shardings if isinstance(s, NamedSharding))
    return next(meshes, None)


def source_line(program: Program, instruction: Instruction) -> str:
    """The innermost line that is neither JAX's nor this library's, as `file.py:12`, or nothing.

    A line of other installed packages is given where no line outside of them is known.

    >>> source_line(Program(), Instruction("a", "f32[]", "add", (), ""))
    ''
    """
    found = _stack(program, instruction)
    if not found.lines:
        return ""
    path = module_path(instruction.op_name)
    # JAX forgets where a rematerialised function was called: others of that module know.
    others = _stacks(program).get(path, ()) if path else ()
    lost = [o.lines[0] for o in others if o.calls > found.calls and set(o.lines) > {*found.lines}]
    file, line = Counter(lost).most_common(1)[0][0] if lost else found.lines[0]
    return f"{Path(file).name}:{line}"


class _Stack(NamedTuple):
    """How an instruction was reached: lines of the user's, innermost first; calls of modules."""

    lines: tuple[tuple[str, int], ...]
    calls: int


def _stack(program: Program, instruction: Instruction) -> _Stack:
    frames = list(program.frames(instruction))
    lines = tuple(frame for frame in frames if not frame[0].startswith(_PACKAGES))
    own = tuple(frame for frame in lines if not any(part in frame[0] for part in _INSTALLED))
    return _Stack(own or lines, sum(file.endswith(_CALLS) for file, _ in frames))


def _stacks(program: Program) -> dict[str, list[_Stack]]:
    """Those of every module path of a program."""
    if not program.stacks:
        for instructions in program.computations.values():
            for one in instructions:
                if path := module_path(one.op_name):
                    program.stacks.setdefault(path, []).append(_stack(program, one))
    return program.stacks


def shapes_of(text: str) -> list[tuple[int, ...]]:
    """The shapes in a type, or in a tuple of types, as HLO writes it.

    >>> shapes_of("(f32[4,2]{1,0}, s32[])")
    [(4, 2), ()]
    """
    found = re.findall(r"\w+\[([\d,]*)\]", text)
    return [tuple(int(d) for d in dims.split(",") if d) for dims in found]


def type_bytes(text: str) -> int:
    """The size of a type, or of a tuple of types.

    >>> type_bytes("(bf16[4,2]{1,0}, s32[], s4[3])")
    22
    """
    total = 0
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", text):
        bits = _BITS.get(kind) if kind in _BITS else int((re.findall(r"\d+", kind) or ["8"])[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * (bits or 0)
    return (total + 7) // 8
