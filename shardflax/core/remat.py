"""Lifted `jax.checkpoint`, with policies by name, and names that are checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from shardflax.core import staging
from shardflax.core.boundary import Groups, Lift, Pure, State
from shardflax.core.names import CollectionFilter
from shardflax.core.transform_errors import RematNameError, RematPolicyError
from shardflax.core.transforms import argnums

__all__ = ["remat", "remat_policy"]


def remat_policy(policy: Any) -> Callable[..., bool] | None:
    """A rematerialisation policy from a function, or from its name in `jax.checkpoint_policies`.

    Policies that take names of values are written with them: `save_only_these_names(qkv, out)`.
    Raises `RematPolicyError` for a policy that JAX does not have, with the closest that it has.

    >>> remat_policy("nothing_saveable") is jax.checkpoint_policies.nothing_saveable
    True
    >>> callable(remat_policy("save_only_these_names(qkv, out)"))
    True
    """
    if not isinstance(policy, str):
        return policy
    found = re.fullmatch(r"(\w+)(?:\(([\w\s,./-]*)\))?", policy)
    name, names = found.groups() if found else (policy, None)
    known = {n for n in dir(jax.checkpoint_policies) if n.endswith(_PLAIN)}
    if names is not None:
        known = {n for n in dir(jax.checkpoint_policies) if n.endswith("_these_names")}
        known -= {"save_and_offload_only_these_names"}
    if name not in known:
        raise RematPolicyError(policy, known)
    chosen = getattr(jax.checkpoint_policies, name)
    return chosen if names is None else chosen(*[n.strip() for n in names.split(",")])


_PLAIN = ("able", "saveable", "dots", "dims")  # policies that take no arguments end so


def remat(
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | Iterable[int] = (),
    policy: Any = None,
) -> Lift:
    """`jax.checkpoint`: what is computed inside is computed anew for the backward pass.

    `policy` says what is kept: a function of `jax.checkpoint_policies` or a name of one, see
    `remat_policy`.  Raises `RematNameError` if a policy of JAX names values
    (`jax.ad_checkpoint.checkpoint_name`) that nothing inside carries: it would save nothing, and
    say nothing.  `variables` and `rngs` are the collections and streams that the module sees;
    `static_argnums` counts the module as 0.  `concrete` is there for programs that pass it, and
    must be false: today's JAX has no such option.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> model = nn.remat(nn.Dense, policy="dots_saveable")(2)
    >>> model.init_with_output(jax.random.key(0), jnp.ones((1, 3)))[0].shape
    (1, 2)
    """
    if concrete:
        raise ValueError(
            "remat: concrete must be False; say in static_argnums which arguments are not traced."
        )
    nums = argnums(static_argnums, before=0)
    policy = remat_policy(policy)
    named = staging.policy_names(policy)

    def run(pure: Pure, state: State, *args: Any, **kwargs: Any) -> tuple[Any, Groups]:
        # JAX caches what it traced by the function, equal ones included: a lambda equals no other.
        def body(*args: Any, **kwargs: Any) -> Any:
            return _checked(pure, named, args, kwargs) if named else pure(*args, **kwargs)

        checkpointed = staging.jx.checkpoint(
            body, prevent_cse=prevent_cse, static_argnums=nums, policy=policy
        )
        return checkpointed(state, *args, **kwargs)

    return Lift.whole(run, variables, rngs)


def _checked(pure: Pure, named: frozenset[str], args: Any, kwargs: Any) -> Any:
    """Calls `pure`, traced once, and sees which names its values carry."""
    result, carried = staging.with_checkpoint_names(lambda: pure(*args, **kwargs))
    if not named <= carried:
        raise RematNameError(pure.entries[pure.home].path, named - carried, carried)
    return result
