"""Errors: one class per cause.

Inner code raises short.  Each message says where, what was expected, what was found, and what to
write instead.  The names are those of Linen's catalogue.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, cast

__all__ = [
    "ApplyScopeInvalidVariablesStructureError",
    "ApplyScopeInvalidVariablesTypeError",
    "FlaxError",
    "InvalidFilterError",
    "InvalidRngError",
    "InvalidScopeError",
    "JaxTransformError",
    "LazyInitError",
    "ModifyScopeVariableError",
    "NameInUseError",
    "ScopeCollectionNotFound",
    "ScopeParamNotFoundError",
    "ScopeParamShapeError",
    "ScopeVariableNotFoundError",
    "did_you_mean",
]


class FlaxError(Exception):
    """The base class of every error that this library raises on purpose.

    >>> issubclass(ScopeParamNotFoundError, FlaxError)
    True
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of `known`, or lists them all.

    >>> did_you_mean("emebd", ["embed", "mlp"])
    "did you mean 'embed'?"
    >>> did_you_mean("FSDP", ["dp", "fsdp"])
    "did you mean 'fsdp'?"
    >>> did_you_mean("zzz", ["embed", "mlp"])
    'known: embed, mlp.'
    """
    names = sorted(known)
    lower = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return (
        f"did you mean {lower[close[0]]!r}?" if close else f"known: {', '.join(names) or 'none'}."
    )


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


# --- filters and streams


class InvalidFilterError(FlaxError):
    """A collection or stream filter is none of bool, str, collection of str, `DenyList`.

    >>> str(InvalidFilterError(3))
    'a filter is a bool, a name, a collection of names or DenyList(...); got int: 3.'
    """

    def __init__(self, spec: Any) -> None:
        super().__init__(
            f"a filter is a bool, a name, a collection of names or DenyList(...); "
            f"got {type(spec).__name__}: {spec!r}."
        )


class InvalidRngError(FlaxError, ValueError):
    """A key is needed from a stream that the run does not have, or a seed is no key.

    >>> print(InvalidRngError("at /drop: no stream"))
    at /drop: no stream
    """


# --- scopes and their variables


class InvalidScopeError(FlaxError):
    """A module or variable is used after its run, or the transform it was made in, has ended.

    >>> print(InvalidScopeError(("block",)))
    at /block: this module belongs to an init, apply or transform that has ended. ...
    """

    def __init__(self, path: tuple[str, ...]) -> None:
        super().__init__(
            f"at /{'/'.join(path)}: this module belongs to an init, apply or transform that has "
            f"ended. Use the module inside of it, or make one that stays with "
            f"module.bind(variables)."
        )


class JaxTransformError(FlaxError):
    """A module is used inside of a JAX transform that it was not made in.

    >>> print(JaxTransformError(("block",)))
    below /block: a module is used inside of a JAX transform ...
    """

    def __init__(self, path: tuple[str, ...]) -> None:
        super().__init__(
            f"below /{'/'.join(path)}: a module is used inside of a JAX transform (jax.jit, "
            f"jax.vmap, jax.lax.scan, ...) that was entered after the module was bound, so its "
            f"state would leak out of the trace. Use the lifted transform of the same name "
            f"(nn.jit, nn.vmap, nn.scan, ...), or call module.init and module.apply inside of "
            f"the JAX transform."
        )


class NameInUseError(FlaxError, ValueError):
    """A submodule or variable has a name that its module uses already.

    >>> print(NameInUseError("submodule", "out", "/block"))
    at /block: the name 'out' of this submodule is in use in the same module. ...
    """

    def __init__(self, kind: str, name: str, where: str) -> None:
        super().__init__(
            f"at {where}: the name {name!r} of this {kind} is in use in the same module. Give it "
            f"another name, or share one submodule by calling it twice."
        )


class ScopeParamNotFoundError(FlaxError):
    """A parameter is missing from the variables passed to `apply`.

    >>> print(ScopeParamNotFoundError("kernel", "/block", ["kernal"]))
    at /block: the variables have no parameter 'kernel'; did you mean 'kernal'? ...
    """

    def __init__(self, name: str, where: str, found: Iterable[str]) -> None:
        super().__init__(
            f"at {where}: the variables have no parameter {name!r}; {did_you_mean(name, found)} "
            f"The module declares it, so the variables are those of another model, or of this one "
            f"with other options."
        )


class ScopeCollectionNotFound(FlaxError):
    """A whole collection is missing from the variables passed to `apply`.

    >>> print(ScopeCollectionNotFound("state", "count", "/"))
    at /: the variable 'count' is looked for in the collection 'state', ...
    """

    def __init__(self, col: str, name: str, where: str) -> None:
        super().__init__(
            f"at {where}: the variable {name!r} is looked for in the collection {col!r}, and the "
            f"variables have no such collection. Pass it to apply ({{{col!r}: ..., ...}}), or let "
            f"apply make it with mutable=[{col!r}]."
        )


class ScopeVariableNotFoundError(FlaxError):
    """A variable is missing from a collection that may not change.

    >>> print(ScopeVariableNotFoundError("count", "state", "/", []))
    at /: the collection 'state' has no variable 'count'; known: none. ...
    """

    def __init__(self, name: str, col: str, where: str, found: Iterable[str]) -> None:
        super().__init__(
            f"at {where}: the collection {col!r} has no variable {name!r}; "
            f"{did_you_mean(name, found)} Pass it to apply, or let apply make it with "
            f"mutable=[{col!r}]."
        )


class ScopeParamShapeError(FlaxError):
    """A parameter passed to `apply` has another shape than the module declares.

    >>> print(ScopeParamShapeError("kernel", "/", [(3, 4)], [(5, 4)]))
    at /: the parameter 'kernel' is declared as 3x4 and the variables hold 5x4 (dim 0: ...
    """

    def __init__(self, name: str, where: str, expected: list[Any], found: list[Any]) -> None:
        want, got = (", ".join(map(_shape, shapes)) for shapes in (expected, found))
        dims = ""
        if len(expected) == len(found) == 1 and len(expected[0]) == len(found[0]):
            pairs = enumerate(zip(expected[0], found[0], strict=True))
            dims = ", ".join(f"dim {i}: {a} against {b}" for i, (a, b) in pairs if a != b)
            dims = f" ({dims})"
        super().__init__(
            f"at {where}: the parameter {name!r} is declared as {want} and the variables hold "
            f"{got}{dims}. Either the input or an option of the module differs from what the "
            f"variables were made with."
        )


class ModifyScopeVariableError(FlaxError):
    """A variable is written whose collection may not change in this run.

    >>> print(ModifyScopeVariableError("state", "count", "/"))
    at /: cannot write the variable 'count': ...
    """

    def __init__(self, col: str, name: str, where: str) -> None:
        super().__init__(
            f"at {where}: cannot write the variable {name!r}: the collection {col!r} may not "
            f"change here. Call apply with mutable=[{col!r}]; inside of a transform, list the "
            f"collection among those that it carries out."
        )


class ApplyScopeInvalidVariablesTypeError(FlaxError):
    """The variables passed to `apply` are no dict of collections.

    >>> print(ApplyScopeInvalidVariablesTypeError([1]))
    apply takes a dict of collections, {'params': {...}}; got list.
    >>> print(ApplyScopeInvalidVariablesTypeError({"params": 3}))
    apply takes a dict of collections, {'params': {...}}; got int for the collection 'params'.
    >>> print(ApplyScopeInvalidVariablesTypeError({0: {}}))
    apply takes a dict of collections, {'params': {...}}; got dict for the collection 0.
    """

    def __init__(self, variables: Any) -> None:
        found = type(variables).__name__
        if isinstance(variables, Mapping):
            items = cast("Mapping[Any, Any]", variables).items()
            good = [isinstance(c, str) and isinstance(v, Mapping) for c, v in items]
            col, value = [*items][good.index(False)]
            found = f"{type(value).__name__} for the collection {col!r}"
        super().__init__(f"apply takes a dict of collections, {{'params': {{...}}}}; got {found}.")


class ApplyScopeInvalidVariablesStructureError(FlaxError):
    """The variables passed to `apply` hold a collection `params` inside of `params`.

    >>> print(ApplyScopeInvalidVariablesStructureError({"params": {"params": {}}}))
    apply got {'params': {'params': ...}}...
    """

    def __init__(self, variables: Any) -> None:
        super().__init__(
            f"apply got {{'params': {{'params': ...}}}} (collections: {sorted(variables)}): the "
            f"variables are wrapped once too often. Pass what init returned as it is."
        )


class LazyInitError(FlaxError):
    """A variable depends on the values of an argument of which only the shape is known.

    >>> print(LazyInitError("params/kernel"))
    lazy_init: 'params/kernel' depends on the values of an argument ...
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"lazy_init: {path!r} depends on the values of an argument that was given as a shape "
            f"(jax.ShapeDtypeStruct). Pass an array for it, or let the initializer use only its "
            f"shape and dtype."
        )
