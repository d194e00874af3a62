"""Sampling from a decoder, with a key/value cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardflax.core.staging import jx
from shardflax.models.config import DecoderConfig
from shardflax.models.decoder import Decoder
from shardflax.models.errors import ModelConfigError, SampleError
from shardflax.partitioning import AxisRules, get_logical_axis_rules, logical_axis_rules
from shardflax.partitioning.explicit_out import InAuto, operand, out_spec

__all__ = ["generate"]

_ROWS_AND_LENGTHS = (
    "batch",
    "vocab_batch",
    "cache_batch",
    "length",
    "norm_length",
    "kv_length",
    "cache_length",
)


def generate(
    config: DecoderConfig,
    params: Any,
    prompt: jax.Array,
    length: int,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Samples `length` tokens after each row of `prompt`.

    `prompt` `(batch, tokens)` gives `(batch, length)`, int32.  Each row is sampled from the
    distribution at `temperature` (0: the most probable token), cut to the `top_k` most probable
    tokens.  The prompt is read in one step.  Under strict rules rows and lengths lie over those of
    their axes that divide them: a step has one token, and a prompt any number.  Raises
    `ModelConfigError` if prompt and sample are longer than `config.max_length`, `SampleError` for
    a prompt without tokens, or with ids that the model has none for (where they are known), a
    `length` below 1, and a temperature or `top_k` that make no sense.

    >>> config = DecoderConfig(num_layers=1, max_length=8)
    >>> prompt = jnp.ones((2, 3), jnp.int32)
    >>> key = jax.random.key(0)
    >>> params = jax.jit(Decoder(config).init)(key, prompt)["params"]
    >>> generate(config, params, prompt, 4, key).shape
    (2, 4)
    """
    prompt = jnp.asarray(prompt)
    _check(config, prompt, length, temperature, top_k)
    total = prompt.shape[1] + length
    if total > config.max_length:
        problem = f"max_length={config.max_length} tokens, for {prompt.shape[1]} + {length}"
        raise ModelConfigError("DecoderConfig", problem, "Sample fewer, or use a longer cache.")
    rules = get_logical_axis_rules()
    if not isinstance(rules, AxisRules):
        return _generate(config, params, prompt, length, key, temperature, top_k)
    with logical_axis_rules(_of_any_size(rules)):
        return _generate(config, params, prompt, length, key, temperature, top_k)


def _check(config: DecoderConfig, prompt: Any, length: int, temperature: Any, top_k: Any) -> None:
    """Raises for arguments that nothing can be sampled with."""
    if jnp.ndim(prompt) != 2 or not prompt.shape[1]:
        raise SampleError(f"a prompt of shape {jnp.shape(prompt)}", "(batch, tokens), tokens > 0")
    if _is_known(prompt) and prompt.size:
        least, most = int(prompt.min()), int(prompt.max())
        if least < 0 or most >= config.vocab_size:  # their embedding is NaN
            found = f"a prompt with the id {least if least < 0 else most}"
            raise SampleError(found, f"ids from 0 to {config.vocab_size - 1}")
    if not _is_count(length):
        raise SampleError(f"length={length}", "a number from 1")
    if isinstance(temperature, int | float) and not temperature >= 0:
        raise SampleError(f"temperature={temperature}", "0, or a number above it")
    if top_k is not None and not (_is_count(top_k) and top_k <= config.vocab_size):
        expected = f"None, or a number from 1 to {config.vocab_size} (vocab_size)"
        raise SampleError(f"top_k={top_k}", expected)


def _is_known(x: jax.Array) -> bool:
    """True for integers that this process can look at."""
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    return whole and not isinstance(x, jx.core.Tracer) and x.is_fully_addressable


def _is_count(x: Any) -> bool:
    return isinstance(x, int | np.integer) and bool(x >= 1)


def _of_any_size(rules: AxisRules) -> AxisRules:
    """The rules with the axes of rows and lengths free to yield."""
    found = {name: rules.compute.get(name) for name in _ROWS_AND_LENGTHS}
    return rules | {
        n: [f"{axis.rstrip('?')}?" for axis in axes] for n, axes in found.items() if axes
    }


@functools.partial(jax.jit, static_argnums=(0, 3, 6))
def _generate(
    config: DecoderConfig,
    params: Any,
    prompt: jax.Array,
    length: int,
    key: jax.Array,
    temperature: jax.Array | float,
    top_k: int | None,
) -> jax.Array:
    model = Decoder(config, decode=True)

    def step(cache: Any, tokens: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = model.apply({"params": params, **cache}, tokens, mutable=["cache"])
        return cache, _sample(_last(logits), key, temperature, top_k)

    def body(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        cache, token = carry
        cache, following = step(cache, token[:, None], key)
        return (cache, following), token

    keys = jax.random.split(key, length)
    cache, token = step({}, prompt, keys[0])  # the first step makes the cache
    (_, last), tokens = jax.lax.scan(body, (cache, token), keys[1:])
    return jnp.concatenate([tokens.T, last[:, None]], axis=1).astype(jnp.int32)


def _last(logits: jax.Array) -> jax.Array:
    """The scores after the last token; over an explicit axis, a length has no slice of one."""
    spec = out_spec("bv", [operand("blv", logits)])
    return logits[:, -1] if spec is None else InAuto(lambda x: x[:, -1], spec)(logits)


def _sample(logits: jax.Array, key: jax.Array, temperature: Any, top_k: int | None) -> jax.Array:
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    return jnp.where(temperature == 0, greedy, jax.random.categorical(key, scaled))
