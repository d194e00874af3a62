"""What can be wrong with a layout: one class per cause.

Every class is a `LayoutError`, which is a `ValueError` as well: Linen raises that for the causes
it notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardflax.core.errors import FlaxError

__all__ = [
    "AxisConflictError",
    "CollectivesError",
    "IndivisibleDimError",
    "InvalidRuleError",
    "LayoutError",
    "LibtpuError",
    "LockDriftError",
    "LockFileError",
    "MeshScopeError",
    "MeshSpecError",
    "NamesRankError",
    "NoRulesWarning",
    "OverrideError",
    "PartitionNameMismatchError",
    "PartitioningUnspecifiedError",
    "Problem",
    "RematerializationError",
    "RematerializationWarning",
    "RepeatedNameError",
    "SilentReplicationError",
    "TreeMismatchError",
    "UnknownAxisError",
    "UnknownNameError",
    "UnknownPresetError",
    "UnknownTopologyError",
    "kind_of",
    "mapped_over",
    "no_devices",
    "problems_text",
    "raise_problems",
]


class LayoutError(FlaxError, ValueError):
    """A layout that cannot be; `problems` lists all causes that were found at once.

    >>> issubclass(UnknownNameError, LayoutError)
    True
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class CollectivesError(LayoutError):
    """A compiled program communicates otherwise than it should.

    >>> print(CollectivesError(["all-gather over fsdp: expected 0, found 3"]))
    the program communicates otherwise than expected:
    all-gather over fsdp: expected 0, found 3
    """

    def __init__(self, lines: Sequence[str]) -> None:
        text = "\n".join(lines)
        super().__init__(f"the program communicates otherwise than expected:\n{text}")
        self.lines = tuple(lines)

    def __reduce__(self) -> Any:
        return type(self), (self.lines,)


