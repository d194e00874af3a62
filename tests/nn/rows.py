"""The rows of the matrix: each layer of `nn`, how to build it and what to feed it.

Linear layers, attention and what is made of them are here; `rows_images` and `rows_sequence` have
the others.  `ROWS` has all.
"""

from __future__ import annotations

from typing import Any

import flax.linen
import numpy as np

from tests.nn import rows_images, rows_sequence
from tests.nn.row import BATCH, LENGTH, WIDTH, Row, floats, hidden, ids, maker

__all__ = ["ROWS"]


def chain(namespace: Any) -> Any:
    return namespace.Sequential([namespace.LayerNorm(), namespace.Dense(16), namespace.gelu])


normal = flax.linen.initializers.normal
causal = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))
cross = lambda: (floats(BATCH, LENGTH, WIDTH), floats(BATCH, 6, WIDTH, seed=1))  # noqa: E731

ROWS = [
    Row("Dense", maker("Dense", 16), hidden),
    Row("Dense-no-bias", maker("Dense", 16, use_bias=False), hidden),
    Row("Dense-inits", maker("Dense", 16, kernel_init=normal(1.0), bias_init=normal(1.0)), hidden),
    Row("DenseGeneral", maker("DenseGeneral", 16), hidden),
    Row("DenseGeneral-heads", maker("DenseGeneral", (4, 2), bias_init=normal(1.0)), hidden),
    Row("DenseGeneral-merge", maker("DenseGeneral", 16, axis=(-2, -1)), hidden),
    Row("DenseGeneral-axes", maker("DenseGeneral", (2, 4), axis=(-1, 1)), hidden),
    Row("DenseGeneral-batch", maker("DenseGeneral", 16, axis=-1, batch_dims=(0,)), hidden),
    Row("Einsum", maker("Einsum", (WIDTH, 4, 2), "...d,dhk->...hk"), hidden),
    Row("Einsum-back", maker("Einsum", (LENGTH, WIDTH, 16), "bld,ldm->bm"), hidden),
    Row("Einsum-batch", maker("Einsum", (LENGTH, WIDTH, 16), "bld,ldm->blm"), hidden),
    Row("Embed", maker("Embed", 16, WIDTH), ids),
    Row("Embed-single", maker("Embed", 1, WIDTH), ids, divides=False),
    Row("Embed-one-hot", maker("Embed", 16, WIDTH, lookup="one_hot"), ids, like_flax=False),
    Row("LayerNorm", maker("LayerNorm"), hidden),
    Row("LayerNorm-exact", maker("LayerNorm", use_fast_variance=False), hidden),
    Row("LayerNorm-axes", maker("LayerNorm", reduction_axes=(1, 2), feature_axes=(2, 1)), hidden),
    Row("LayerNorm-bare", maker("LayerNorm", use_scale=False, use_bias=False), hidden),
    Row("LayerNorm-mask", maker("LayerNorm"), hidden, call={"mask": np.arange(WIDTH) < 5}),
    Row("RMSNorm", maker("RMSNorm"), hidden),
    Row("RMSNorm-narrow", maker("RMSNorm", force_float32_reductions=False), hidden),
    Row(
        "Dropout",
        maker("Dropout", 0.5, deterministic=False),
        hidden,
        streams=("dropout",),
        has_dtype=False,
    ),
    Row(
        "Dropout-broadcast",
        maker("Dropout", 0.3, broadcast_dims=(1, -1)),
        hidden,
        call={"deterministic": False},
        streams=("dropout",),
        has_dtype=False,
    ),
    Row("Sequential", chain, hidden, has_dtype=False),
    Row("MultiHeadDotProductAttention", maker("MultiHeadDotProductAttention", 4), cross),
    Row(
        "MultiHeadDotProductAttention-options",
        maker(
            "MultiHeadDotProductAttention",
            4,
            qkv_features=16,
            out_features=4,
            normalize_qk=True,
            force_fp32_for_softmax=True,
            out_kernel_init=normal(1.0),
        ),
        hidden,
        call={"mask": causal},
    ),
    Row(
        "MultiHeadAttention-dropout",
        maker("MultiHeadAttention", 4, dropout_rate=0.5, deterministic=False),
        hidden,
        streams=("dropout",),
    ),
    Row(
        "MultiHeadAttention-decode",
        maker("MultiHeadAttention", 4, decode=True),
        lambda: (floats(BATCH, 1, WIDTH),),
    ),
    Row(
        "GroupedQueryAttention",
        maker("GroupedQueryAttention", 4, num_kv_heads=2),
        hidden,
        like_flax=False,
    ),
    Row(
        "GroupedQueryAttention-options",
        maker(
            "GroupedQueryAttention",
            4,
            num_kv_heads=1,
            head_dim=4,
            normalize_qk=True,
            use_bias=True,
            rope_theta=None,
            implementation="reference",
        ),
        hidden,
        call={"mask": causal},
        like_flax=False,
    ),
    Row(
        "GroupedQueryAttention-dropout",
        maker("GroupedQueryAttention", 4, dropout_rate=0.5, deterministic=False),
        hidden,
        streams=("dropout",),
        like_flax=False,
    ),
    Row(
        "GroupedQueryAttention-decode",
        maker("GroupedQueryAttention", 4, num_kv_heads=2, decode=True),
        hidden,
        like_flax=False,
    ),
    # Warns of its deprecation in Flax.
    Row("SelfAttention", maker("SelfAttention", 4), hidden, like_flax=False),
    *rows_images.ROWS,
    *rows_sequence.ROWS,
]
