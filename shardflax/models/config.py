"""The options of a decoder, and named sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from shardflax.core.errors import did_you_mean
from shardflax.core.remat import remat_policy
from shardflax.models.errors import ModelConfigError, UnknownModelError

__all__ = ["DECODERS", "DecoderConfig", "decoder_config"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The options of a Llama-style decoder: hashable, and checked when made.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of blocks.
        embed_dim: width of the residual stream.
        mlp_dim: width of the gated feed-forward layer.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads, a divisor of `num_heads`.
        head_dim: features of a head, even.
        max_length: length of the key/value cache when decoding, in tokens.
        rope_theta: base of the rotary position embedding.
        norm_epsilon: added to the mean square in `RMSNorm`.
        tie_embeddings: use the embedding table as output projection.
        scan_layers: run the blocks as one `scan`, their parameters stacked.
        remat: name of a policy in `jax.checkpoint_policies`, or None to keep all activations.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Raises `ModelConfigError` for options that do not fit together, `RematPolicyError` for a policy
    that JAX does not have.

    >>> DecoderConfig(num_heads=8, num_kv_heads=2).query_groups
    4
    """

    vocab_size: int = 256
    num_layers: int = 4
    embed_dim: int = 128
    mlp_dim: int = 384
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    max_length: int = 1024
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    scan_layers: bool = True
    remat: str | None = "dots_with_no_batch_dims_saveable"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (isinstance(value, int | np.integer) and value >= 1):
                self._refuse(f"{field.name}={value!r} is no positive number", "Give one from 1")
        for name in ("rope_theta", "norm_epsilon"):
            if not getattr(self, name) > 0:
                self._refuse(f"{name}={getattr(self, name)} is not positive", "Give one above 0")
        if self.num_heads % self.num_kv_heads:
            self._refuse(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}",
                "Query heads share key/value heads in equal groups",
            )
        if self.head_dim % 2:
            self._refuse(f"head_dim={self.head_dim} is odd", "Rotary positions turn pairs")
        for name in ("dtype", "param_dtype"):
            self._check_dtype(name, getattr(self, name))
        remat_policy(self.remat)

    def _refuse(self, problem: str, cure: str) -> None:
        raise ModelConfigError(type(self).__name__, problem, cure + ".")

    def _check_dtype(self, name: str, value: str) -> None:
        try:
            floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except TypeError:
            floating = False
        if not floating:
            self._refuse(f"{name}={value!r} is no floating dtype", "Such as 'bfloat16', 'float32'")

    @property
    def query_groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


def _llama(layers: int, embed: int, mlp: int, heads: int, kv_heads: int, **more: Any) -> Any:
    return DecoderConfig(
        num_layers=layers,
        embed_dim=embed,
        mlp_dim=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=more.pop("head_dim", embed // heads),
        **more,
    )


_LLAMA3: dict[str, Any] = {"vocab_size": 128_256, "max_length": 8192, "rope_theta": 500_000.0}

DECODERS: dict[str, DecoderConfig] = {
    # For CPUs and tests: wide rather than deep, which needs fewer collectives.
    "tiny": _llama(2, 64, 192, 4, 2, remat=None),
    "small": _llama(2, 192, 576, 6, 2, remat=None),
    "base": _llama(12, 768, 2048, 12, 4),
    # The shapes of Llama 3 (arXiv:2407.21783, table 3; the smallest from its 3.2 release).
    "llama3-1b": _llama(16, 2048, 8192, 32, 8, tie_embeddings=True, **_LLAMA3),
    "llama3-8b": _llama(32, 4096, 14_336, 32, 8, **_LLAMA3),
    "llama3-70b": _llama(80, 8192, 28_672, 64, 8, **_LLAMA3),
}


def decoder_config(name: str, **updates: Any) -> DecoderConfig:
    """The options of a named size, some of them replaced.

    Raises `UnknownModelError` (did-you-mean) for a name, `ModelConfigError` for an option, that
    does not exist.

    >>> decoder_config("llama3-8b", num_layers=2).embed_dim
    4096
    """
    if name not in DECODERS:
        raise UnknownModelError(f"no decoder {name!r}: {did_you_mean(name, DECODERS)}")
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    for option in updates:
        if option not in known:
            problem = f"there is no option {option!r}"
            raise ModelConfigError("DecoderConfig", problem, did_you_mean(option, known))
    return dataclasses.replace(DECODERS[name], **updates)
