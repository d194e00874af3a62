"""Wrong input is answered with the module, the dim and both sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.core.errors import FlaxError

KEY = jax.random.key(0)
X = jnp.ones((2, 3, 8))


class Model(nn.Module):
    """Calls a layer of the name `inner`, so that errors have a path to name."""

    make: Callable[..., Any]

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.make(name="inner")(*args, **kwargs)


def run(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return lambda: Model(make).init(KEY, *args, **kwargs)


def heads(**kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.GroupedQueryAttention(**kwargs, **k)


def mha(**kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.MultiHeadAttention(**kwargs, **k)


def general(**kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.DenseGeneral(**kwargs, **k)


def einsum(*args: Any) -> Callable[..., Any]:
    return lambda **k: nn.Einsum(*args, **k)


CASES: list[tuple[Any, str]] = [
    (run(lambda **k: nn.Dense(3, **k), 1.0), r"Dense 'inner': inputs have shape \(\) \(0 dims\)"),
    (run(general(features=3, axis=7), X), r"axis=\(7,\) .* \(2, 3, 8\): dim 7 does not exist"),
    (run(general(features=3, axis=(2, -1)), X), "a dim is given twice"),
    (run(general(features=3, batch_dims=(1,)), X), "must be the leading dims"),
    (run(general(features=3, axis=0, batch_dims=(0,)), X), "dim 0 is also one of batch_dims"),
    (run(einsum((8, 3)), X), "passed nowhere"),
    (run(einsum((8, 3), "...a,ab->...b"), X, "...a,ab->...b"), "to the layer and to the call"),
    (run(einsum((8, 3), "...a,ab"), X), "must say its output"),
    (run(einsum((8, 3), "...a->...a"), X), "two operands"),
    (run(einsum((8, 3, 2), "...a,ab->...b"), X), "a kernel of 2 dims, shape has 3"),
    (run(einsum((8, 3), "ab,bc->ac"), X), "those of 'ab'"),
    (run(lambda **k: nn.Embed(5, 3, **k), X), "Embed 'inner': inputs have dtype float32"),
    (run(lambda **k: nn.Dropout(1.5, **k), X, deterministic=True), "rate=1.5"),
    (run(lambda **k: nn.Dropout(0.5, **k), X), "'deterministic' was given neither"),
    (run(lambda **k: nn.Sequential([], **k), X), "Sequential 'inner': `layers` is empty"),
    (run(lambda **k: nn.LayerNorm(**k), X, mask=jnp.ones((2, 4, 8))), "dim -2: 4 against 3"),
    (run(lambda **k: nn.LayerNorm(feature_axes=3, **k), X), "dim 3 does not exist"),
    (run(heads(num_heads=6, num_kv_heads=4, head_dim=2), X), "num_heads=6 .* num_kv_heads=4"),
    (run(heads(num_heads=3), X), "'inner': features=8 is not a multiple of num_heads=3"),
    (run(heads(num_heads=8), X), "head_dim=1 is odd"),
    (run(heads(num_heads=2), X[0, 0]), r"expected \(batch, length, features\)"),
    (run(heads(num_heads=2), X, mask=jnp.ones((2, 1, 3, 5))), "dim -1: 5 against 3"),
    (run(heads(num_heads=2), X, positions=jnp.ones((2, 5))), r"positions of shape \(2, 5\)"),
    (run(mha(num_heads=3), X), "qkv_features=8 is not a multiple of num_heads=3"),
    (run(mha(num_heads=2), X, mask=jnp.ones((2, 1, 5, 3))), "dim -2: 5 against 3"),
    (run(mha(num_heads=2), X, None, X), "`inputs_v` without `inputs_k`"),
    (run(mha(num_heads=2), X, jnp.ones((4, 3, 8))), "batch dims must agree"),
    (run(mha(num_heads=2), X, jnp.ones((2, 5, 8)), X), r"lengths \(dim -3\) must agree"),
]


@pytest.mark.parametrize(("fails", "message"), CASES)
def test_message(fails: Callable[[], Any], message: str) -> None:
    with pytest.raises(FlaxError, match=message) as caught:
        fails()
    assert isinstance(caught.value, ValueError)


def test_sequential_of_no_sequence() -> None:
    with pytest.raises(FlaxError, match="must be a sequence, found Dense"):
        nn.Sequential(nn.Dense(3))  # pyright: ignore[reportArgumentType]


def test_attend_of_another_width() -> None:
    table = nn.Embed(5, 3)
    variables = table.init(KEY, jnp.array([1]))
    with pytest.raises(FlaxError, match=r"dim -1 of query has size 4, expected 3"):
        table.apply(variables, jnp.ones((2, 4)), method="attend")


def test_more_tokens_than_the_cache_holds() -> None:
    layer = nn.GroupedQueryAttention(num_heads=2, cache_length=4, decode=True)
    params = {"params": layer.init(KEY, X)["params"]}
    with pytest.raises(FlaxError, match="5 tokens at once into a cache of length 4"):
        layer.apply(params, jnp.ones((2, 5, 8)), mutable=["cache"])
    with pytest.raises(FlaxError, match="set `cache_length`"):
        layer.clone(cache_length=None).apply(params, X, mutable=["cache"])


def test_another_batch_than_the_cache_has() -> None:
    layer = nn.MultiHeadAttention(num_heads=2, decode=True)
    with pytest.raises(FlaxError, match=r"has shape \(3, 1, 2, 4\), the cached one \(2, 3, 2, 4\)"):
        layer.apply(layer.init(KEY, X), jnp.ones((3, 1, 8)), mutable=["cache"])


def test_an_attention_function_that_would_drop_the_mask() -> None:
    layer = nn.MultiHeadAttention(num_heads=2, attention_fn=lambda query, key, value: value)
    assert layer.init_with_output(KEY, X)[0].shape == X.shape
    with pytest.raises(FlaxError, match="has no argument `mask`"):
        layer.init(KEY, X, mask=jnp.ones((1, 1, 3, 3)))
