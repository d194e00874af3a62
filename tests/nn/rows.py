"""The rows of the matrix: each layer of `nn`, how to build it and what to feed it.

Linear layers, attention and what is made of them are here; `rows_images` and `rows_sequence` have
the others.  `ROWS` has all.
"""

from __future__ import annotations

from typing import Any

import flax.linen
import numpy as np

from shardflax.partitioning import default_names
from tests.nn import formulas, rows_images, rows_sequence
from tests.nn.row import BATCH, LENGTH, WIDTH, Row, floats, hidden, ids, maker

__all__ = ["ROWS"]


def chain(namespace: Any, **options: Any) -> Any:
    layers = namespace.LayerNorm(**options), namespace.Dense(16, **options), namespace.gelu
    return namespace.Sequential(layers)


normal = flax.linen.initializers.normal
causal = {"mask": np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))}
features = {"mask": np.arange(WIDTH) < 5}
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
    # One row is not cut: the default names would be an error.
    Row(
        "Embed-single",
        maker("Embed", 1, WIDTH),
        ids,
        ours={"embedding_axes": default_names(None, "vocab_embed")},
    ),
    Row(
        "Embed-one-hot",
        maker("Embed", 16, WIDTH, lookup="one_hot"),
        ids,
        formula=formulas.looked_up,
    ),
    Row("LayerNorm", maker("LayerNorm"), hidden),
    Row("LayerNorm-exact", maker("LayerNorm", use_fast_variance=False), hidden),
    Row("LayerNorm-axes", maker("LayerNorm", reduction_axes=(1, 2), feature_axes=(2, 1)), hidden),
    Row("LayerNorm-bare", maker("LayerNorm", use_scale=False, use_bias=False), hidden),
    Row("LayerNorm-mask", maker("LayerNorm"), lambda: (*hidden(), features), batch_dims=(0, None)),
    Row("RMSNorm", maker("RMSNorm"), hidden),
    Row("RMSNorm-narrow", maker("RMSNorm", force_float32_reductions=False), hidden),
    Row(
        "Dropout",
        maker("Dropout", 0.5, deterministic=False),
        hidden,
        streams=("dropout",),
        typed=(),
    ),
    Row(
        "Dropout-broadcast",
        maker("Dropout", 0.3, broadcast_dims=(1, -1)),
        hidden,
        call={"deterministic": False},
        streams=("dropout",),
        typed=(),
    ),
    Row("Sequential", chain, hidden),
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
        lambda: (*hidden(), causal),
        batch_dims=(0, None),
    ),
    Row(
        "MultiHeadAttention",
        maker("MultiHeadAttention", 4, dropout_rate=0.5, deterministic=False),
        hidden,
        streams=("dropout",),
    ),
    Row(
        "MultiHeadAttention-decode",
        maker("MultiHeadAttention", 4, decode=True),
        lambda: (floats(BATCH, 1, WIDTH),),
        no_gradient=("key", "query"),  # one token has nothing to choose from
    ),
    Row(
        "GroupedQueryAttention",
        maker("GroupedQueryAttention", 4, num_kv_heads=2),
        hidden,
        formula=formulas.attention(),
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
        lambda: (*hidden(), causal),
        batch_dims=(0, None),
        formula=formulas.attention(theta=None),
    ),
    Row(
        "GroupedQueryAttention-dropout",
        maker("GroupedQueryAttention", 4, dropout_rate=0.5, deterministic=False),
        hidden,
        streams=("dropout",),
        formula=formulas.attention(rate=0.5),
    ),
    Row(
        "GroupedQueryAttention-decode",
        maker("GroupedQueryAttention", 4, num_kv_heads=2, decode=True),
        hidden,
        formula=formulas.attention(),
    ),
    Row("SelfAttention", maker("SelfAttention", 4), hidden),
    *rows_images.ROWS,
    *rows_sequence.ROWS,
]
