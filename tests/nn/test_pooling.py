"""Pooling, functions over merged batch dims, and the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import shardflax.nn as nn
from shardflax.core.errors import FlaxError
from tests.core.harness import quick_key
from tests.nn.matrix import same
from tests.nn.row import floats

X = floats(2, 7, 6, 3)
PAIRS = ((1, 1), (0, 1))

CASES: dict[str, Callable[..., Any]] = {
    "max": lambda nn, x: nn.max_pool(x, (2, 3)),
    "max-strides": lambda nn, x: nn.max_pool(x, (2, 3), (2, 1), "SAME"),
    "max-pairs": lambda nn, x: nn.max_pool(x, (2, 2), padding=PAIRS),
    "max-wide": lambda nn, x: nn.max_pool(x, (2, 2), padding=((2, 2), (0, 0))),
    "avg": lambda nn, x: nn.avg_pool(x, (2, 3), (1, 2)),
    "avg-same": lambda nn, x: nn.avg_pool(x, (2, 3), padding="SAME"),
    "avg-without-pad": lambda nn, x: nn.avg_pool(
        x, (2, 3), (2, 2), padding="SAME", count_include_pad=False
    ),
    "no-batch": lambda nn, x: nn.avg_pool(x[0], (2, 2), count_include_pad=False),
    "batch-dims": lambda nn, x: nn.max_pool(x[:, None], (2, 2)),
    "one-dim": lambda nn, x: nn.avg_pool(x[0], (3,), (2,), ((1, 1),), count_include_pad=False),
    "pool": lambda nn, x: nn.pool(x, 0.0, lax.add, (2, 2), None, "VALID"),
    "integers": lambda nn, x: [
        pool((8 * x).astype(jnp.int32), (2, 2)) for pool in (nn.max_pool, nn.avg_pool)
    ],
    "half": lambda nn, x: [
        nn.avg_pool(x.astype(jnp.bfloat16), (2, 2), count_include_pad=c) for c in (True, False)
    ],
    "merged": lambda nn, x: nn.BatchApply(lambda a, b: {"sum": a + b}, num_dims=3)(x, b=x),
    "merged-scalar": lambda nn, x: nn.BatchApply(lambda a, b: (a * b, a))(x, 3.0),
}


def test_parity_with_flax() -> None:
    """Values and gradients of all cases, as one program."""

    def run(namespace: Any) -> Any:
        def total(name: str, x: Any) -> Any:
            return sum(jnp.sum(jnp.cos(y)) for y in jax.tree.leaves(CASES[name](namespace, x)))

        def one(name: str, x: Any) -> Any:
            gradient = None if name == "integers" else jax.grad(total, argnums=1)(name, x)
            return CASES[name](namespace, x), gradient

        return jax.jit(lambda x: {name: one(name, x) for name in CASES})(X)

    same(run(nn), run(flax.linen))


def test_windows_with_padding_left_out_under_strict_promotion() -> None:
    with jax.numpy_dtype_promotion("strict"):
        y = nn.avg_pool(X.astype(jnp.bfloat16), (2, 2), padding="SAME", count_include_pad=False)
    assert y.dtype == jnp.float32 and y.shape == X.shape


def test_minima_are_maxima_of_the_negative() -> None:
    for x in (X, (8 * X).astype(jnp.int32)):
        found = nn.min_pool(x, (2, 3), (1, 2), padding="SAME")
        same(found, -nn.max_pool(-x, (2, 3), (1, 2), padding="SAME"))
    assert not nn.min_pool(X > 0, (7, 6)).any() and nn.max_pool(X > 0, (7, 6)).all()


def test_numbers_instead_of_sequences() -> None:
    """One number is a window of one dim, a stride or a padding of all dims."""
    same(nn.max_pool(X, 2, 2), nn.max_pool(X, (2,), (2,)))
    same(nn.avg_pool(X, (2, 2), 2, 1), nn.avg_pool(X, (2, 2), (2, 2), ((1, 1), (1, 1))))


@pytest.mark.parametrize("pool", ["max_pool", "min_pool", "avg_pool"])
def test_errors(pool: str) -> None:
    fn = getattr(nn, pool)
    with pytest.raises(FlaxError, match=rf"^{pool}: inputs have shape \(6, 3\) \(2 dims\)"):
        fn(X[0, 0], (2, 2))
    with pytest.raises(FlaxError, match=r"strides=\(2,\) has 1 entries, window_shape has 2"):
        fn(X, (2, 2), (2,))
    with pytest.raises(FlaxError, match="padding='VALDI': did you mean 'VALID'"):
        fn(X, (2, 2), padding="VALDI")
    with pytest.raises(FlaxError, match=r"window_shape=\(2, 0\) must be positive"):
        fn(X, (2, 0))


def test_merged_modules_have_the_names_of_others() -> None:
    def outputs(namespace: Any) -> Any:
        class Model(namespace.Module):
            @namespace.compact
            def __call__(self, x: Any) -> Any:
                return namespace.BatchApply(namespace.Dense(4))(x)

        return Model().init_with_output(quick_key(0), X)

    same(outputs(nn), outputs(flax.linen))


def test_errors_of_merging() -> None:
    with pytest.raises(FlaxError, match=r"expected at least one of 5 dims or more \(num_dims\)"):
        nn.BatchApply(lambda x: x, num_dims=5)(X)
    with pytest.raises(FlaxError, match=r"dim 0 .* size 7, expected 14 \(the merged dims \(2, 7\)"):
        nn.BatchApply(lambda x: x[:7])(X)
    with pytest.raises(FlaxError, match=r"dim 0 .* size 7, expected 2 \(leading dims \(2, 7\)"):
        nn.BatchApply(jnp.add)(X, jnp.swapaxes(X, 0, 1))


def test_activations_are_jax_s() -> None:
    names = [n for n in nn.activation.__all__ if n not in ("PReLU", "normalize")]
    assert all(getattr(nn.activation, n) is getattr(jax.nn, n) for n in names)
    assert nn.normalize is jax.nn.standardize


def test_the_namespaces_of_activations_and_initializers_are_flax_s() -> None:
    public = {n for n in dir(jax.nn) if not n.startswith("_")}
    theirs = public & {*dir(flax.linen)} - {"initializers", "dot_product_attention"}
    assert theirs <= {*nn.activation.__all__} & {*nn.__all__}
    drawn = {n for n in dir(flax.linen.initializers) if hasattr(jax.nn.initializers, n)}
    assert {n for n in drawn if not n.startswith("_")} <= {*nn.initializers.__all__}
