"""Lifted control flow: `cond`, `switch` and `while_loop`.

The branches of one call, or the condition and the body of a loop, are functions of the same
modules: they cross together, as one boundary with several functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardflax.core.boundary import Group, Groups, Lift, Pure, State
from shardflax.core.cross import cross
from shardflax.core.names import NONE, CollectionFilter, Names
from shardflax.core.staging import jx
from shardflax.core.transform_errors import BranchVariablesError
from shardflax.core.transforms import NO_AXES, Splits, by_mutability

__all__ = ["cond", "switch", "while_loop"]


def cond(
    pred: Any,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    mdl: Any,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> Any:
    """`jax.lax.cond` over branches `fn(mdl, *operands)`: the result of the branch that is taken.

    `pred` is a boolean scalar.  `variables` and `rngs` say which collections and streams the
    branches see.  Both branches return trees of the same shapes and dtypes, and write the same
    variables: make a variable or a submodule (with a `name`) in both of them, or before.  Raises
    `BranchVariablesError` if they do not.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class Gate(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, on):
    ...         dense = nn.Dense(3)
    ...         dense(x)  # makes the parameters, whichever branch is taken
    ...         return nn.cond(on, lambda m, x: m(x), lambda m, x: x, dense, x)
    >>> y, variables = Gate().init_with_output(jax.random.key(0), jnp.ones((2, 3)), False)
    >>> y.tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def choose(branches: list[Any], *args: Any) -> Any:
        return jx.lax.cond(pred, *branches, *args)

    return _branch(choose, (true_fun, false_fun), (mdl, *operands), variables, rngs)


def switch(
    index: Any,
    branches: Sequence[Callable[..., Any]],
    mdl: Any,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> Any:
    """`jax.lax.switch` over branches `fn(mdl, *operands)`: the result of `branches[index]`.

    `index` is an integer scalar, clamped to the branches there are.  For the rest see `cond`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class Heads(nn.Module):
    ...     def setup(self):
    ...         self.heads = [nn.Dense(2), nn.Dense(2, use_bias=False)]
    ...
    ...     def __call__(self, x, index):
    ...         branches = [lambda m, x, i=i: m.heads[i](x) for i in range(2)]
    ...         if self.is_initializing():
    ...             [branch(self, x) for branch in branches]
    ...         return nn.switch(index, branches, self, x)
    >>> variables = Heads().init(jax.random.key(0), jnp.ones((1, 3)), 0)
    >>> sorted(variables["params"])
    ['heads_0', 'heads_1']
    """

    def choose(branches: list[Any], *args: Any) -> Any:
        return jx.lax.switch(index, branches, *args)

    return _branch(choose, tuple(branches), (mdl, *operands), variables, rngs)


def _branch(
    choose: Callable[..., Any],
    fns: tuple[Callable[..., Any], ...],
    args: tuple[Any, ...],
    variables: CollectionFilter,
    rngs: CollectionFilter,
) -> Any:
    def run(pure: Pure, state: State, *operands: Any) -> tuple[Any, Groups]:
        written: dict[int, Any] = {}

        def branch(i: int) -> Callable[..., Any]:
            def fn(*args: Any) -> Any:
                result, groups = pure.branch(i, turn=i)(*args)
                written[i] = jx.tree.map(jx.typeof, groups)
                return result, groups

            return fn

        try:
            return choose([branch(i) for i in range(len(fns))], state, *operands)
        except TypeError as error:
            if any(w != written[0] for w in written.values()):
                raise BranchVariablesError(pure.entries[pure.home].path, written) from error
            raise

    return cross(Lift.whole(run, variables, rngs), fns, args)


def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    mdl: Any,
    init: Any,
    carry_variables: CollectionFilter = False,
    broadcast_variables: CollectionFilter = True,
    split_rngs: Mapping[CollectionFilter, bool] = NO_AXES,
) -> Any:
    """`jax.lax.while_loop` of `body_fn(mdl, carry)` for as long as `cond_fn(mdl, carry)` is true.

    Returns the last carry; `init` is the first.  `carry_variables` may change in the body, but
    not their shapes or dtypes, so they exist before: call `body_fn` once by hand to initialise.
    `broadcast_variables` are read only.  Streams named in `split_rngs` can be drawn from: with
    `True` each iteration draws other keys, with `False` the same ones.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class Halve(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         steps = self.variable("state", "steps", lambda: 0)
    ...
    ...         def body(mdl, x):
    ...             mdl.put_variable("state", "steps", mdl.get_variable("state", "steps") + 1)
    ...             return x / 2
    ...
    ...         big = lambda mdl, x: x > 1
    ...         return nn.while_loop(big, body, self, x, carry_variables="state")
    >>> y, state = Halve().apply({"state": {"steps": 0}}, 5.0, mutable=["state"])
    >>> float(y), int(state["state"]["steps"])
    (0.625, 3)
    """
    splits = Splits.of(split_rngs)

    def run(pure: Pure, state: State, init: Any) -> tuple[Any, Groups]:
        constant, carried = by_mutability(pure, state.groups[0])
        frozen = tuple(replace(entry, mutable=NONE) for entry in pure.entries)
        test, body = replace(pure, entries=frozen).branch(0), pure.branch(1, turn=1)

        def inside(i: Any, carried: Any) -> State:
            first = tuple({**a, **b} for a, b in zip(constant, carried, strict=True))
            return State((first, state.groups[1]), splits.at(state.keys, i))

        def holds(loop: Any) -> Any:
            i, carried, carry = loop
            # Minus the step, as Linen has it: never a key that the body draws.
            return test(inside(-i, carried), carry)[0]

        def step(loop: Any) -> Any:
            i, carried, carry = loop
            carry, groups = body(inside(i, carried), carry)
            return i + 1, groups[0], carry

        _, carried, carry = jx.lax.while_loop(holds, step, (jx.numpy.zeros((), int), carried, init))
        return carry, (carried,)

    carry, fixed = Group(Names.of(carry_variables)), Group(Names.of(broadcast_variables))
    lift = Lift(run, (carry, fixed), (carry,), splits.split | splits.kept)
    return cross(lift, (cond_fn, body_fn), (mdl, init))
