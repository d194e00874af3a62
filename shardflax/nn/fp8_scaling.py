"""Numbers in eight bits: scales from the largest values of late, and products that keep them.

A tensor is divided by a scale so that its largest value is the largest number of the type; the
scale follows from a history of largest values ("delayed scaling", arXiv:2209.05433 section 3).
Scales and histories are inputs here whose *gradient is their next value*: what a step learns about
the sizes of tensors comes out of its backward pass, the only place that sees gradients' sizes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from shardflax.nn._manual import varying_axes
from shardflax.nn.types import Array, Dtype, Precision
from shardflax.partitioning.explicit_out import explicit_axes

__all__ = [
    "compute_amax_history",
    "compute_scale",
    "dequantize",
    "dot_general_with_precision",
    "get_fp8_max",
    "in_q",
    "in_qdq",
    "out_dq",
    "out_qdq",
    "qdq",
    "quantize",
    "quantized_dot",
]

DimensionNumbers = Any


def get_fp8_max(fp8_dtype: Dtype, out_dtype: Dtype) -> Array:
    """The largest number of an eight-bit type, as a scalar of another.

    >>> float(get_fp8_max(jnp.float8_e4m3fn, jnp.float32))
    448.0
    """
    return jnp.finfo(fp8_dtype).max.astype(out_dtype)


def compute_scale(amax: Array, scale: Array, fp8_max: Array, margin: int = 0) -> Array:
    """The scale at which `amax` becomes `fp8_max / 2 ** margin`.

    `amax` is a scalar and `scale`, the old one, `(1,)`; it stays where `amax` is 0 or not finite.

    >>> compute_scale(jnp.float32(7), jnp.ones(1), jnp.float32(448)).tolist()
    [0.015625]
    """
    old = 1.0 / scale
    largest = fp8_max / 2**margin if margin else fp8_max
    factor = jnp.where(amax > 0.0, largest / amax, old)
    return 1.0 / jnp.where(jnp.isfinite(amax), factor, old)


def compute_amax_history(x: Array, amax_history: Array) -> Array:
    """`amax_history` `(length,)` with its first entry last, and the largest of `|x|` first.

    >>> compute_amax_history(jnp.array([-3.0, 2.0]), jnp.array([5.0, 1.0])).tolist()
    [3.0, 5.0]
    """
    largest = jnp.max(jnp.abs(x)).astype(amax_history.dtype)
    if apart := tuple(sorted(varying_axes(largest))):
        # Inside shard_map each device sees its part: the scale is that of the whole.
        largest = lax.pmax(largest, apart)
    return jnp.roll(amax_history, shift=-1, axis=0).at[0].set(largest)


def quantize(x: Array, q_dtype: Dtype, scale: Array, compute_dtype: Dtype) -> Array:
    """`x / scale` in the eight-bit `q_dtype`; what is too large becomes the largest number.

    The division is in `compute_dtype`.

    >>> quantize(jnp.array([1.0, 1e4]), jnp.float8_e4m3fn, jnp.ones(1), jnp.float32).tolist()
    [1.0, 448.0]
    """
    largest = get_fp8_max(q_dtype, compute_dtype)
    scaled = x / _over(scale, x, compute_dtype)
    return jnp.clip(scaled, -largest, largest).astype(q_dtype)


def dequantize(x: Array, dq_dtype: Dtype, scale: Array) -> Array:
    """`x * scale` in `dq_dtype`.

    >>> dequantize(jnp.array([2.0]), jnp.bfloat16, jnp.array([0.5])).dtype
    dtype(bfloat16)
    """
    return x.astype(dq_dtype) * _over(scale, x, dq_dtype)


def _over(scale: Array, x: Array, dtype: Dtype) -> Array:
    """A scale `(1,)` with the rank of `x`."""
    return jnp.reshape(scale.astype(dtype), (1,) * max(x.ndim, 1))


def qdq(x: Array, q_dtype: Dtype, scale: Array, compute_dtype: Dtype) -> Array:
    """`x` as `q_dtype` can hold it: quantized and back, in the dtype of `x`.

    >>> qdq(jnp.array([1.06]), jnp.float8_e4m3fn, jnp.ones(1), jnp.float32).tolist()
    [1.0]
    """
    return dequantize(quantize(x, q_dtype, scale, compute_dtype), x.dtype, scale)


def _next_state(x: Array, q_dtype: Dtype, scale: Array, history: Array) -> tuple[Array, Array]:
    """The scale for `x`, from what came before it; and the history with `x` in it."""
    largest = jnp.max(history, axis=0)
    scale = compute_scale(largest, scale, get_fp8_max(q_dtype, jnp.float32))
    return scale, compute_amax_history(x, history)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_qdq(
    compute_dtype: Dtype, q_dtype: Dtype, inp: Array, scale: Array, amax_history: Array
) -> Array:
    """An operand as `q_dtype` can hold it; its gradient passes unchanged.

    The "gradients" of `scale` `(1,)` and `amax_history` `(length,)` are their next values.

    >>> x, one = jnp.array([1.06, 4.0]), jnp.ones(1)
    >>> of_state = jax.grad(lambda s, h: in_qdq(x.dtype, jnp.float8_e4m3fn, x, s, h).sum(), (0, 1))
    >>> [a.tolist() for a in of_state(one, jnp.array([7.0, 0.0]))]
    [[0.015625], [4.0, 7.0]]
    """
    scale, _ = _next_state(inp, q_dtype, scale, amax_history)
    return qdq(inp, q_dtype, scale, compute_dtype)


def _in_qdq_fwd(
    compute_dtype: Dtype, q_dtype: Dtype, x: Array, scale: Array, history: Array
) -> tuple[Array, Any]:
    scale, history = _next_state(x, q_dtype, scale, history)
    return qdq(x, q_dtype, scale, compute_dtype), (scale, history)


def _in_qdq_bwd(compute_dtype: Dtype, q_dtype: Dtype, state: Any, g: Array) -> Any:
    return g, *state


in_qdq.defvjp(_in_qdq_fwd, _in_qdq_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def out_qdq(
    compute_dtype: Dtype, q_dtype: Dtype, out: Array, scale: Array, amax_history: Array
) -> Array:
    """A result as it is; its *gradient* becomes what `q_dtype` can hold.

    The "gradients" of `scale` `(1,)` and `amax_history` `(length,)` are their next values.

    >>> def loss(y):
    ...     return (1.06 * out_qdq(y.dtype, jnp.float8_e5m2, y, jnp.ones(1), jnp.zeros(2))).sum()
    >>> jax.grad(loss)(jnp.ones(1)).tolist()
    [1.0]
    """
    return out


def _out_qdq_fwd(
    compute_dtype: Dtype, q_dtype: Dtype, y: Array, scale: Array, history: Array
) -> tuple[Array, Any]:
    return y, (scale, history)


def _out_qdq_bwd(compute_dtype: Dtype, q_dtype: Dtype, state: Any, g: Array) -> Any:
    scale, history = _next_state(g, q_dtype, *state)
    return qdq(g, q_dtype, scale, compute_dtype), scale, history


out_qdq.defvjp(_out_qdq_fwd, _out_qdq_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def dot_general_with_precision(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    precision: Precision = None,
    preferred_element_type: Dtype | None = None,
    out_sharding: Any = None,
) -> Array:
    """`lax.dot_general` in the default precision, its derivatives in the highest.

    So that a compiler, which sees operands that eight bits can hold, may multiply in eight bits,
    and keep the wider sums of the backward pass.  `precision` is there for the sake of the
    signature, and not used.

    >>> dot_general_with_precision(
    ...     jnp.ones((2, 3)), jnp.ones((3, 2)), (((1,), (0,)), ((), ()))
    ... ).sum()
    Array(12., dtype=float32)
    """
    default = lax.Precision.DEFAULT
    return _dot(lhs, rhs, dimension_numbers, default, preferred_element_type, out_sharding)


@dot_general_with_precision.defjvp
def _dot_jvp(
    dims: Any, precision: Any, preferred: Any, out: Any, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    (lhs, rhs), (of_lhs, of_rhs) = primals, tangents
    y = _dot(lhs, rhs, dims, lax.Precision.DEFAULT, preferred, out)
    tangent = partial(
        _dot, dims=dims, precision=lax.Precision.HIGHEST, preferred=preferred, out_sharding=out
    )
    return y, tangent(lhs, of_rhs) + tangent(of_lhs, rhs)


def _dot(
    lhs: Array, rhs: Array, dims: Any, precision: Any, preferred: Any, out_sharding: Any = None
) -> Array:
    return lax.dot_general(
        lhs,
        rhs,
        dims,
        precision=precision,
        preferred_element_type=preferred,
        out_sharding=out_sharding,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_q(
    compute_dtype: Dtype, q_dtype: Dtype, inp: Array, scale: Array, amax_history: Array
) -> tuple[Array, Array]:
    """An operand in `q_dtype`, and the scale `(1,)` that it was divided by.

    The "gradients" of `scale` and `amax_history` `(length,)` are their next values; that of `inp`
    is zero: `quantized_dot` gives it.

    >>> q, scale = in_q(jnp.float32, jnp.float8_e4m3fn, jnp.ones(2), jnp.ones(1), jnp.zeros(2))
    >>> q.dtype, scale.tolist()
    (dtype(float8_e4m3fn), [1.0])
    """
    scale, _ = _next_state(inp, q_dtype, scale, amax_history)
    return quantize(inp, q_dtype, scale, compute_dtype), scale


def _in_q_fwd(
    compute_dtype: Dtype, q_dtype: Dtype, x: Array, scale: Array, history: Array
) -> tuple[Any, Any]:
    scale, history = _next_state(x, q_dtype, scale, history)
    return (quantize(x, q_dtype, scale, compute_dtype), scale), (scale, history)


def _in_q_bwd(compute_dtype: Dtype, q_dtype: Dtype, state: Any, g: Any) -> Any:
    return None, *state


in_q.defvjp(_in_q_fwd, _in_q_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def out_dq(dq_type: Dtype, lhs_scale: Array, rhs_scale: Array, out: Array) -> Array:
    """A product of quantized operands times their scales; its gradient passes unchanged.

    >>> out_dq(jnp.float32, jnp.array([2.0]), jnp.array([3.0]), jnp.ones(1)).tolist()
    [6.0]
    """
    return dequantize(out, dq_type, lhs_scale * rhs_scale)


def _out_dq_fwd(dq_type: Dtype, lhs_scale: Array, rhs_scale: Array, out: Array) -> Any:
    return out_dq(dq_type, lhs_scale, rhs_scale, out), None


def _out_dq_bwd(dq_type: Dtype, _: None, g: Array) -> Any:
    return None, None, g


out_dq.defvjp(_out_dq_fwd, _out_dq_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def quantized_dot(
    lhs: Array,
    q_lhs: Array,
    lhs_scale: Array,
    rhs: Array,
    q_rhs: Array,
    rhs_scale: Array,
    out_grad_scale: Array,
    out_grad_amax_history: Array,
    dimension_numbers: DimensionNumbers,
    preferred_element_type: Dtype | None = None,
    grad_dtype: Dtype = jnp.float8_e5m2,
    out_sharding: Any = None,
) -> Array:
    """The product of two quantized operands, not yet times their scales (see `out_dq`).

    The backward pass quantizes the gradient to `grad_dtype` and multiplies it in eight bits too.
    Gradients go to `lhs` and `rhs`, which are used for nothing else; those of
    `out_grad_scale` and `out_grad_amax_history` are their next values.

    >>> q, one = jnp.ones((2, 2), jnp.float8_e4m3fn), jnp.ones(1)
    >>> x, dims = jnp.ones((2, 2)), (((1,), (0,)), ((), ()))
    >>> quantized_dot(x, q, one, x, q, one, one, jnp.zeros(2), dims, jnp.float32).sum()
    Array(8., dtype=float32)
    """
    default = lax.Precision.DEFAULT
    return _dot(q_lhs, q_rhs, dimension_numbers, default, preferred_element_type, out_sharding)


def _quantized_dot_fwd(
    lhs: Array,
    q_lhs: Array,
    lhs_scale: Array,
    rhs: Array,
    q_rhs: Array,
    rhs_scale: Array,
    grad_scale: Array,
    grad_history: Array,
    dims: DimensionNumbers,
    preferred: Dtype | None,
    grad_dtype: Dtype,
    out_sharding: Any,
) -> tuple[Array, Any]:
    y = _dot(q_lhs, q_rhs, dims, lax.Precision.DEFAULT, preferred, out_sharding)
    return y, (q_lhs, lhs_scale, q_rhs, rhs_scale, grad_scale, grad_history)


def _quantized_dot_bwd(
    dims: DimensionNumbers,
    preferred: Dtype | None,
    grad_dtype: Dtype,
    out_sharding: Any,
    kept: Any,
    g: Array,
) -> Any:
    q_lhs, lhs_scale, q_rhs, rhs_scale, scale, history = kept
    scale, history = _next_state(g, grad_dtype, scale, history)
    q_g = quantize(g, grad_dtype, scale, g.dtype)
    ((lc, rc), (lb, rb)) = dims
    flipped = ((rc, lc), (rb, lb))
    of_lhs = _gradient(q_lhs, q_g, q_rhs, dims, g.dtype, right=False)
    of_rhs = _gradient(q_rhs, q_g, q_lhs, flipped, g.dtype, right=True)
    of_lhs = dequantize(of_lhs, g.dtype, rhs_scale * scale)
    of_rhs = dequantize(of_rhs, g.dtype, lhs_scale * scale)
    return of_lhs, None, None, of_rhs, None, None, scale, history


quantized_dot.defvjp(_quantized_dot_fwd, _quantized_dot_bwd)


def _gradient(x: Array, g: Array, other: Array, dims: Any, dtype: Dtype, right: bool) -> Array:
    """The gradient of `x`, an operand of a product, from that of its result.

    `dims` are those of the product, of `x` first.  The result has the batch dims, the free dims of
    the left operand, and those of the right one; `right` says that `x` was that.
    """
    (contract, other_contract), (batch, other_batch) = dims
    free = [d for d in range(x.ndim) if d not in (*contract, *batch)]
    other_free = [d for d in range(other.ndim) if d not in (*other_contract, *other_batch)]
    first = len(batch) + (0 if right else len(free))
    of_g, of_batch = tuple(range(first, first + len(other_free))), tuple(range(len(batch)))
    # The contracted dims of `x`, in the order in which `other` has them.
    by_other = [c for _, c in sorted(zip(other_contract, contract, strict=True))]
    # The result's gradient comes first, as in JAX's own products: sums are rounded in their order.
    order = [*batch, *free, *by_other]
    numbers = ((of_g, tuple(other_free)), (of_batch, other_batch))
    found = _dot(g, other, numbers, lax.Precision.HIGHEST, dtype, _spec_of(x, order))
    return jnp.transpose(found, [order.index(d) for d in range(x.ndim)])


def _spec_of(x: Array, order: list[int]) -> PartitionSpec | None:
    """On explicit axes, how `x` is laid out, its dims in another order."""
    if not explicit_axes():
        return None
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*[spec[d] for d in order])
