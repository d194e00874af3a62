"""The layers that Flax has not, in plain JAX: `formula(row, variables, *inputs)` gives the output.

They share nothing with ours but the parameter tree (and the stream that keys are drawn from).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shardflax.nn as nn

Formula = Callable[..., Any]


def looked_up(row: Any, variables: Any, ids: Any) -> Any:
    """Rows of a table."""
    return variables["params"]["embedding"][ids]


class Key(nn.Module):
    """The first key that a layer draws from the stream of dropout."""

    @nn.compact
    def __call__(self) -> Any:
        return self.make_rng("dropout")


def attention(
    theta: float | None = 1e4,
    window: int | None = None,
    cap: float | None = None,
    rate: float | None = None,
) -> Formula:
    """Causal attention in which every query head has the keys and values of its group."""

    def formula(row: Any, variables: Any, x: Any, arrays: Any = None) -> Any:
        params = variables["params"]
        q, k, v = (_heads(params[name], x) for name in ("query", "key", "value"))
        if "query_norm" in params:
            q, k = _normed(params["query_norm"], q), _normed(params["key_norm"], k)
        if theta is not None:
            q, k = _turned(q, theta), _turned(k, theta)
        k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
        scores = jnp.einsum("bqhd,bshd->bhqs", q, k) / np.sqrt(q.shape[-1])
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        places = np.arange(x.shape[1])
        ahead = places[None, :] - places[:, None]
        seen = (ahead <= 0) & (ahead >= -(len(places) if window is None else window))
        for mask in (arrays or {}).values():
            seen = seen & mask
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        if rate is not None:
            weights = weights * _kept(row, weights.shape, rate)
        y = jnp.einsum("bhqs,bshd->bqhd", weights, v)
        out = params["out"]
        return jnp.einsum("bqhd,hde->bqe", y, out["kernel"]) + out.get("bias", 0.0)

    return formula


def _heads(params: Any, x: Any) -> Any:
    return jnp.einsum("bld,dhk->blhk", x, params["kernel"]) + params.get("bias", 0.0)


def _normed(params: Any, x: Any) -> Any:
    return params["scale"] * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _turned(x: Any, theta: float) -> Any:
    """Pairs of features as complex numbers, turned by angles that grow with the position."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    z = jax.lax.complex(x[..., :half], x[..., half:])
    z = z * jnp.asarray(np.exp(1j * angles), jnp.complex64)[None, :, None, :]
    return jnp.concatenate([z.real, z.imag], axis=-1)


def _kept(row: Any, shape: Any, rate: float) -> Any:
    """Which weights dropout keeps, each head by itself, and by how much they grow."""
    key = Key().apply({}, rngs=row.drawn())
    return jax.random.bernoulli(key, 1.0 - rate, shape) / (1.0 - rate)