class RematerializationError(LayoutError):
    """A compiled program gathers arrays whole, only to cut them anew; `findings` lists them."""

    def __init__(self, message: str, findings: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class RematerializationWarning(UserWarning):
    """The same as `RematerializationError`, where a warning was asked for."""


class SilentReplicationError(LayoutError):
    """A compiled program holds arrays whole that should be cut; `findings` lists them."""

    def __init__(self, message: str, findings: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class LockDriftError(LayoutError):
    """A layout, or what a step sends, is not what a lock file says.

    >>> print(LockDriftError(["bytes per device: 64 B -> 128 B (+64 B)"]))
    the layout is not what was locked:
    bytes per device: 64 B -> 128 B (+64 B)
    """

    def __init__(self, changes: Sequence[str]) -> None:
        text = "\n".join(changes)
        super().__init__(f"the layout is not what was locked:\n{text}")
        self.changes = tuple(changes)

    def __reduce__(self) -> Any:
        return type(self), (self.changes,)


class LockFileError(FlaxError):
    """A lock file that cannot be read, or written."""

    def __init__(self, path: Any, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.problem)


class LibtpuError(FlaxError):
    """The compiler for TPUs (libtpu) is not installed, or does not work on this host."""


class UnknownTopologyError(LayoutError):
    """A topology of TPUs that does not exist."""


class UnknownNameError(LayoutError):
    """A logical name that no rule knows."""


class UnknownAxisError(LayoutError):
    """A mesh axis that the mesh lacks, or that no rule can mean."""


class NamesRankError(LayoutError):
    """Names whose number differs from the rank of their array."""


class RepeatedNameError(LayoutError):
    """One name on two dims of an array."""


class AxisConflictError(LayoutError):
    """Two dims of an array that claim one axis, neither of them yielding."""


class IndivisibleDimError(LayoutError):
    """A dim whose size the axes of its rule do not divide."""


class InvalidRuleError(LayoutError):
    """A rule that says nothing sensible, whatever the mesh."""


class OverrideError(LayoutError):
    """Names by path that match nothing, or contradict one another, or do not fit."""


class UnknownPresetError(LayoutError):
    """A preset that does not exist."""


class MeshSpecError(LayoutError):
    """A mesh spec that cannot be read, or does not fit the devices."""


class TreeMismatchError(LayoutError):
    """A tree of names, or a layout, that is not of the tree it is used for."""


class MeshScopeError(LayoutError):
    """A constraint or a move that cannot follow its mesh where it stands."""


class PartitioningUnspecifiedError(FlaxError):
    """A transform adds or takes a dim of a boxed variable, and nothing says the dim's name."""

    def __init__(self, box: Any) -> None:
        super().__init__(
            f"a transform (vmap, scan) adds or takes a dim of a variable with the names "
            f'{tuple(box.names)!r}, and "partition_name" is not in its metadata_params. '
            f"Write metadata_params={{'partition_name': 'layers'}} (a name that the rules "
            f"know), or None for a replicated dim."
        )
        self.box = box

    def __reduce__(self) -> Any:
        return type(self), (self.box,)


class PartitionNameMismatchError(LayoutError):
    """A transform takes the dim of one name away, and finds another name there."""


class NoRulesWarning(UserWarning):
    """A constraint by logical names that does nothing, for no rules are in scope."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one array: the error class, the dim (or None), and the words.

    `cure` is the end of the words, where it says what to write in Python.

    >>> print(Problem(UnknownNameError, "no rule for the name 'x'", 0, "params/w"))
    params/w: no rule for the name 'x'
    """

    error: type[LayoutError]
    text: str
    dim: int | None = None
    where: str = ""
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text

    @property
    def without_cure(self) -> Problem:
        """The same without what to write in Python: a command has options.

        >>> str(Problem(IndivisibleDimError, "4 by 8. Make it 8.", cure="Make it 8.").without_cure)
        '4 by 8.'
        """
        return replace(self, text=self.text.removesuffix(self.cure).rstrip(), cure="")


def kind_of(value: Any) -> str:
    """What was given in place of what is wanted, in two words.

    >>> kind_of(3), kind_of([3]), kind_of(None)
    ('an int', 'a list', 'None')
    """
    if value is None:
        return "None"
    name = type(value).__name__
    return f"a{'n' * (name[0] in 'aeiouAEIOU')} {name}"


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises all `problems` as one error: of their class if they share one, else `LayoutError`.

    >>> raise_problems([])
    """
    if not problems:
        return
    classes = {p.error for p in problems}
    error = classes.pop() if len(classes) == 1 else LayoutError
    raise error(problems_text(problems), problems)


def problems_text(problems: Sequence[Problem]) -> str:
    """What `raise_problems` says.

    >>> print(problems_text([Problem(LayoutError, "one"), Problem(LayoutError, "another")]))
    2 problems in this layout.
    - one
    - another
    """
    lines = [str(p) for p in problems]
    if len(lines) > 1:
        lines = [f"{len(lines)} problems in this layout.", *(f"- {line}" for line in lines)]
    return "\n".join(lines)


def no_devices(what: str, spec: Any, mesh: Any) -> MeshScopeError:
    """The error for a concrete array over an abstract mesh.

    >>> isinstance(no_devices("x", "P('data')", {"data": 2}), MeshScopeError)
    True
    """
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    return MeshScopeError(
        f"{what}: an array that is not traced is to lie as {spec} over an abstract mesh ({axes}), "
        f"which has no devices. Trace the call (jax.jit, jax.eval_shape), or put a mesh with "
        f"devices in scope: make_mesh(...)."
    )


def mapped_over(what: str, spec: Any) -> AxisConflictError:
    """The error for an axis that a `vmap` around has given to the dim that it maps over.

    >>> isinstance(mapped_over("x", "P('data')"), AxisConflictError)
    True
    """
    return AxisConflictError(
        f"{what}: an axis of {spec} is that of the dim over which a vmap around maps (its "
        f"spmd_axis_name, or the axis over which that dim lies). One array has it once: take it "
        f"from one of the two."
    )
