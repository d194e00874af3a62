"""The rows of the matrix: each layer of `nn`, how to build it and what to feed it.

A row builds the same model from either namespace: ours, or Flax's, the oracle.  Sizes are small
and divide by every mesh of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

import shardflax.nn as nn

BATCH, LENGTH, WIDTH = 8, 4, 8


@dataclass(frozen=True, eq=False)
class Row:
    """One layer with one set of arguments."""

    name: str
    make: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    call: dict[str, Any] = field(default_factory=dict)
    streams: tuple[str, ...] = ()
    like_flax: bool = True
    """Flax has this layer, with these arguments: values must be equal bit for bit."""
    has_dtype: bool = True
    """The layer takes `dtype`."""
    divides: bool = True
    """The mesh of the tests divides all parameters, as their default names want it."""

    def build(self, namespace: Any = nn, **options: Any) -> Any:
        return self.make(namespace, **options)

    def rngs(self, seed: int = 0) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), 1 + len(self.streams))
        return dict(zip(("params", *self.streams), keys, strict=True))

    def init(self, namespace: Any = nn, inputs: Any = None, **options: Any) -> Any:
        model = self.build(namespace, **options)
        return model.init(self.rngs(), *(inputs or self.inputs()), **self.call)

    def apply(self, variables: Any, *inputs: Any, namespace: Any = nn, **options: Any) -> Any:
        """The output alone; what the layer writes (a cache) is computed and dropped."""
        model = self.build(namespace, **options)
        rngs = {name: key for name, key in self.rngs(1).items() if name in self.streams}
        y, _ = model.apply(variables, *inputs, rngs=rngs, mutable=["cache"], **self.call)
        return y


def floats(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def hidden() -> tuple[Any, ...]:
    return (floats(BATCH, LENGTH, WIDTH),)


def ids() -> tuple[Any, ...]:
    return (jnp.asarray(np.random.RandomState(0).randint(0, 16, (BATCH, LENGTH))),)


def maker(layer: str, *args: Any, **fixed: Any) -> Callable[..., Any]:
    """Builds the layer of that name from a namespace."""

    def make(namespace: Any, **options: Any) -> Any:
        return getattr(namespace, layer)(*args, **fixed, **options)

    return make


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
]

# `SelfAttention` warns of its deprecation in Flax; its row has a test of its own.
SELF_ATTENTION = Row("SelfAttention", maker("SelfAttention", 4), hidden, like_flax=False)
ROWS.append(SELF_ATTENTION)


def layers_of(namespace: Any) -> set[str]:
    """The names of all layers of a namespace."""
    found = {n: getattr(namespace, n) for n in namespace.__all__}
    return {
        n
        for n, v in found.items()
        if isinstance(v, type) and issubclass(v, namespace.Module) and v is not namespace.Module
    }
