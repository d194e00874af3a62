"""The computation of grouped-query attention: fused where a kernel fits, and the formula itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.nn import flash
from shardflax.nn._cache import over_keys
from shardflax.nn.errors import AttentionOptionsError, DropoutRateError, MaskShapeError
from shardflax.nn.types import INTEGERS, Array, Names, Precision
from shardflax.partitioning.alike import repeated_like

IMPLEMENTATIONS = ("xla", "cudnn", "flash", "reference")
Window = tuple[int | None, int | None]


def check_mask(place: str, mask: Any, query: Array, key: Array) -> None:
    """Raises unless `mask` is None or broadcasts to `(batch, heads, queries, keys)`."""
    if mask is None:
        return
    target = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    shape = jnp.shape(mask)
    pairs = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(a not in (1, b) for a, b in pairs):
        raise MaskShapeError(place, "mask", shape, target)


def both(mask: Any, seen: Array, ndim: int) -> Array:
    """What `mask` (or None) and `seen` `(queries, keys)` both let be seen, with `ndim` dims."""
    seen = _lift(seen, ndim)
    return seen if mask is None else jnp.logical_and(_lift(mask, ndim), seen)


def _lift(mask: Any, ndim: int) -> Array:
    """`mask` with dims of size 1 in front, up to `ndim`."""
    mask = jnp.asarray(mask, bool)
    return jnp.reshape(mask, (1,) * (ndim - mask.ndim) + mask.shape)


def as_window(place: str, window: Any) -> Window:
    """How many tokens to the left and to the right are seen; None for all."""
    if window is None:
        return None, None
    left, right = (window, window) if isinstance(window, INTEGERS) else window
    if left < 0 or right < 0:
        raise AttentionOptionsError(place, f"window={window}: numbers of tokens are 0 or more.")
    return int(left), int(right)


def near(window: Window, queries: Array, keys: Array) -> Array:
    """Which of `keys` (positions) the window of each of `queries` shows: `(queries, keys)`."""
    distance = keys[None, :] - queries[:, None]
    left, right = window
    seen = jnp.ones(distance.shape, bool)
    if left is not None:
        seen = jnp.logical_and(seen, distance >= -left)
    return seen if right is None else jnp.logical_and(seen, distance <= right)


@dataclass(frozen=True)
class Attention:
    """How query, key and value are put together; hashable, so that it can be a key."""

    place: str
    causal: bool = True
    window: Window = (None, None)
    softcap: float | None = None
    implementation: str | None = None
    precision: Precision = None
    dropout_rate: float = 0.0
    query_axes: Names | None = None

    def __post_init__(self) -> None:
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise AttentionOptionsError(
                self.place,
                f"implementation={self.implementation!r} does not exist; write one of "
                f"{', '.join(map(repr, IMPLEMENTATIONS))}, or None for what fits best.",
            )
        if not 0.0 <= self.dropout_rate <= 1.0:
            raise DropoutRateError(self.place, self.dropout_rate)

    def __call__(
        self, query: Array, key: Array, value: Array, mask: Any = None, dropout_rng: Any = None
    ) -> Array:
        """Attention of `query` `(..., queries, heads, depth)` to `(..., keys, kv_heads, depth)`.

        Scores and softmax in float32, the output in the dtype of `query`.
        """
        check_mask(self.place, mask, query, key)
        if mask is not None:
            mask = _lift(mask, query.ndim)
        how = self.choose(query, key, value, mask, dropout_rng)
        if how == "flash":
            return flash.flash_attention(
                query,
                key,
                value,
                causal=self.causal,
                window=self.window,
                softcap=self.softcap,
                query_axes=self.query_axes,
            )
        key, value = (repeated_like(x, query, -2) for x in (key, value))
        return over_keys(partial(self._without_kernel, how), query, key, value, mask, dropout_rng)

    def _without_kernel(
        self, how: Any, query: Array, key: Array, value: Array, mask: Any, dropout_rng: Any
    ) -> Array:
        if how == "reference":
            return self.reference(query, key, value, mask, dropout_rng)
        left, right = self.window
        window: Any = None
        if self.window != (None, None):
            window = left, 0 if self.causal else right
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=self.causal,
            local_window_size=window,
            implementation=how,
        )

    def of_slots(self) -> Attention:
        """The same for the slots of a cache, where a mask says who sees whom."""
        how = None if self.implementation == "flash" else self.implementation
        return replace(self, causal=False, window=(None, None), implementation=how)

    def choose(self, query: Array, key: Array, value: Array, mask: Any, rng: Any) -> str:
        """What computes it: as told, or the fastest that knows all of this."""
        no_kernel = self._why_no_kernel(mask, rng)
        if self.implementation is None:
            return self._best(query, key, value, no_kernel)
        # Dropout, precision and the cap of the scores: JAX's function knows none of them.
        formula = self._why_no_kernel(None, rng)
        if self.softcap is not None:
            formula = f"there is logit_softcap={self.softcap}"
        why = formula if self.implementation == "cudnn" else None
        if self.implementation == "flash":
            why = no_kernel or flash.why_not_flash(query, key, value, self.query_axes)
        if why is not None:
            raise AttentionOptionsError(
                self.place,
                f"implementation={self.implementation!r} cannot be used: {why}. Write None for "
                "what fits.",
            )
        return self.implementation if self.implementation == "flash" or not formula else "reference"

    def _why_no_kernel(self, mask: Any, rng: Any) -> str | None:
        """What a fused kernel does not know."""
        if mask is not None:
            return "there is a mask (or a cache)"
        if rng is not None:
            return "there is dropout"
        return None if self.precision is None else f"precision={self.precision}"

    def _best(self, query: Array, key: Array, value: Array, no_kernel: str | None) -> str:
        if self.precision is not None or (no_kernel and "dropout" in no_kernel):
            return "reference"
        device = flash.target_device()
        if device.platform == "cpu" and query.dtype == jnp.float16:
            return "reference"  # JAX's has no float16 product with float32 sums there
        if no_kernel is None:
            fits = flash.why_not_flash(query, key, value) is None
            if device.platform == "tpu" and fits and flash.spreads(query, self.query_axes):
                return "flash"
            if device.platform == "gpu" and self.softcap is None and _cudnn_knows(device, query):
                return "cudnn"
        return "xla" if self.softcap is None else "reference"

    def reference(
        self, query: Array, key: Array, value: Array, mask: Any = None, dropout_rng: Any = None
    ) -> Array:
        """The formula: softmax(query @ key / sqrt(depth)) @ value, for each group of heads."""
        heads, kv_heads = query.shape[-2], key.shape[-2]
        group = heads // kv_heads
        groups = jnp.reshape(query, (*query.shape[:-2], kv_heads, group, query.shape[-1]))
        wide = jnp.promote_types(query.dtype, jnp.float32)
        precision = self.precision
        scores = jnp.einsum(
            "...qkgd,...skd->...kgqs", groups, key, precision=precision, preferred_element_type=wide
        )
        scores = scores * jnp.asarray(query.shape[-1] ** -0.5, wide)
        if self.softcap is not None:
            cap = jnp.asarray(self.softcap, wide)
            scores = cap * jnp.tanh(scores / cap)
        seen = self._visible(scores, mask, heads)
        if seen is not None:
            scores = jnp.where(seen, scores, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores, axis=-1)
        if dropout_rng is not None:
            keep = 1.0 - self.dropout_rate
            kept = jax.random.bernoulli(dropout_rng, keep, weights.shape)
            # With a rate of 1 nothing is kept, and a division by 0 would make gradients NaN.
            weights = jnp.where(kept, weights / (keep or 1.0), 0.0)
        weights = weights.astype(value.dtype)
        y = jnp.einsum("...kgqs,...skd->...qkgd", weights, value, precision=precision)
        return jnp.reshape(y, (*query.shape[:-1], value.shape[-1])).astype(query.dtype)

    def _visible(self, scores: Array, mask: Any, heads: int) -> Any:
        """What is seen, shaped to broadcast to `(..., kv_heads, group, queries, keys)`."""
        seen = None
        if mask is not None:
            # (..., heads or 1, queries, keys): the heads split as those of the scores do.
            split = scores.shape[-4:-2] if mask.shape[-3] == heads else (1, 1)
            seen = jnp.reshape(mask, (*mask.shape[:-3], *split, *mask.shape[-2:]))
        left, right = self.window
        window = left, 0 if self.causal else right
        if window != (None, None):
            queries, keys = (jnp.arange(n, dtype=jnp.int32) for n in scores.shape[-2:])
            inside = _lift(near(window, queries, keys), scores.ndim)
            seen = inside if seen is None else jnp.logical_and(seen, inside)
        return seen


def _cudnn_knows(device: Any, query: Array) -> bool:
    """What cuDNN's fused attention is for: half precision, on a GPU from Ampere on."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    depth = query.shape[-1]
    # A number as text, "8.0" say; AMD's devices have names there.
    version = str(getattr(device, "compute_capability", "")).partition(".")[0]
    recent = version.isdigit() and int(version) >= 8
    return half and recent and depth % 8 == 0 and depth <= 128
