"""Rows of the matrix: recurrent cells, further attention and fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax.numpy as jnp
import numpy as np

from tests.nn import formulas
from tests.nn.row import BATCH, LENGTH, WIDTH, Row, floats, hidden, maker

uniform = flax.linen.initializers.uniform

LENGTHS = np.array([1, 4, 3, 2, 4, 4, 1, 2])


def state(*spatial: int, seed: int = 1) -> Any:
    return floats(BATCH, *spatial, WIDTH, seed=seed)


def one_state() -> tuple[Any, ...]:
    """A carry and a step of a cell."""
    return state(), floats(BATCH, 4)


def two_states() -> tuple[Any, ...]:
    return (state(), state(seed=2)), floats(BATCH, 4)


def images() -> tuple[Any, ...]:
    return (state(4, 4), state(4, 4, seed=2)), floats(BATCH, 4, 4, 2)


def cell(kind: str, **fixed: Any) -> Callable[..., Any]:
    """A cell; JAX draws orthogonal matrices in float32 and wider alone, so others are drawn.

    Uniform numbers compile in a fraction of the time of normal ones.
    """
    return maker(kind, WIDTH, recurrent_kernel_init=uniform(1.0), **fixed)


def rnn(kind: str, **fixed: Any) -> Callable[..., Any]:
    def make(namespace: Any, **options: Any) -> Any:
        inner = cell(kind, kernel_init=uniform(1.0))
        return namespace.RNN(inner(namespace, **options), **fixed)

    return make


def bidirectional(**fixed: Any) -> Callable[..., Any]:
    def make(namespace: Any, **options: Any) -> Any:
        directions = (rnn(kind)(namespace, **options) for kind in ("GRUCell", "SimpleCell"))
        return namespace.Bidirectional(*directions, **fixed)

    return make


def operands() -> tuple[Any, ...]:
    return floats(BATCH, WIDTH), floats(WIDTH, 4, seed=1)


DIMS = (((1,), (0,)), ((), ()))


def product(kind: str, *dims: Any) -> Row:
    """A product in eight bits, with what its call says besides operands (layers: `test_fp8.py`)."""

    def make(namespace: Any) -> Any:
        op = getattr(namespace, kind)

        def call(self: Any, lhs: Any, rhs: Any) -> Any:
            return op.__call__(self, *dims, lhs, rhs) if dims else op.__call__(self, lhs, rhs, DIMS)

        return type(kind, (op,), {"__call__": call})(amax_history_length=4)

    return Row(kind, make, operands, typed=(), batch_dims=(0, None))


# The dtype of a state is that of the first carry, whatever the layer computes in.
STATE = ("param_dtype",)

ROWS: list[Row] = [
    *(
        Row(kind, cell(kind), inputs, typed=STATE)
        for kind, inputs in {
            "SimpleCell": one_state,
            "GRUCell": one_state,
            "MGUCell": one_state,
            "LSTMCell": two_states,
            "OptimizedLSTMCell": two_states,
        }.items()
    ),
    Row("SimpleCell-residual", cell("SimpleCell", residual=True), one_state, typed=STATE),
    Row("MGUCell-no-reset", cell("MGUCell", reset_gate=False), one_state, typed=STATE),
    Row("ConvLSTMCell", maker("ConvLSTMCell", WIDTH, (3, 3)), images, typed=STATE),
    Row("RNN", rnn("LSTMCell"), hidden, typed=STATE),
    Row(
        "RNN-backwards",
        rnn("GRUCell", reverse=True, keep_order=True, return_carry=True),
        lambda: (*hidden(), {"seq_lengths": LENGTHS}),
        typed=STATE,
    ),
    Row(
        "RNN-time",
        rnn("SimpleCell", time_major=True, unroll=2),
        lambda: (floats(LENGTH, BATCH, WIDTH),),
        typed=STATE,
        batch_dims=(1,),
        out_batch_dim=1,
    ),
    Row("Bidirectional", bidirectional(merge_fn=jnp.add), hidden, typed=STATE),
    Row("Bidirectional-side-by-side", bidirectional(), hidden, typed=STATE, side_by_side=True),
    Row(
        "GroupedQueryAttention-window",
        maker("GroupedQueryAttention", 4, window=1, logit_softcap=2.0),
        hidden,
        formula=formulas.attention(window=1, cap=2.0),
    ),
    product("Fp8DirectDotGeneralOp"),
    product("Fp8DotGeneralOp"),
    product("NANOOFp8DotGeneralOp"),
    product("Fp8Einsum", "ab,bc->ac"),
]
