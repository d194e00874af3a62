"""Cross-entropy that works where the arrays lie: vocabulary and length sharded over axes or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from shardflax.partitioning.alike import laid_out_like
from shardflax.partitioning.explicit_out import laid_out_like as laid_out_as
from shardflax.training.errors import LossInputError

__all__ = ["cross_entropy", "next_tokens"]


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    weights: jax.Array | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean cross-entropy of the targets, and metrics.

    `logits` (..., vocab) of any float dtype; `targets` (...) of integers; `weights` (...) for each
    target, one by default.  All sums are in float32.  The vocab dim is only ever reduced, never
    indexed, so a vocabulary sharded over mesh axes is not gathered.

    `z_loss` times the mean of log(Z)^2 is added to the loss, where Z is the softmax normaliser: it
    keeps logits from drifting (PaLM, Chowdhery et al. 2022, section 5; 1e-4 there).

    Returns the loss, a float32 scalar, and float32 scalars `cross_entropy` (without the z term),
    `z_loss`, `accuracy` (ties count as right) and `weight` (the sum of the weights, by which the
    means are taken; if it is 0, so are they).  A target outside of the vocabulary makes the loss
    NaN, unless its weight is 0.

    Raises LossInputError for shapes or dtypes that do not belong together.

    >>> loss, metrics = cross_entropy(jnp.zeros((2, 3, 8)), jnp.ones((2, 3), jnp.int32))
    >>> round(float(loss), 4), float(metrics["weight"])
    (2.0794, 6.0)
    """
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    weights = None if weights is None else jnp.asarray(weights)
    _check(logits, targets, weights)
    if targets.dtype.itemsize < 4:  # the ids of a vocabulary may not fit
        targets = targets.astype(jnp.int32)
    targets = laid_out_like(targets, logits)
    logits = logits.astype(jnp.float32)
    top = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    right = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    known = (targets >= 0) & (targets < logits.shape[-1])
    given = jnp.ones(targets.shape) if weights is None else weights
    counted: jax.Array = laid_out_like(given.astype(jnp.float32), logits)
    total = jnp.sum(counted)

    def mean(values: jax.Array) -> jax.Array:
        """The weighted mean; values without weight do not matter, even if they are NaN."""
        kept = jnp.where(counted == 0, 0.0, values * counted)
        return jnp.sum(kept) / jnp.where(total == 0, 1.0, total)

    metrics = {
        "cross_entropy": mean(jnp.where(known, log_z - right, jnp.nan)),
        "z_loss": z_loss * mean(jnp.square(log_z)),
        "accuracy": mean((right >= top) & known),
        "weight": total,
    }
    return metrics["cross_entropy"] + metrics["z_loss"], metrics


def next_tokens(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Targets for `tokens` `(..., length)`: at each place the token after it; and their weights.

    Nothing follows the last token: its target is 0, and so is its weight.  Weights are float32, 1
    elsewhere.  Both lie as the tokens do, also where their length is over mesh axes, explicit ones
    included: there `tokens[:, 1:]` would have a length that no axis divides, and devices exchange
    one token each.

    Raises LossInputError for an array without dims.

    >>> targets, weights = next_tokens(jnp.array([[5, 6, 7]]))
    >>> targets.tolist(), weights.tolist()
    ([[6, 7, 0]], [[1.0, 1.0, 0.0]])
    """
    if jnp.ndim(tokens) == 0:
        advice = "Give token ids, (batch, length) say."
        raise LossInputError("tokens", "at least 1", "no dims", advice, "next_tokens")
    tokens = jnp.asarray(tokens)
    return laid_out_as(tokens, _successors, tokens), laid_out_as(tokens, _followed, tokens)


def _followed(tokens: jax.Array) -> jax.Array:
    """1.0 for each token that another follows, 0.0 for the last."""
    places = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    return (places < tokens.shape[-1] - 1).astype(jnp.float32)


def _successors(tokens: jax.Array) -> jax.Array:
    """The token after each; 0 after the last."""
    return jnp.where(_followed(tokens) == 1, jnp.roll(tokens, -1, -1), 0)


def _check(logits: jax.Array, targets: jax.Array, weights: jax.Array | None) -> None:
    """Raises LossInputError for shapes or dtypes that broadcasting would let through."""
    shape = f"shape {logits.shape[:-1]} (the logits' without the vocab dim)"
    if targets.shape != logits.shape[:-1]:
        advice = "Give one integer for each position."
        raise LossInputError("targets", shape, f"shape {targets.shape}", advice)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        advice = "Give token ids, not one-hot vectors."
        raise LossInputError("targets", "an integer dtype", f"dtype {targets.dtype}", advice)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        advice = "Give the model's outputs before any softmax."
        raise LossInputError("logits", "a float dtype", f"dtype {logits.dtype}", advice)
    if weights is not None and weights.shape != targets.shape:
        advice = "Give one weight for each target."
        raise LossInputError("weights", shape, f"shape {weights.shape}", advice)
