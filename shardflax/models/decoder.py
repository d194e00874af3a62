"""A Llama-style decoder: rotary grouped-query attention, gated feed-forward, pre-normalisation.

The blocks are one `scan` over stacked parameters, so the program does not grow with the depth.
Names of parameters and activations are those of the default rules: any preset lays it out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import shardflax.nn as nn
from shardflax.models.config import DecoderConfig
from shardflax.partitioning import (
    PARTITION_NAME,
    AxisRules,
    constrain,
    default_names,
    get_logical_axis_rules,
)

__all__ = ["Decoder", "DecoderBlock", "FeedForward"]

_RESIDUAL = ("batch", "norm_length", "act_embed")
_HIDDEN = ("batch", "length", "act_mlp")
_LOGITS = ("vocab_batch", "length", "act_vocab")


class FeedForward(nn.Module):
    """The gated feed-forward layer SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) * up(x))`.

    `(batch, length, embed)` gives the same shape.

    >>> x, key = jnp.ones((1, 2, 128)), jax.random.key(0)
    >>> y, _ = jax.eval_shape(FeedForward(DecoderConfig()).init_with_output, key, x)
    >>> y.shape, y.dtype
    ((1, 2, 128), dtype(bfloat16))
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config

        def dense(name: str, features: int, axes: tuple[str, str], out: Any) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=False,
                dtype=jnp.dtype(cfg.dtype),
                param_dtype=jnp.dtype(cfg.param_dtype),
                kernel_axes=default_names(*axes),
                out_axes=out,
                name=name,
            )

        gate = dense("gate", cfg.mlp_dim, ("embed", "mlp"), _strict(_HIDDEN))(x)
        up = dense("up", cfg.mlp_dim, ("embed", "mlp"), _strict(_HIDDEN))(x)
        down = dense("down", cfg.embed_dim, ("mlp", "embed"), _strict(_RESIDUAL))
        return down(nn.silu(gate) * up)


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    A body for `scan`: takes and returns the residual stream `(batch, length, embed)` and has no
    other output.

    >>> x, key = jnp.ones((1, 2, 128)), jax.random.key(0)
    >>> (y, _), _ = jax.eval_shape(DecoderBlock(DecoderConfig()).init_with_output, key, x)
    >>> y.shape
    (1, 2, 128)
    """

    config: DecoderConfig
    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        cfg = self.config
        attention = nn.GroupedQueryAttention(
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            rope_theta=cfg.rope_theta,
            dtype=jnp.dtype(cfg.dtype),
            param_dtype=jnp.dtype(cfg.param_dtype),
            decode=self.decode,
            cache_length=cfg.max_length if self.decode else None,
            out_axes=_strict(_RESIDUAL),
            name="attention",
        )
        x = x + attention(_norm(cfg, "attention_norm")(x))
        x = x + FeedForward(cfg, name="mlp")(_norm(cfg, "mlp_norm")(x))
        return constrain(x, _strict(_RESIDUAL)), None


class Decoder(nn.Module):
    """Scores for the next token: ids `(batch, length)` give logits `(batch, length, vocab)`.

    Logits are float32.  With `decode`, keys and values of earlier tokens are kept in the
    collection `cache` (`mutable=["cache"]`), and each call continues after them.

    >>> model, tokens = Decoder(DecoderConfig(num_layers=2)), jnp.ones((1, 8), jnp.int32)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    >>> jax.eval_shape(model.apply, variables, tokens).shape
    (1, 8, 256)
    >>> variables["params"]["layers"]["mlp"]["up"]["kernel"].shape
    (2, 128, 384)
    """

    config: DecoderConfig
    decode: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg = self.config
        dtype, param_dtype = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
        embed = nn.Embed(
            cfg.vocab_size,
            cfg.embed_dim,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nn.initializers.normal(1.0 if not cfg.tie_embeddings else 0.02),
            lookup="one_hot" if cfg.vocab_size <= 1024 else "gather",
            out_axes=_strict(_RESIDUAL),
            attend_axes=_strict(_LOGITS),
            name="embed",
        )
        x = self._layers(embed(tokens))
        x = _norm(cfg, "final_norm")(x)
        if cfg.tie_embeddings:
            return embed.attend(x).astype(jnp.float32)
        head = nn.Dense(
            cfg.vocab_size,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_axes=default_names("vocab_embed", "vocab"),
            out_axes=_strict(_LOGITS),
            name="head",
        )
        return head(x).astype(jnp.float32)

    def _layers(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        block: Any = DecoderBlock
        if cfg.remat is not None:
            # Inside of a scan nothing can merge the recomputation with the forward pass.
            block = nn.remat(block, policy=cfg.remat, prevent_cse=not cfg.scan_layers)
        if not cfg.scan_layers:
            for i in range(cfg.num_layers):
                x, _ = block(cfg, self.decode, name=f"layers_{i}")(x)
            return x
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            length=cfg.num_layers,
            metadata_params={PARTITION_NAME: "layers"},
        )
        x, _ = stack(cfg, self.decode, name="layers")(x, None)
        return x


def _norm(cfg: DecoderConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=cfg.norm_epsilon,
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        out_axes=_strict(_RESIDUAL),
        name=name,
    )


def _strict(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """`names` of an output, to be held to under strict rules; None elsewhere."""
    return names if isinstance(get_logical_axis_rules(), AxisRules) else None
