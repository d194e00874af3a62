"""The models of `models.py` by hand: the same operations on the same parameter trees."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.models import Sizes

__all__ = ["block", "init_block", "init_scanned", "init_unrolled", "scanned", "unrolled"]

lecun_normal = jax.nn.initializers.lecun_normal()


def layer_norm(p: Any, x: jax.Array) -> jax.Array:
    square = lax.square(x)
    mean = jnp.mean(x, -1)
    variance = jnp.maximum(0.0, jnp.mean(square, -1) - lax.square(mean))
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale, bias = jnp.reshape(p["scale"], shape), jnp.reshape(p["bias"], shape)
    mean, variance = jnp.expand_dims(mean, -1), jnp.expand_dims(variance, -1)
    y = x - mean
    return y * (lax.rsqrt(variance + 1e-6) * scale) + bias


def dense(p: Any, x: jax.Array, n_in: int = 1, product: Any = None) -> jax.Array:
    """`product(fn, x, kernel)` calls `fn(x, kernel)`, with the kernel laid out as it likes."""
    dims = (tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in))), ((), ())

    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.dot_general(x, kernel, dims)

    y = multiply(x, p["kernel"]) if product is None else product(multiply, x, p["kernel"])
    bias = p["bias"]
    return y + jnp.reshape(bias, (1,) * (y.ndim - bias.ndim) + bias.shape)


def attention(p: Any, x: jax.Array) -> jax.Array:
    query, key, value = dense(p["query"], x), dense(p["key"], x), dense(p["value"], x)
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", query, key))
    return dense(p["out"], jnp.einsum("...hqk,...khd->...qhd", weights, value), n_in=2)


def block(p: Any, x: jax.Array) -> jax.Array:
    x = x + attention(p["MultiHeadDotProductAttention_0"], layer_norm(p["LayerNorm_0"], x))
    h = dense(p["Dense_0"], layer_norm(p["LayerNorm_1"], x))
    return x + dense(p["Dense_1"], jax.nn.gelu(h))


def unrolled(params: Any, x: jax.Array, sizes: Sizes) -> jax.Array:
    for i in range(sizes.blocks):
        x = block(params[f"Block_{i}"], x)
    return x


def scanned(params: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, p: (block(p, x), None), x, params["ScanStep_0"]["Block_0"])[0]


# --- init


def init_dense(key: jax.Array, ins: tuple[int, ...], outs: tuple[int, ...]) -> Any:
    kernel = jnp.reshape(lecun_normal(key, (prod(ins), prod(outs)), jnp.float32), (*ins, *outs))
    return {"kernel": kernel, "bias": jnp.zeros(outs, jnp.float32)}


def init_norm(width: int) -> Any:
    return {"scale": jnp.ones((width,), jnp.float32), "bias": jnp.zeros((width,), jnp.float32)}


def init_block(key: jax.Array, s: Sizes) -> Any:
    keys = jax.random.split(key, 6)
    heads = s.heads, s.depth
    return {
        "LayerNorm_0": init_norm(s.width),
        "LayerNorm_1": init_norm(s.width),
        "MultiHeadDotProductAttention_0": {
            "query": init_dense(keys[0], (s.width,), heads),
            "key": init_dense(keys[1], (s.width,), heads),
            "value": init_dense(keys[2], (s.width,), heads),
            "out": init_dense(keys[3], heads, (s.width,)),
        },
        "Dense_0": init_dense(keys[4], (s.width,), (s.mlp,)),
        "Dense_1": init_dense(keys[5], (s.mlp,), (s.width,)),
    }


def init_unrolled(key: jax.Array, x: jax.Array, sizes: Sizes) -> tuple[jax.Array, Any]:
    """Parameters and the output, as `init_with_output` gives them."""
    keys = jax.random.split(key, sizes.blocks)
    params = {f"Block_{i}": init_block(keys[i], sizes) for i in range(sizes.blocks)}
    return unrolled(params, x, sizes), params


def init_scanned(key: jax.Array, x: jax.Array, sizes: Sizes) -> tuple[jax.Array, Any]:
    """Parameters and the output of one loop that makes the parameters of a block and runs it."""

    def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        params = init_block(key, sizes)
        return block(params, x), params

    x, params = lax.scan(step, x, jax.random.split(key, sizes.blocks))
    return x, {"ScanStep_0": {"Block_0": params}}
