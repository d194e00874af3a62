"""Products in eight bits, for the `dot_general_cls` of layers; and the parts they are made of.

Their state is in the collection `_overwrite_with_gradient`: scales, and histories of largest
values.  Take gradients to it as to `params`, and put the gradients in its place, as
`shardflax.training.TrainState.apply_gradients` does.  It is not laid out over any axis.

A layer stack gives each layer a state of its own (`variable_axes={"_overwrite_with_gradient": 0}`
beside `params`), an `RNN` with that field each step.  One state for several calls does not work:
gradients of a value that is used twice are added, and a scale is no sum (Linen's too).
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardflax import partitioning
from shardflax.core import Module
from shardflax.nn import initializers
from shardflax.nn.errors import EinsumError, InputRankError, InputShapeError, where
from shardflax.nn.fp8_scaling import (
    compute_amax_history,
    compute_scale,
    dequantize,
    dot_general_with_precision,
    get_fp8_max,
    in_q,
    in_qdq,
    out_dq,
    out_qdq,
    qdq,
    quantize,
    quantized_dot,
)
from shardflax.nn.types import Array, Dtype, Precision
from shardflax.partitioning import default_names

__all__ = [
    "OVERWRITE_WITH_GRADIENT",
    "Fp8DirectDotGeneralOp",
    "Fp8DotGeneral",
    "Fp8DotGeneralBase",
    "Fp8DotGeneralOp",
    "Fp8Einsum",
    "NANOOFp8DotGeneralOp",
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

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"


class Fp8DotGeneralBase(Module):
    """The state of a product in eight bits: a scale and a history for each of three tensors.

    `input_*` and `kernel_*` are of the operands, in `e4m3_dtype`; `output_grad_*` of the
    gradient, in `e5m2_dtype`.  Scales are `(1,)`, histories `(amax_history_length,)`, float32.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.Dense(3, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 4)))
    >>> shapes["_overwrite_with_gradient"]["Fp8DirectDotGeneralOp_0"]["kernel_scale"].shape
    (1,)
    """

    amax_history_length: int = 1024
    e4m3_dtype: Dtype = jnp.float8_e4m3fn
    e5m2_dtype: Dtype = jnp.float8_e5m2

    def setup(self) -> None:
        for tensor in ("input", "output_grad", "kernel"):
            scale = self._state(f"{tensor}_scale", initializers.ones, 1)
            history = self._state(
                f"{tensor}_amax_history", initializers.zeros, self.amax_history_length
            )
            setattr(self, f"{tensor}_scale", scale)
            setattr(self, f"{tensor}_amax_history", history)

    def _state(self, name: str, init: Any, size: int) -> Any:
        init = partitioning.named(init, default_names(None))
        return self.variable(OVERWRITE_WITH_GRADIENT, name, init, None, (size,), jnp.float32)


def _check(op: Module, lhs: Array, rhs: Array, dimension_numbers: Any) -> None:
    """Raises unless the dims of a product are there, and of equal sizes."""
    shapes = jnp.shape(lhs), jnp.shape(rhs)
    for pairs in dimension_numbers:
        for what, shape, dims in zip(("lhs", "rhs"), shapes, pairs, strict=True):
            if any(d >= len(shape) for d in dims):
                wanted = f"those of dimension_numbers={dimension_numbers}"
                raise InputRankError(where(op), what, wanted, shape)
        for a, b in zip(*pairs, strict=True):
            if shapes[0][a] != shapes[1][b]:
                raise InputShapeError(
                    where(op),
                    "lhs",
                    dim=a,
                    expected=shapes[1][b],
                    found=shapes[0][a],
                    why=f"dim {b} of rhs",
                )


class Fp8DotGeneralOp(Fp8DotGeneralBase):
    """A product of operands that eight bits can hold, in their own dtype.

    Operands and gradient are rounded to eight bits and widened again, which a compiler turns into
    a product in eight bits where the device has one.  The result has the dtype of the second
    operand.  Arguments are those of `lax.dot_general`; `precision` and `preferred_element_type`
    are not used.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.Dense(1, dot_general_cls=nn.Fp8DotGeneralOp), jnp.full((1, 4), 3.0)
    >>> @jax.jit
    ... def state_after_a_step(key):
    ...     variables = layer.init(key, x)
    ...     grads = jax.grad(lambda v: layer.apply(v, x).sum())(variables)
    ...     return grads["_overwrite_with_gradient"]["Fp8DotGeneralOp_0"]
    >>> state_after_a_step(jax.random.key(0))["input_amax_history"][:2].tolist()
    [3.0, 0.0]
    """

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        dimension_numbers: Any,
        *args: Any,
        out_sharding: Any = None,
        **kwargs: Any,
    ) -> Array:
        _check(self, lhs, rhs, dimension_numbers)
        dtype = rhs.dtype
        narrow, widest = self.e4m3_dtype, self.e5m2_dtype
        lhs = in_qdq(
            dtype,
            narrow,
            jnp.asarray(lhs, dtype),
            self.input_scale.value,
            self.input_amax_history.value,
        )
        rhs = in_qdq(dtype, narrow, rhs, self.kernel_scale.value, self.kernel_amax_history.value)
        y = dot_general_with_precision(lhs, rhs, dimension_numbers, None, None, out_sharding)
        return out_qdq(
            dtype, widest, y, self.output_grad_scale.value, self.output_grad_amax_history.value
        )


class Fp8DirectDotGeneralOp(Fp8DotGeneralBase):
    """A product of operands in eight bits, said as such: forward and backward.

    The result has the dtype of the second operand.  Arguments are those of `lax.dot_general`;
    `precision` and `preferred_element_type` are not used.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.Dense(1, dot_general_cls=nn.Fp8DirectDotGeneralOp), jnp.ones((1, 4))
    >>> y, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), x.astype(jnp.bfloat16))
    >>> y.dtype
    dtype('float32')
    """

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        dimension_numbers: Any,
        *args: Any,
        out_sharding: Any = None,
        **kwargs: Any,
    ) -> Array:
        lhs = jnp.asarray(lhs, rhs.dtype)
        return self._direct(lhs, rhs, dimension_numbers, out_sharding=out_sharding)

    def _direct(
        self,
        lhs: Array,
        rhs: Array,
        dimension_numbers: Any,
        preferred_element_type: Dtype | None = None,
        out_sharding: Any = None,
    ) -> Array:
        _check(self, lhs, rhs, dimension_numbers)
        dtype = rhs.dtype
        out = dtype if preferred_element_type is None else preferred_element_type
        quantized = partial(in_q, dtype, self.e4m3_dtype)
        q_lhs, lhs_scale = quantized(lhs, self.input_scale.value, self.input_amax_history.value)
        q_rhs, rhs_scale = quantized(rhs, self.kernel_scale.value, self.kernel_amax_history.value)
        y = quantized_dot(
            lhs,
            q_lhs,
            lhs_scale,
            rhs,
            q_rhs,
            rhs_scale,
            self.output_grad_scale.value,
            self.output_grad_amax_history.value,
            dimension_numbers,
            out,
            self.e5m2_dtype,
            out_sharding,
        )
        return out_dq(out, lhs_scale, rhs_scale, y)


Fp8DotGeneral = Fp8DirectDotGeneralOp


class Fp8Einsum(Fp8DirectDotGeneralOp):
    """`jnp.einsum` of two operands in eight bits, as `Fp8DirectDotGeneralOp` multiplies.

    The result has `preferred_element_type`, by default the dtype of `rhs`; `precision` is not used.
    An equation without output, or not of two operands, is an `EinsumError`; dims that are `...` in
    both operands have equal sizes.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> x, kernel = jnp.ones((2, 5, 4)), jnp.ones((4, 3))
    >>> op = nn.Fp8Einsum(amax_history_length=16)
    >>> product = lambda *operands: op.init_with_output(jax.random.key(0), "bld,dm->blm", *operands)
    >>> jax.eval_shape(product, x, kernel)[0].shape
    (2, 5, 3)
    """

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        eqn: str,
        lhs: Array,
        rhs: Array,
        precision: Precision = None,
        preferred_element_type: Dtype | None = None,
        out_sharding: Any = None,
    ) -> Array:
        plan = _plan(where(self), eqn, jnp.shape(lhs), jnp.shape(rhs))
        lhs = jnp.sum(jnp.asarray(lhs, rhs.dtype), plan.sums[0])
        first, second = lhs, jnp.sum(rhs, plan.sums[1])
        if plan.swapped:
            first, second = second, first
        if out_sharding is not None:
            before = sorted(range(len(plan.order)), key=plan.order.__getitem__)
            spec = (*out_sharding, *[None] * (len(before) - len(out_sharding)))
            out_sharding = PartitionSpec(*[spec[d] for d in before])
        y = self._direct(first, second, plan.dims, preferred_element_type, out_sharding)
        return jnp.transpose(y, plan.order)


@dataclass(frozen=True)
class _Plan:
    """An equation as sums of each operand, a product (swapped or not) and a transposition."""

    sums: tuple[tuple[int, ...], tuple[int, ...]]
    swapped: bool
    dims: Any
    order: tuple[int, ...]


@lru_cache(maxsize=256)
def _plan(
    place: str, equation: str, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...]
) -> _Plan:
    """How JAX does it, in its order: the state of the first operand is `input_*`.

    Not by `jnp.einsum` itself: it would keep the operand's state, which its product closes over.
    """
    lhs, rhs, out = _labels(place, equation, lhs_shape, rhs_shape)
    alone = [[c for c in a if c not in b and c not in out] for a, b in ((lhs, rhs), (rhs, lhs))]
    sums = tuple(lhs.index(c) for c in alone[0]), tuple(rhs.index(c) for c in alone[1])
    lhs, rhs = ("".join(c for c in t if c not in a) for t, a in zip((lhs, rhs), alone, strict=True))
    batch = [c for c in lhs if c in rhs and c in out]
    contract = [c for c in lhs if c in rhs and c not in out]
    frees = [[c for c in t if c not in batch and c not in contract] for t in (lhs, rhs)]
    found = [*batch, *frees[0], *frees[1]]
    operands = (lhs, rhs)
    if swapped := found != [*out]:
        found, operands = [*batch, *frees[1], *frees[0]], (rhs, lhs)
    contracted, batched = (
        tuple(tuple(t.index(c) for c in labels) for t in operands) for labels in (contract, batch)
    )
    return _Plan(sums, swapped, (contracted, batched), tuple(found.index(c) for c in out))


def _labels(place: str, equation: str, *shapes: tuple[int, ...]) -> tuple[str, str, str]:
    """The labels of both operands and of the output, the ellipsis spelled out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2:
        raise EinsumError(place, f"{equation!r} must be like 'ab,bc->ac', for two operands.")
    free = [c for c in string.ascii_letters if c not in equation]
    widths = [len(s) - len(t.replace("...", "")) for s, t in zip(shapes, operands, strict=True)]
    dots = "".join(free[: max(0, *widths)])
    for what, width, text, shape in zip(("lhs", "rhs"), widths, operands, shapes, strict=True):
        if width < 0 or (width and "..." not in text):
            raise InputRankError(place, what, f"that of {text!r}", shape)
    spelled = [
        t.replace("...", dots[len(dots) - w :]) for t, w in zip(operands, widths, strict=True)
    ]
    labels = spelled[0], spelled[1], out.replace("...", dots)
    if any(len(set(t)) < len(t) for t in labels) or set(labels[2]) - set("".join(spelled)):
        raise EinsumError(place, f"{equation!r}: a label stands twice, or in the output alone.")
    return labels


class NANOOFp8DotGeneralOp(Fp8DotGeneralOp):
    """`Fp8DotGeneralOp` in the eight-bit types without infinities or a negative zero (AMD).

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.Dense(3, dot_general_cls=nn.NANOOFp8DotGeneralOp)
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 4)))[0].shape
    (2, 3)
    """

    e4m3_dtype: Dtype = jnp.float8_e4m3fnuz
    e5m2_dtype: Dtype = jnp.float8_e5m2fnuz
