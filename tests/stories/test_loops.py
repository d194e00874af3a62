"""The same function many times over: vmap and scan, of functions of a scope."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tests.core.harness import quick_key
from tests.stories.teller import KEY, told

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def uniform(key: Any, shape: Any) -> Any:
    return jax.random.uniform(key, shape, minval=-1.0)


def halves(key: Any, shape: Any) -> Any:
    return jnp.full(shape, 0.5)


def test_vmap_shares_variables_or_has_one_each() -> None:
    """`variable_axes` alone tells a batch with shared weights from an ensemble."""

    def story(f: Any) -> Any:
        def layer(scope: Any, x: Any) -> Any:
            return f.nn.dense(scope, x, 2, kernel_init=uniform)

        def batch(scope: Any, x: Any) -> Any:
            each = f.lift.vmap(layer, variable_axes={"params": None}, split_rngs={"params": False})
            return each(scope.push("shared"), x)

        def ensemble(scope: Any, x: Any) -> Any:
            each = f.lift.vmap(layer, variable_axes={"params": 0}, split_rngs={"params": True})
            return each(scope.push("own"), x)

        return f.init(batch)(KEY, X), f.init(ensemble)(KEY, X)

    (_, shared), (_, own) = told(story)
    assert shared["params"]["shared"]["kernel"].shape == (3, 2)
    assert own["params"]["own"]["kernel"].shape == (4, 3, 2)
    assert len({x.tobytes() for x in jax.device_get(own["params"]["own"]["kernel"])}) == 4


def test_statistics_of_a_batch_of_examples() -> None:
    """Normalisation over a mapped axis is a reduction of JAX's by the name of that axis."""

    def story(f: Any) -> Any:
        def normalized(scope: Any, x: Any) -> Any:
            mean = jax.lax.pmean(x, "batch")
            seen = scope.variable("stats", "mean", jnp.zeros, x.shape)
            seen.value = mean
            return x - mean

        def model(scope: Any, x: Any) -> Any:
            each = f.lift.vmap(
                normalized,
                variable_axes={"stats": None},
                split_rngs={},
                axis_name="batch",
            )
            return each(scope.push("norm"), x)

        return f.init(model)(KEY, X)

    y, variables = told(story)
    assert jnp.allclose(variables["stats"]["norm"]["mean"], X.mean(0))
    assert jnp.allclose(y.mean(0), 0.0, atol=1e-6)


def test_scan_over_time_shares_variables() -> None:
    """A recurrent cell: its parameters are broadcast, its carry goes from step to step."""

    def story(f: Any) -> Any:
        def cell(scope: Any, carry: Any, x: Any) -> Any:
            dense = partial(f.nn.dense, features=carry.shape[-1], kernel_init=halves)
            carry = jnp.tanh(scope.child(dense, "in")(x) + scope.child(dense, "carry")(carry))
            return carry, carry

        def rnn(scope: Any, xs: Any) -> Any:
            run = f.lift.scan(
                cell,
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return run(scope.push("cell"), jnp.zeros(2), xs)

        variables = f.init(rnn)(KEY, X)[1]
        return variables, f.apply(rnn)(variables, X)

    variables, (last, ys) = told(story)
    assert variables["params"]["cell"]["in"]["kernel"].shape == (3, 2)
    assert jnp.array_equal(ys[-1], last)


def test_scan_over_layers_has_variables_for_each() -> None:
    """A stack of layers: parameters and dropout masks along a dim of layers, statistics carried."""

    def story(f: Any) -> Any:
        def layer(scope: Any, x: Any, _: Any) -> Any:
            x = scope.child(f.nn.dense, "dense")(x, 3, kernel_init=uniform)
            count = scope.variable("count", "layers", lambda: jnp.zeros((), jnp.int32))
            count.value += 1
            return scope.child(f.nn.dropout)(jax.nn.relu(x), 0.5), x.mean()

        def stack(scope: Any, x: Any) -> Any:
            scope = scope.push("layers")
            scope.variable("count", "layers", lambda: jnp.zeros((), jnp.int32))
            run = f.lift.scan(
                layer,
                variable_axes={"params": 0},
                variable_carry="count",
                split_rngs={"params": True, "dropout": True},
                length=3,
                check_constancy_invariants=False,
            )
            return run(scope.rewound(), x, None)

        keys = {"params": KEY, "dropout": quick_key(1)}
        (_, means), variables = f.init(stack)(keys, X)
        return means, variables, f.apply(stack, mutable="count")(variables, X, rngs=keys)

    means, variables, (_, after) = told(story)
    assert means.shape == (3,)
    assert variables["params"]["layers"]["dense"]["kernel"].shape == (3, 3, 3)
    assert variables["count"]["layers"]["layers"] == 3 and after["count"]["layers"]["layers"] == 6
