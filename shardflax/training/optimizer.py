"""An optimizer and its learning-rate schedule from one frozen config, by optax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardflax.core.errors import did_you_mean
from shardflax.training.errors import OptimizerConfigError

__all__ = ["OptimizerConfig", "decay_mask", "make_optimizer", "make_schedule"]

NAMES = ("adamw", "lion", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and how its learning rate goes.

    The rate rises linearly from 0 to `learning_rate` over `warmup_steps`, then follows `schedule`
    ("cosine", "linear", "constant") down to `final_ratio` of it at `total_steps`.  `name` is
    "adamw", "lion" or "sgd" (with momentum `b1`).  Weight decay is decoupled, and spares leaves
    with fewer than two dims and leaves named in `no_decay` (a bias stacked over scanned layers has
    two dims).  `clip_norm` bounds the global norm of the gradient; None does not.

    Raises OptimizerConfigError for a field that makes no sense.

    >>> OptimizerConfig(learning_rate=1e-3, total_steps=500).schedule
    'cosine'
    >>> OptimizerConfig(name="adam")
    Traceback (most recent call last):
    shardflax.training.errors.OptimizerConfigError: ... did you mean 'adamw'?
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    total_steps: int = 1000
    schedule: str = "cosine"
    final_ratio: float = 0.1
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("bias", "scale")
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        """Checks every field."""
        for field, known in (("name", NAMES), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            if value not in known:
                hint = f"one of {', '.join(known)}; {did_you_mean(value, known)}"
                raise OptimizerConfigError(field, repr(value), hint)
        for field in ("b1", "b2"):
            self._expect(field, 0 <= getattr(self, field) < 1, "a number in [0, 1).")
        for field in ("learning_rate", "weight_decay", "final_ratio", "eps"):
            self._expect(field, 0 <= getattr(self, field) < math.inf, "finite, and not negative.")
        self._expect("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0, or None.")
        self._expect("warmup_steps", self.warmup_steps >= 0, "a number that is not negative.")
        self._expect("no_decay", isinstance(self.no_decay, tuple), "a tuple of names of leaves.")
        needed = f"more than warmup_steps={self.warmup_steps}."
        self._expect("total_steps", self.total_steps > self.warmup_steps, needed)

    def _expect(self, field: str, holds: bool, expected: str) -> None:
        """Raises unless `holds`."""
        if not holds:
            raise OptimizerConfigError(field, repr(getattr(self, field)), expected)


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate at each step.

    >>> rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, total_steps=110))
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    peak, steps = config.learning_rate, config.total_steps - config.warmup_steps
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, steps, alpha=config.final_ratio)
        case "linear":
            after = optax.linear_schedule(peak, peak * config.final_ratio, steps)
        case _:
            after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    before = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([before, after], [config.warmup_steps])


def decay_mask(params: Any, no_decay: tuple[str, ...] = ("bias", "scale")) -> Any:
    """True for the leaves that weight decay applies to.

    >>> decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones((12, 2)), "gain": jnp.ones(2)})
    {'bias': False, 'gain': False, 'kernel': True}
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return jnp.ndim(leaf) > 1 and name not in no_decay

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax transformation of a config: clip, then update at the scheduled rate.

    >>> tx = make_optimizer(OptimizerConfig())
    >>> state = tx.init({"kernel": jnp.ones((2, 2))})
    """
    rate = make_schedule(config)

    def mask(params: Any) -> Any:
        return decay_mask(params, config.no_decay)

    decay = config.weight_decay
    match config.name:
        case "adamw":
            update = optax.adamw(
                rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay, mask=mask
            )
        case "lion":
            update = optax.lion(rate, b1=config.b1, b2=config.b2, weight_decay=decay, mask=mask)
        case _:
            update = optax.chain(
                optax.trace(decay=config.b1),
                optax.add_decayed_weights(decay, mask),
                optax.scale_by_learning_rate(rate),
            )
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
