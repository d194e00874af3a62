"""Attention beyond the matrix: the reference, caches, rotary positions."""

from __future__ import annotations

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax.nn._grouped import reference

KEY = jax.random.key(0)


def floats(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


X = floats(2, 6, 8)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_jax_s_attention_equals_the_reference(kv_heads: int, causal: bool) -> None:
    layer = nn.GroupedQueryAttention(4, num_kv_heads=kv_heads, causal=causal)
    variables = layer.init(KEY, X)
    mask = floats(2, 4, 6, 6) > -0.5
    formula = layer.clone(implementation="reference")
    close(layer.apply(variables, X), formula.apply(variables, X))
    close(layer.apply(variables, X, mask=mask), formula.apply(variables, X, mask=mask))


def test_the_reference_equals_full_heads() -> None:
    q, k, v = floats(2, 6, 4, 8), floats(2, 6, 2, 8, seed=1), floats(2, 6, 2, 8, seed=2)
    full = nn.dot_product_attention(
        q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), mask=nn.make_causal_mask(X[..., 0])
    )
    close(reference(q, k, v), full)


@pytest.mark.parametrize("chunks", [[6], [3, 3], [4, 1, 1], [1] * 6])
@pytest.mark.parametrize("length", [None, 9])
def test_decoding_in_any_chunks_equals_one_pass(chunks: list[int], length: int | None) -> None:
    layer = nn.GroupedQueryAttention(4, num_kv_heads=2, normalize_qk=True)
    params = {"params": layer.init(KEY, X)["params"]}
    decoder = layer.clone(decode=True, cache_length=length)
    cache = {} if length else {"cache": decoder.init(KEY, X)["cache"]}
    outputs = []
    for tokens in jnp.split(X, np.cumsum(chunks)[:-1], axis=1):
        y, cache = decoder.apply({**params, **cache}, tokens, mutable=["cache"])
        outputs.append(y)
    close(jnp.concatenate(outputs, axis=1), layer.apply(params, X))
    assert cache["cache"]["cache_index"] == 6
    if length is None:
        y, _ = decoder.apply({**params, **cache}, X[:, :1], mutable=["cache"])
        assert jnp.isnan(y).all(), "more tokens than the cache holds must not look like numbers"


def test_linen_s_cache_step_by_step() -> None:
    ours, theirs = (n.MultiHeadAttention(2, decode=True) for n in (nn, flax.linen))
    a, b = ours.init(KEY, X), theirs.init(KEY, X)
    prefilled, _ = ours.apply(a, X, mutable=["cache"])
    for t in range(X.shape[1]):
        y, cache = ours.apply(a, X[:, t : t + 1], mutable=["cache"])
        z, other = theirs.apply(b, X[:, t : t + 1], mutable=["cache"])
        a, b = {**a, **cache}, {**b, **other}
        np.testing.assert_array_equal(y, z)
        jax.tree.map(np.testing.assert_array_equal, a, b)
        close(prefilled[:, t : t + 1], y)


def test_self_attention_is_flax_s() -> None:
    ours, theirs = nn.SelfAttention(2), flax.linen.SelfAttention(2)
    variables = ours.init(KEY, X)
    with pytest.warns(DeprecationWarning):
        expected = theirs.apply(variables, X, sow_weights=True, mutable=["intermediates"])
    found = ours.apply(variables, X, sow_weights=True, mutable=["intermediates"])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_inputs_kv_is_deprecated() -> None:
    layer = nn.MultiHeadAttention(2)
    with pytest.warns(DeprecationWarning, match="inputs_kv"):
        layer.init(KEY, X, inputs_kv=X)


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = floats(1, 1, 1, 8), floats(1, 1, 1, 8, seed=1)

    def score(i: int, j: int) -> Any:
        turned = nn.apply_rotary(q, jnp.array([[i]])), nn.apply_rotary(k, jnp.array([[j]]))
        return jnp.sum(turned[0] * turned[1])

    close(score(3, 1), score(12, 10))
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_rotary_is_complex_multiplication() -> None:
    x, positions = floats(2, 6, 2, 8), jnp.arange(6)
    y = nn.apply_rotary(x, positions, theta=100.0)
    z = x[..., :4] + 1j * x[..., 4:]
    angles = positions[:, None] * 100.0 ** (-jnp.arange(4) / 4)
    turned = z * jnp.exp(1j * angles)[None, :, None]
    close(y, jnp.concatenate([turned.real, turned.imag], axis=-1))
    assert nn.apply_rotary(x.astype(jnp.bfloat16), positions).dtype == jnp.bfloat16


def test_masks_are_flax_s() -> None:
    tokens, keys = X[..., 0], floats(2, 5)
    options: list[dict[str, Any]] = [{}, {"extra_batch_dims": 2}, {"dtype": bool}]
    for kwargs in options:
        np.testing.assert_array_equal(
            nn.make_causal_mask(tokens, **kwargs),
            flax.linen.make_causal_mask(tokens, **kwargs),
        )
        np.testing.assert_array_equal(
            nn.make_attention_mask(tokens, keys, jnp.greater, **kwargs),
            flax.linen.make_attention_mask(tokens, keys, jnp.greater, **kwargs),
        )
    assert nn.combine_masks(None, None) is None


@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_with_bias_mask_and_dropout_is_flax_s(broadcast: bool) -> None:
    q, bias = floats(2, 6, 2, 4), floats(2, 2, 6, 6)
    kwargs: dict[str, Any] = {
        "bias": bias,
        "mask": bias > -1,
        "dropout_rng": KEY,
        "dropout_rate": 0.5,
        "broadcast_dropout": broadcast,
    }
    np.testing.assert_array_equal(
        nn.dot_product_attention(q, q, q, **kwargs),
        flax.linen.dot_product_attention(q, q, q, **kwargs),
    )
