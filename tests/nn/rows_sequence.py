"""Rows of the matrix: recurrent cells, further attention and fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax.numpy as jnp
import numpy as np

from tests.nn.row import BATCH, WIDTH, Row, floats, hidden, maker

normal = flax.linen.initializers.normal

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
    """A cell; JAX draws orthogonal matrices in float32 and wider alone, so others are drawn."""
    return maker(kind, WIDTH, recurrent_kernel_init=normal(1.0), **fixed)


def rnn(kind: str, **fixed: Any) -> Callable[..., Any]:
    def make(namespace: Any) -> Any:
        return namespace.RNN(getattr(namespace, kind)(WIDTH), **fixed)

    return make


def bidirectional(**fixed: Any) -> Callable[..., Any]:
    def make(namespace: Any) -> Any:
        cells = namespace.GRUCell(WIDTH), namespace.SimpleCell(WIDTH)
        return namespace.Bidirectional(*map(namespace.RNN, cells), **fixed)

    return make


def operands() -> tuple[Any, ...]:
    return floats(BATCH, WIDTH), floats(WIDTH, 4, seed=1)


DIMS = (((1,), (0,)), ((), ()))


def product(kind: str, *dims: Any, **more: Any) -> Row:
    """A product in eight bits, with what its call says besides operands (layers: `test_fp8.py`)."""

    def make(namespace: Any) -> Any:
        op = getattr(namespace, kind)

        def call(self: Any, lhs: Any, rhs: Any) -> Any:
            return op.__call__(self, *dims, lhs, rhs) if dims else op.__call__(self, lhs, rhs, DIMS)

        return type(kind, (op,), {"__call__": call})(amax_history_length=4)

    return Row(kind, make, operands, own_class=True, has_dtype=False, batched=False, **more)


ROWS: list[Row] = [
    # The dtype of a state is that of the first carry, whatever the layer computes in.
    *(
        Row(kind, cell(kind), inputs, has_dtype=False)
        for kind, inputs in {
            "SimpleCell": one_state,
            "GRUCell": one_state,
            "MGUCell": one_state,
            "LSTMCell": two_states,
            "OptimizedLSTMCell": two_states,
        }.items()
    ),
    Row("SimpleCell-residual", cell("SimpleCell", residual=True), one_state, has_dtype=False),
    Row("MGUCell-no-reset", cell("MGUCell", reset_gate=False), one_state, has_dtype=False),
    Row("ConvLSTMCell", maker("ConvLSTMCell", WIDTH, (3, 3)), images, has_dtype=False),
    Row("RNN", rnn("LSTMCell"), hidden, has_dtype=False),
    Row(
        "RNN-backwards",
        rnn("GRUCell", reverse=True, keep_order=True, return_carry=True),
        hidden,
        call={"seq_lengths": LENGTHS},
        has_dtype=False,
    ),
    Row(
        "RNN-time",
        rnn("SimpleCell", time_major=True, unroll=2),
        hidden,
        has_dtype=False,
        batched=False,
    ),
    # Features side by side have to move, where they are spread over devices.
    Row("Bidirectional", bidirectional(merge_fn=jnp.add), hidden, has_dtype=False),
    Row("Bidirectional-side-by-side", bidirectional(), hidden, has_dtype=False),
    Row(
        "GroupedQueryAttention-window",
        maker("GroupedQueryAttention", 4, window=1, logit_softcap=2.0),
        hidden,
        like_flax=False,
    ),
    product("Fp8DirectDotGeneralOp"),
    # Flax warns of their deprecation; test_fp8.py compares them.
    product("Fp8DotGeneralOp", like_flax=False),
    product("NANOOFp8DotGeneralOp", like_flax=False),
    product("Fp8Einsum", "ab,bc->ac"),
]
