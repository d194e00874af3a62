"""Errors of lifted transforms: see `shardflax.core.errors`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from shardflax.core.errors import FlaxError, did_you_mean

_jax: Any = jax  # half typed

__all__ = [
    "BranchVariablesError",
    "LoopVariantBroadcastError",
    "NondiffArgnumsError",
    "RematNameError",
    "RematPolicyError",
    "TransformAxisError",
    "TransformTargetError",
    "TransformedMethodReturnValueError",
]


class TransformTargetError(FlaxError):
    """The target of a lifted transform is neither a module class nor a function of a module.

    >>> print(TransformTargetError(3))
    a lifted transform takes a Module class, ...
    """

    def __init__(self, target: Any) -> None:
        super().__init__(
            f"a lifted transform takes a Module class, or a function with a module as its first "
            f"argument; got {target!r}. For an instance, lift a function that calls it."
        )


class TransformAxisError(FlaxError):
    """The size of a mapped or scanned dim cannot be found out, or sizes differ.

    >>> print(TransformAxisError("vmap: axis 2 does not exist"))
    vmap: axis 2 does not exist
    """


class BranchVariablesError(FlaxError, TypeError):
    """The branches of a lifted `cond` or `switch` write different variables.

    >>> print(BranchVariablesError(("gate",), {0: ({},), 1: ({"state": {"n": 1}},)}))
    at /gate: the branches of a cond or switch write different variables: ...
    """

    def __init__(self, path: tuple[str, ...], written: Mapping[int, Any]) -> None:
        found = [f"branch {i} writes {_described(w)}" for i, w in sorted(written.items())]
        super().__init__(
            f"at /{'/'.join(path)}: the branches of a cond or switch write different variables: "
            f"{'; '.join(found)}. Make variables and submodules before the branches (call each "
            f"branch once at init), or in every branch, under the same names and shapes."
        )


def _described(tree: Any) -> str:
    """The variables in a tree of groups, of scopes, of collections."""
    leaves = _jax.tree.leaves_with_path(tree)
    named = [f"{_jax.tree_util.keystr(p[2:], simple=True, separator='/')}: {x}" for p, x in leaves]
    return ", ".join(named) or "nothing"


class LoopVariantBroadcastError(FlaxError):
    """A broadcast variable or output of `scan` depends on what the loop changes.

    >>> print(LoopVariantBroadcastError(["batch_stats/norm/mean"]))
    scan: these broadcast values depend on the carry or on a scanned input, ...
    """

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"scan: these broadcast values depend on the carry or on a scanned input, so they "
            f"differ from step to step: {', '.join(paths)}. Scan them (variable_axes, out_axes) "
            f"or carry them (variable_carry)."
        )


class NondiffArgnumsError(FlaxError, ValueError):
    """`nondiff_argnums` of a lifted `custom_vjp` is the position of no argument after the module.

    >>> print(NondiffArgnumsError(("block",), 0, 2))
    at /block: custom_vjp: nondiff_argnums has 0; expected positions from 1 to 2. The module, ...
    """

    def __init__(self, path: tuple[str, ...], found: int, count: int) -> None:
        expected = f"positions from 1 to {count}" if count else "none: there are no arguments"
        super().__init__(
            f"at /{'/'.join(path)}: custom_vjp: nondiff_argnums has {found}; expected {expected}. "
            f"The module, which has 0, is not counted among the arguments without gradients: leave "
            f"its collections out of grad_vars."
        )


class RematNameError(FlaxError):
    """A rematerialisation policy names values that nothing inside carries.

    >>> print(RematNameError(("block",), {"qvk"}, {"qkv", "out"}))
    at /block: the policy of remat names 'qvk', but ...; did you mean 'qkv'?
    """

    def __init__(
        self, path: tuple[str, ...], missing: Iterable[str], carried: Iterable[str]
    ) -> None:
        names = sorted(missing)
        hint = did_you_mean(names[0], carried) if carried else "no value carries a name."
        super().__init__(
            f"at /{'/'.join(path)}: the policy of remat names {', '.join(map(repr, names))}, but "
            f"no value computed inside carries it (jax.ad_checkpoint.checkpoint_name(x, name)), "
            f"so it would have no effect; {hint}"
        )


class RematPolicyError(FlaxError):
    """A rematerialisation policy has a name that does not exist.

    >>> print(RematPolicyError("dots_savable", ["dots_saveable"]))
    remat has no policy 'dots_savable'; did you mean 'dots_saveable'?
    """

    def __init__(self, policy: str, known: Iterable[str]) -> None:
        super().__init__(f"remat has no policy {policy!r}; {did_you_mean(policy, known)}")


class TransformedMethodReturnValueError(FlaxError):
    """A lifted method returns a module or a variable, which ends with the transform.

    >>> print(TransformedMethodReturnValueError("encode", "Dense"))
    the lifted method encode returns a Dense, ...
    """

    def __init__(self, method: str, found: str) -> None:
        super().__init__(
            f"the lifted method {method} returns a {found}, which belongs to the inside of the "
            f"transform. Return arrays: call the module, or take the value of the variable."
        )
