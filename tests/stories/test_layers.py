"""Layers as functions of a scope: dense, attention, weight standardisation, flow, custom vjp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardflax.core import Scope
from tests.core.harness import quick_key
from tests.stories.teller import KEY, told

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def uniform(key: Any, shape: Any) -> Any:
    return jax.random.uniform(key, shape, minval=-1.0)


def test_dense_in_two_ways() -> None:
    """A layer may read its variables where it uses them, or hold them in a value of its own."""

    def implicit(scope: Any, x: Any, features: int) -> Any:
        return x @ scope.param("kernel", uniform, (x.shape[-1], features))

    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Explicit:
        kernel: Any

        @staticmethod
        def create(scope: Any, in_size: int, features: int) -> Explicit:
            return Explicit(scope.param("kernel", uniform, (in_size, features)))

        def __call__(self, x: Any) -> Any:
            return x @ self.kernel

    def with_value(scope: Any, x: Any, features: int) -> Any:
        layer = Explicit.create(scope, x.shape[-1], features)
        return jax.vmap(layer)(x)  # a plain value: any JAX transform takes it

    def story(f: Any) -> Any:
        def both(scope: Any, x: Any) -> Any:
            return scope.child(with_value)(scope.child(implicit)(x, 4), 2)

        return f.init(both)(KEY, X)

    _, variables = told(story)
    assert sorted(variables["params"]) == ["implicit_0", "with_value_0"]


def test_attention_is_a_vmap_over_heads() -> None:
    """One head is an ordinary function; its variables get a dim of heads, its dropout masks too."""

    def head(f: Any, scope: Any, x: Any, features: int) -> Any:
        query, key, value = (
            scope.child(f.nn.dense, name)(x, features, bias=False, kernel_init=uniform)
            for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(query @ key.T / jnp.sqrt(features))
        return scope.child(f.nn.dropout)(weights, 0.5) @ value

    def story(f: Any) -> Any:
        def attention(scope: Any, x: Any, heads: int = 2, features: int = 4) -> Any:
            heads_of = f.lift.vmap(
                partial(head, f, features=features),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=None,
                out_axes=1,
                axis_size=heads,
            )
            y = heads_of(scope.push("heads"), x).reshape(x.shape[0], -1)
            return scope.child(f.nn.dense, "out")(y, features, kernel_init=uniform)

        return jax.jit(f.init(attention))({"params": KEY, "dropout": quick_key(1)}, X)

    _, variables = told(story)
    assert variables["params"]["heads"]["query"]["kernel"].shape == (2, 3, 4)
    assert variables["params"]["out"]["kernel"].shape == (8, 4)


def standardized(kernel: Any) -> Any:
    axes = tuple(range(kernel.ndim - 1))
    mean, std = kernel.mean(axes, keepdims=True), kernel.std(axes, keepdims=True)
    return (kernel - mean) / (std + 1e-5)


def test_weight_standardisation_is_a_map_of_variables() -> None:
    """Any layer computes with standardised kernels; what is kept and trained is raw.

    Qiao et al. 2019, https://arxiv.org/abs/1903.10520.
    """

    def on_kernels(variables: Any) -> Any:
        return jax.tree.map(lambda x: standardized(x) if x.ndim > 1 else x, variables)

    def story(f: Any) -> Any:
        def model(scope: Any, x: Any) -> Any:
            dense = f.lift.map_variables(f.nn.dense, "params", on_kernels, init=True)
            return scope.child(dense, "dense")(x, 4, kernel_init=uniform)

        variables = f.init(model)(KEY, X)[1]
        return variables, f.apply(model)(variables, X)

    variables, y = told(story)
    dense = variables["params"]["dense"]
    assert jnp.allclose(y, X @ standardized(dense["kernel"]) + dense["bias"], atol=1e-5)
    assert not jnp.allclose(dense["kernel"].mean(0), 0.0)


def test_a_flow_is_a_pair_of_functions_of_one_scope() -> None:
    """Both directions of an invertible layer read the same variables, from the same scope."""

    @dataclass(frozen=True)
    class Bijection:
        forward: Callable[..., Any]
        backward: Callable[..., Any]

    def factors(scope: Any, size: int) -> Any:
        """A matrix by its triangular factors: invertible, with a cheap determinant."""
        raw = scope.param("raw", uniform, (size, size))
        scale = jnp.exp(scope.param("scale", uniform, (size,)))
        return jnp.tril(raw, -1) + jnp.eye(size), jnp.triu(raw, 1) + jnp.diag(scale), scale

    def forward(scope: Any, x: Any) -> Any:
        lower, upper, scale = factors(scope, x.shape[-1])
        return x @ lower @ upper, jnp.log(scale).sum()

    def backward(scope: Any, y: Any) -> Any:
        lower, upper, scale = factors(scope, y.shape[-1])
        return y @ jnp.linalg.inv(lower @ upper), -jnp.log(scale).sum()

    mix = Bijection(forward, backward)

    def chain(*layers: Bijection) -> Bijection:
        def through(which: str, order: Any, scope: Any, x: Any) -> Any:
            total = 0.0
            for i in order:
                x, logdet = scope.child(getattr(layers[i], which), f"layer_{i}")(x)
                total += logdet
            return x, total

        steps = range(len(layers))
        return Bijection(
            partial(through, "forward", steps), partial(through, "backward", reversed(steps))
        )

    def story(f: Any) -> Any:
        flow = chain(mix, mix)
        (y, logdet), variables = f.init(flow.forward)(KEY, X)
        back, minus = f.apply(chain(mix, mix).backward)(variables, y)
        return y, variables, back, logdet, minus

    y, _, back, logdet, minus = told(story)
    assert jnp.allclose(back, X, atol=1e-4) and jnp.allclose(logdet, -minus)
    assert not jnp.allclose(y, X, atol=0.1)


def test_a_rule_of_ones_own_for_gradients() -> None:
    """The gradient of a layer is replaced by its sign; that of its input is left alone."""

    def story(f: Any) -> Any:
        def forward(scope: Any, x: Any) -> Any:
            def dense(scope: Any, x: Any) -> Any:
                return f.nn.dense(scope, x, 2, kernel_init=uniform)

            y, pullback = f.lift.vjp(dense, scope, x)
            return y, pullback

        def backward(pullback: Any, dy: Any) -> Any:
            params, dx = pullback(dy)
            return jax.tree.map(jnp.sign, params), dx

        def layer(scope: Any, x: Any) -> Any:
            return f.nn.dense(scope, x, 2, kernel_init=uniform)

        signed = f.lift.custom_vjp(layer, forward_fn=forward, backward_fn=backward)

        def loss(params: Any, fn: Any) -> Any:
            return (f.apply(fn)({"params": params}, X) ** 2).sum()

        _, variables = f.init(signed)(KEY, X)
        grads = [jax.grad(loss)(variables["params"], fn) for fn in (signed, layer)]
        return variables, grads

    _, (signed, plain) = told(story)
    assert jnp.array_equal(signed["kernel"], jnp.sign(plain["kernel"]))


def test_a_story_that_differs_is_noticed() -> None:
    with pytest.raises(AssertionError):
        told(lambda f: f.Scope is Scope)
