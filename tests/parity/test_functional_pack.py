"""`pack`, the general lift of the functional core, against Linen."""

from __future__ import annotations

from typing import Any

import flax.core
import flax.core.nn
import jax
import jax.numpy as jnp
import pytest

from shardflax import core
from tests.core.harness import assert_equal, plain, quick_key

KEY = quick_key(0)
X = jnp.arange(6.0).reshape(3, 2)


def same(program: Any) -> Any:
    ours, theirs = program(core), program(flax.core)
    assert_equal(plain(ours), plain(theirs))
    return ours


def transposing(core: Any, **options: Any) -> Any:
    """The example of the seeds: each matrix of a collection is transposed on its way in."""

    def wrapper(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, *args: Any) -> Any:
        target, rest = variables
        target = jax.tree.map(lambda x: x.T if x.ndim == 2 else x, target)
        scope = scope_fn((target, rest), rngs)
        y = core.nn.dense(scope, *args)
        return y, repack_fn(scope)

    options = {
        "in_variable_filters": ("params", True),
        "out_variable_filters": (True,),
        "rng_filters": (True,),
        **options,
    }
    return core.lift.pack(wrapper, **options)


def test_the_example_of_the_seeds() -> None:
    def program(core: Any) -> Any:
        y, variables = core.init(transposing(core))(KEY, X, 4)
        flipped = {"params": {**variables["params"], "kernel": variables["params"]["kernel"].T}}
        return y, variables, core.apply(transposing(core))(flipped, X, 4)

    y, _, again = same(program)
    assert (y == again).all()


def test_several_scopes_and_groups() -> None:
    def program(core: Any) -> Any:
        seen: list[Any] = []

        def wrapper(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, x: Any) -> Any:
            seen.append([[sorted(per) for per in group] for group in (*variables, *rngs)])
            one, two = scopes = scope_fn(variables, rngs)
            two.put_variable("state", "n", 3.0)
            key = two.make_rng("dropout")
            y = core.nn.dense(one, x, 4) + jax.random.uniform(key, ())
            return y, repack_fn(scopes)

        packed = core.lift.pack(
            wrapper, ("params", "state"), ("params", True), ("dropout", ["params", "dropout"])
        )

        def model(scope: Any, x: Any) -> Any:
            return packed((scope.push("a"), scope.push("b")), x)

        keys = {"params": KEY, "dropout": quick_key(1)}
        return core.init(model)(keys, X), seen

    same(program)


def test_what_no_filter_names_stays_outside() -> None:
    def program(core: Any) -> Any:
        def wrapper(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any) -> Any:
            scope = scope_fn(variables, rngs)
            found = scope.has_variable("state", "n"), scope.has_rng("dropout")
            return found, repack_fn(scope)

        packed = core.lift.pack(wrapper, ("params",), ("params",), (False,))
        return core.apply(packed)({"state": {"n": 1.0}}, rngs={"dropout": KEY})

    assert same(program) == (False, False)


def test_keys_can_be_mapped() -> None:
    def wrapper(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any) -> Any:
        rngs = core.lift.tree_map_rngs(lambda key: jax.random.fold_in(key, 3), rngs)
        scope = scope_fn(variables, rngs)
        return scope.make_rng("dropout"), repack_fn(scope)

    packed = core.lift.pack(wrapper, (True,), (True,), (True,))
    found = core.apply(packed)({}, rngs={"dropout": KEY})
    expected = core.apply(lambda s: s.make_rng("dropout"))(
        {}, rngs={"dropout": jax.random.fold_in(KEY, 3)}
    )
    assert found == expected


def test_keyword_arguments_are_asked_for() -> None:
    def wrapper(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, n: Any = 0) -> Any:
        scope = scope_fn(variables, rngs)
        return n, repack_fn(scope)

    filters = (True,), (True,), (True,)
    allowed = core.lift.pack(wrapper, *filters, enable_kwargs=True)
    assert core.apply(allowed)({}, n=2) == 2
    refused = core.lift.pack(wrapper, *filters)
    with pytest.raises(TypeError, match="enable_kwargs=True"):
        core.apply(refused)({}, n=2)
