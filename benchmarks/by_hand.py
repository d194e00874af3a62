"""Layers by hand: the same functions of the same parameters in plain JAX.

Each takes the parameters that the layer's `init` gives, and the layer's inputs; those in `STATEFUL`
take all variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import raw

__all__ = ["BY_HAND", "STATEFUL", "through_jax"]

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
    square = lax.square(x)
    mean, square = jnp.mean(x, dims), jnp.mean(square, dims)
    variance = jnp.maximum(0.0, square - lax.square(mean))
    mean, variance = (jnp.expand_dims(v, dims) for v in (mean, variance))
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


def conv_local(p: Params, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated_local(
        x, p["kernel"], (1, 1), "SAME", (3, 3), dimension_numbers=IMAGES
    )
    return y + p["bias"]


def dropout(p: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, jnp.zeros_like(x))


def pooled(fn: Any, init: float, p: Params, x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, init, fn, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


# --- weights that are normalized, and products in eight bits


def unit(x: jax.Array, dims: int | None = None) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=dims, keepdims=True) + 1e-12)


def weight_norm(p: Params, x: jax.Array) -> jax.Array:
    kernel = unit(p["layer_instance"]["kernel"], 0) * p["layer_instance/kernel/scale"]
    return x @ kernel + p["layer_instance"]["bias"]


def spectral_norm(variables: Any, x: jax.Array) -> jax.Array:
    p, u = (
        variables["params"]["layer_instance"],
        variables["batch_stats"]["layer_instance/kernel/u"],
    )
    v = unit(u @ p["kernel"].T)
    u = unit(v @ p["kernel"])
    u, v = lax.stop_gradient((u, v))
    sigma = (v @ p["kernel"] @ u.T)[0, 0]
    return x @ (p["kernel"] / jnp.where(sigma != 0, sigma, 1)) + p["bias"]


def scaled(x: jax.Array, scale: jax.Array, history: jax.Array, dtype: Any) -> Any:
    """`x` in eight bits, and the scale: one at which the largest value of late fits."""
    limit, largest = jnp.finfo(dtype).max.astype(jnp.float32), jnp.max(history)
    old = 1.0 / scale
    new = jnp.where(largest > 0.0, limit / largest, old)
    scale = 1.0 / jnp.where(jnp.isfinite(largest), new, old)
    return jnp.clip(x / scale, -limit, limit).astype(dtype), scale


def seen(x: jax.Array, history: jax.Array) -> jax.Array:
    return jnp.roll(history, -1).at[0].set(jnp.max(jnp.abs(x)))


@jax.custom_vjp
def fp8_product(x: jax.Array, kernel: jax.Array, state: Any) -> jax.Array:
    return _fp8_forward(x, kernel, state)[0]


def _fp8_forward(x: jax.Array, kernel: jax.Array, state: Any) -> Any:
    history = {name: state[f"{name}_amax_history"] for name in ("input", "kernel")}
    q_x, of_x = scaled(x, state["input_scale"], history["input"], jnp.float8_e4m3fn)
    q_k, of_k = scaled(kernel, state["kernel_scale"], history["kernel"], jnp.float8_e4m3fn)
    y = jnp.einsum("bli,io->blo", q_x, q_k, preferred_element_type=jnp.float32) * (of_x * of_k)
    histories = seen(x, history["input"]), seen(kernel, history["kernel"])
    return y, (q_x, of_x, q_k, of_k, histories, state)


def _fp8_backward(kept: Any, g: jax.Array) -> Any:
    q_x, of_x, q_k, of_k, (of_input, of_kernel), state = kept
    history = state["output_grad_amax_history"]
    q_g, of_g = scaled(g, state["output_grad_scale"], history, jnp.float8_e5m2)
    product = partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    to_x = product("blo,io->bli", q_g, q_k) * (of_k * of_g)
    to_kernel = product("blo,bli->oi", q_g, q_x).T * (of_x * of_g)  # as JAX differentiates it
    after = {
        "input_scale": of_x,
        "input_amax_history": of_input,
        "kernel_scale": of_k,
        "kernel_amax_history": of_kernel,
        "output_grad_scale": of_g,
        "output_grad_amax_history": seen(g, history),
    }
    return to_x, to_kernel, after


fp8_product.defvjp(_fp8_forward, _fp8_backward)


def fp8(variables: Any, x: jax.Array) -> jax.Array:
    p, (state,) = variables["params"], variables["_overwrite_with_gradient"].values()
    return fp8_product(x, p["kernel"], state) + p["bias"]


def fp8_einsum(variables: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return fp8_product(x, kernel, variables["_overwrite_with_gradient"])


def rounded(x: jax.Array, scale: jax.Array, history: jax.Array, dtype: Any) -> Any:
    """`x` as eight bits can hold it, in its own dtype, and the scale."""
    q, scale = scaled(x, scale, history, dtype)
    return q.astype(x.dtype) * scale, scale


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded_product(types: Any, x: jax.Array, kernel: jax.Array, state: Any) -> jax.Array:
    return _rounded_forward(types, x, kernel, state)[0]


def _rounded_forward(types: Any, x: jax.Array, kernel: jax.Array, state: Any) -> Any:
    history = {name: state[f"{name}_amax_history"] for name in ("input", "kernel")}
    r_x, of_x = rounded(x, state["input_scale"], history["input"], types[0])
    r_k, of_k = rounded(kernel, state["kernel_scale"], history["kernel"], types[0])
    histories = seen(x, history["input"]), seen(kernel, history["kernel"])
    return jnp.einsum("bli,io->blo", r_x, r_k), (r_x, of_x, r_k, of_k, histories, state)


def _rounded_backward(types: Any, kept: Any, g: jax.Array) -> Any:
    r_x, of_x, r_k, of_k, histories, state = kept
    history = state["output_grad_amax_history"]
    r_g, of_g = rounded(g, state["output_grad_scale"], history, types[1])
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    to_kernel = product("blo,bli->oi", r_g, r_x).T
    after = {
        "input_scale": of_x,
        "input_amax_history": histories[0],
        "kernel_scale": of_k,
        "kernel_amax_history": histories[1],
        "output_grad_scale": of_g,
        "output_grad_amax_history": seen(g, history),
    }
    return product("blo,io->bli", r_g, r_k), to_kernel, after


rounded_product.defvjp(_rounded_forward, _rounded_backward)


def fp8_rounded(narrow: Any, widest: Any, variables: Any, x: jax.Array) -> jax.Array:
    p, (state,) = variables["params"], variables["_overwrite_with_gradient"].values()
    return rounded_product((narrow, widest), x, p["kernel"], state) + p["bias"]


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


def mgu_cell(p: Params, h: jax.Array, x: jax.Array) -> Any:
    f = jax.nn.sigmoid(dense(p["if"], x) + h @ p["hf"]["kernel"])
    n = jnp.tanh(dense(p["in"], x) + dense(p["hn"], h) * f)
    h = (1.0 - f) * n + f * h
    return h, h


def conv_lstm_cell(p: Params, carry: Any, x: jax.Array) -> Any:
    c, h = carry
    i, g, f, o = jnp.split(conv(p["ih"], x) + conv(p["hh"], h), 4, -1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def scanned(step: Callable[..., Any], carry: Any, x: jax.Array) -> jax.Array:
    """The outputs of a cell along the length."""
    return jnp.swapaxes(lax.scan(step, carry, jnp.swapaxes(x, 0, 1))[1], 0, 1)


def rnn(p: Params, x: jax.Array) -> jax.Array:
    zeros = jnp.zeros((x.shape[0], p["cell"]["hi"]["bias"].size))
    return scanned(partial(lstm_cell, p["cell"]), (zeros, zeros), x)


def bidirectional(p: Params, x: jax.Array) -> jax.Array:
    zeros = jnp.zeros((x.shape[0], p["forward_rnn"]["cell"]["hn"]["bias"].size))
    there = scanned(partial(gru_cell, p["forward_rnn"]["cell"]), zeros, x)
    back = scanned(partial(gru_cell, p["backward_rnn"]["cell"]), zeros, jnp.flip(x, 1))
    return jnp.concatenate([there, jnp.flip(back, 1)], -1)


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
    "ConvLocal": conv_local,
    "Dropout": dropout,
    "max_pool": partial(pooled, lax.max, -jnp.inf),
    "avg_pool": lambda p, x: pooled(lax.add, 0.0, p, x) / 4,
    "WeightNorm": weight_norm,
    "SpectralNorm": spectral_norm,
    "Fp8DirectDotGeneralOp": fp8,
    "Fp8DotGeneralOp": partial(fp8_rounded, jnp.float8_e4m3fn, jnp.float8_e5m2),
    "NANOOFp8DotGeneralOp": partial(fp8_rounded, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz),
    "Fp8Einsum": fp8_einsum,
    "MultiHeadAttention": raw.attention,
    "SelfAttention": raw.attention,
    "MGUCell": mgu_cell,
    "ConvLSTMCell": conv_lstm_cell,
    "Bidirectional": bidirectional,
}

STATEFUL = (
    "SpectralNorm",
    "Fp8DirectDotGeneralOp",
    "Fp8DotGeneralOp",
    "NANOOFp8DotGeneralOp",
    "Fp8Einsum",
)
"""Those that take all variables instead of the parameters."""
