"""Compiling with open ears: what XLA does only as a last resort is an error, or a warning."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import (
    LayoutError,
    RematerializationError,
    RematerializationWarning,
    kind_of,
)
from shardflax.partitioning.given import check_mesh
from shardflax.partitioning.hlo import Program, parse
from shardflax.partitioning.origin import mesh_of
from shardflax.partitioning.rematerialization import Rematerialization, from_log, from_program
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh, mesh_in_scope, rules_in_scope
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.stderr_tap import listen

__all__ = ["Diagnostics", "compile", "compile_diagnostics"]

Then = Literal["error", "warn", "collect"]


@dataclass
class Diagnostics:
    """What compiling brought to light; complete when the `with` of `compile_diagnostics` ends.

    >>> Diagnostics().rematerializations
    []
    """

    mesh: AnyMesh | None = None
    rules: LogicalRules | None = None
    rematerializations: list[Rematerialization] = field(
        default_factory=lambda: list[Rematerialization]()
    )

    def report(self, then: Then, above: int = 0) -> None:
        """Raises or warns, if anything was found.

        A warning is for the line that is `above` frames over the caller.  Raises
        `RematerializationError` where `then` is 'error'.
        """
        if not self.rematerializations or then == "collect":
            return
        text = _text(self.rematerializations, self.rules)
        if then == "error":
            raise RematerializationError(text, self.rematerializations)
        warnings.warn(text, RematerializationWarning, stacklevel=3 + above)


@contextmanager
def compile_diagnostics(
    mesh: AnyMesh | None = None, rules: LogicalRules | None = None, *, then: Then = "collect"
) -> Generator[Diagnostics]:
    """Notes what XLA says about the programs that are compiled inside, by this thread.

    `mesh` and `rules` (default: those in scope) translate it into specs and names.  At the end,
    `then` says what follows: 'collect' nothing, 'warn' a `RematerializationWarning`, 'error' a
    `RematerializationError`.  XLA's own lines about it do not appear on stderr; everything else
    does.  It says nothing of programs that come from a cache, or if the environment variable
    `TF_CPP_MIN_LOG_LEVEL` is above 1; `compile` looks into the program as well.

    >>> import jax
    >>> with compile_diagnostics() as found:
    ...     compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    >>> found.rematerializations
    []
    """
    _check(then, mesh)
    mesh = mesh if mesh is not None else mesh_in_scope()
    found = Diagnostics(mesh, rules if rules is not None else rules_in_scope())
    with listen() as lines:
        yield found
    notes = (from_log(line, mesh) for line in lines)
    found.rematerializations += [note for note in notes if note is not None]
    found.report(then, above=1)  # the exit of the context manager


def compile(
    program: Any,
    *args: Any,
    mesh: AnyMesh | None = None,
    rules: LogicalRules | None = None,
    then: Then = "error",
    above: int = 0,
    **kwargs: Any,
) -> Any:
    """Compiles a jitted function (for `args` and `kwargs`) or what it was lowered to.

    Gives what `.compile()` gives.  Arrays above `above` bytes that XLA gathers whole on every
    device, only to cut them anew, are a `RematerializationError` ('warn': a warning; 'collect':
    nothing) that says which module, which specs, and what to write.  `mesh` is by default that in
    scope or that of the program's arguments, `rules` those in scope.

    >>> import jax, jax.numpy as jnp
    >>> compile(jax.jit(lambda x: x + 1), jnp.ones(2))(jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """
    _check(then, mesh)
    if not hasattr(program, "lower") and not hasattr(program, "compile"):
        raise LayoutError(
            f"compile: a jitted function is expected, or what it was lowered to, not "
            f"{kind_of(program)}. Write compile(jax.jit(fn), *args)."
        )
    lowered = program.lower(*args, **kwargs) if hasattr(program, "lower") else program
    with listen() as lines:
        compiled = lowered.compile()
    mesh = mesh if mesh is not None else mesh_in_scope() or mesh_of(compiled)
    if mesh is None and not lines:
        return compiled
    found = Diagnostics(mesh, rules if rules is not None else rules_in_scope())
    every = _both(lines, parse(compiled.as_text()), mesh)
    found.rematerializations += [one for one in every if one.bytes > above]
    found.report(then)
    return compiled


def _check(then: str, mesh: AnyMesh | None) -> None:
    """Raises `LayoutError` for what `then` cannot be, or for what is no mesh."""
    if then not in get_args(Then):
        raise LayoutError(f"compile: then={then!r}: {did_you_mean(str(then), get_args(Then))}")
    if mesh is not None:
        check_mesh(mesh)


def _both(lines: Sequence[str], program: Program, mesh: AnyMesh | None) -> list[Rematerialization]:
    """What XLA said, and what the program shows besides, each once."""
    shown = [] if mesh is None else from_program(program, mesh)
    counts = {one.op_name: one.count for one in shown}
    said: dict[Any, Rematerialization] = {}
    for line in lines:
        if note := from_log(line, mesh, program):
            key = (note.op_name, note.shape, note.shardings)
            said[key] = replace(note, count=counts.get(note.op_name, 1))
    names = {one.op_name for one in said.values()}
    unsaid = {
        (one.op_name, one.shape): one for one in shown if one.op_name not in names
    }  # forms of one slice that the compiler wrote several times
    return [*said.values(), *unsaid.values()]


def _text(found: Sequence[Rematerialization], rules: LogicalRules | None) -> str:
    number, it = ("an array", "it") if len(found) == 1 else (f"{len(found)} arrays", "them")
    head = (
        f"XLA gathers {number} whole on every device only to cut {it} anew: it knows no other "
        f'way from one sharding to the next ("involuntary full rematerialization").'
    )
    return "\n".join([head, *(_one(one, rules) for one in found)])


def _one(one: Rematerialization, rules: LogicalRules | None) -> str:
    times = f", {one.count} times a call" if one.count > 1 else ""
    return (
        f"- {one.where}\n"
        f"    array: {one.shape}, {one.bytes} B on each device{times}\n"
        f"    from:  {one.shardings[0] if one.before is None else one.before}\n"
        f"    to:    {one.shardings[1] if one.after is None else one.after}\n"
        f"    cure:  {_cure(one, rules)}"
    )


def _cure(one: Rematerialization, rules: LogicalRules | None) -> str:
    """What to write, by names where rules know them."""
    if one.before is None or one.after is None:
        return "Give the array one layout on both sides, by with_logical_constraint."
    before, after = (_names(spec, len(one.shape), rules) for spec in (one.before, one.after))
    if after is None or before is None:
        return (
            f"lay the array out as {one.after} where it is made, or keep it {one.before} here: "
            f"one with_sharding_constraint, before this operation. On the way between them a "
            f"dim may give its axes to another (all-to-all), if they divide both."
        )
    return (
        f"where the array is made, write with_logical_constraint(x, {after!r}); or keep it as it "
        f"is here, with {before!r}. On the way between them a dim may give its axes to another "
        f"(all-to-all), if they divide both."
    )


def _names(spec: Any, rank: int, rules: LogicalRules | None) -> tuple[str | None, ...] | None:
    """Logical names that the rules turn into `spec`, or None if there are none for some dim."""
    if not isinstance(rules, AxisRules):
        return None
    names: list[str | None] = []
    for entry in (*spec, *[None] * (rank - len(spec))):
        name = _name(spec_axes(entry), rules)
        if name == "":
            return None
        names.append(name)
    return tuple(names)


def _name(axes: tuple[str, ...], rules: AxisRules) -> str | None:
    """The name of an activation whose rule gives `axes`; None for no axes, '' if there is none."""
    if not axes:
        return None
    fits = [n for n, taken in rules if tuple(a.rstrip("?") for a in taken) == axes]
    kinds = ("batch", "length", "act_")
    return next((n for kind in kinds for n in fits if n.startswith(kind)), (*fits, "")[0])
