"""Layers by hand: the same functions of the same parameters in plain JAX.

Each takes the variables that the layer's `init` gives, and the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import raw

__all__ = ["BY_HAND", "through_jax"]

Params = Any
IMAGES = ("NHWC", "HWIO", "NHWC")


def dense(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def heads(p: Params, x: jax.Array) -> jax.Array:
    return jnp.einsum("bld,dhk->blhk", x, p["kernel"]) + p["bias"]


def embed(p: Params, ids: jax.Array) -> jax.Array:
    return jnp.take(p["embedding"], ids, axis=0)


def mlp(p: Params, x: jax.Array) -> jax.Array:
    return dense(p["layers_2"], jax.nn.gelu(dense(p["layers_0"], x)))


def conv(p: Params, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=IMAGES)
    return y + p["bias"]


def conv_transpose(p: Params, x: jax.Array) -> jax.Array:
    y = lax.conv_transpose(x, p["kernel"], (2, 2), "SAME", dimension_numbers=IMAGES)
    return y + p["bias"]


def normalized(p: Params, x: jax.Array, dims: tuple[int, ...], epsilon: float = 1e-6) -> jax.Array:
    """To mean 0 and variance 1 over `dims`."""
    mean = jnp.mean(x, dims, keepdims=True)
    variance = jnp.maximum(0.0, jnp.mean(lax.square(x), dims, keepdims=True) - lax.square(mean))
    return (x - mean) * (lax.rsqrt(variance + epsilon) * p["scale"]) + p["bias"]


def rms_norm(p: Params, x: jax.Array) -> jax.Array:
    return x * (lax.rsqrt(jnp.mean(lax.square(x), -1, keepdims=True) + 1e-6) * p["scale"])


def group_norm(p: Params, x: jax.Array) -> jax.Array:
    grouped = x.reshape(*x.shape[:-1], 8, -1)
    mean = jnp.mean(grouped, (1, 2, 4))
    square = jnp.mean(lax.square(grouped), (1, 2, 4))
    variance = jnp.maximum(0.0, square - lax.square(mean))
    size = x.shape[-1] // 8
    mean, variance = (jnp.repeat(v, size, -1)[:, None, None, :] for v in (mean, variance))
    return (x - mean) * (lax.rsqrt(variance + 1e-6) * p["scale"]) + p["bias"]


def prelu(p: Params, x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, x, p["negative_slope"] * x)


# --- recurrent


def gates(p: Params, x: jax.Array, h: jax.Array, name: str) -> jax.Array:
    return x @ p[f"i{name}"]["kernel"] + dense(p[f"h{name}"], h)


def lstm_cell(p: Params, carry: Any, x: jax.Array) -> Any:
    c, h = carry
    i, f, g, o = (gates(p, x, h, name) for name in "ifgo")
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def optimized_lstm_cell(p: Params, carry: Any, x: jax.Array) -> Any:
    c, h = carry
    of_input = x @ jnp.concatenate([p[f"i{n}"]["kernel"] for n in "ifgo"], -1)
    of_state = h @ jnp.concatenate([p[f"h{n}"]["kernel"] for n in "ifgo"], -1)
    of_state = of_state + jnp.concatenate([p[f"h{n}"]["bias"] for n in "ifgo"], -1)
    i, f, g, o = (
        a + b for a, b in zip(jnp.split(of_input, 4, -1), jnp.split(of_state, 4, -1), strict=True)
    )
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def gru_cell(p: Params, h: jax.Array, x: jax.Array) -> Any:
    r = jax.nn.sigmoid(dense(p["ir"], x) + h @ p["hr"]["kernel"])
    z = jax.nn.sigmoid(dense(p["iz"], x) + h @ p["hz"]["kernel"])
    n = jnp.tanh(dense(p["in"], x) + r * dense(p["hn"], h))
    h = (1.0 - z) * n + z * h
    return h, h


def simple_cell(p: Params, h: jax.Array, x: jax.Array) -> Any:
    h = jnp.tanh(dense(p["i"], x) + h @ p["h"]["kernel"])
    return h, h


def rnn(p: Params, x: jax.Array) -> jax.Array:
    zeros = jnp.zeros((x.shape[0], p["cell"]["hi"]["bias"].size))

    def step(carry: Any, x: jax.Array) -> Any:
        return lstm_cell(p["cell"], carry, x)

    ys = lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))[1]
    return jnp.swapaxes(ys, 0, 1)


# --- attention


def grouped_attention(p: Params, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[n]["kernel"]) for n in ("query", "key", "value"))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jnp.einsum("blhk,hkd->bld", y, p["out"]["kernel"])


def through_jax(p: Params, x: jax.Array) -> jax.Array:
    """Multi-head attention through `jax.nn.dot_product_attention`."""
    q, k, v = (heads(p[name], x) for name in ("query", "key", "value"))
    y = jax.nn.dot_product_attention(q, k, v)
    return jnp.einsum("blhk,hkd->bld", y, p["out"]["kernel"]) + p["out"]["bias"]


BY_HAND: Mapping[str, Callable[..., Any]] = {
    "Dense": dense,
    "DenseGeneral": heads,
    "Einsum": heads,
    "Embed": embed,
    "Sequential": mlp,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "LayerNorm": lambda p, x: normalized(p, x, (-1,)),
    "RMSNorm": rms_norm,
    "BatchNorm": lambda p, x: normalized(p, x, (0, 1, 2), 1e-5),
    "InstanceNorm": lambda p, x: normalized(p, x, (1, 2)),
    "GroupNorm": group_norm,
    "PReLU": prelu,
    "SimpleCell": simple_cell,
    "GRUCell": gru_cell,
    "LSTMCell": lstm_cell,
    "OptimizedLSTMCell": optimized_lstm_cell,
    "RNN": rnn,
    "MultiHeadDotProductAttention": raw.attention,
    "GroupedQueryAttention": grouped_attention,
}
