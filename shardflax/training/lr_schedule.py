"""Learning rate schedules counted in epochs, as Flax has them; optax has many more.

All warm up as in Goyal et al. 2017 (https://arxiv.org/abs/1706.02677): the rate grows linearly from
0 over the first `warmup_length` epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

__all__ = [
    "create_constant_learning_rate_schedule",
    "create_cosine_learning_rate_schedule",
    "create_stepped_learning_rate_schedule",
]

Schedule = Callable[[Any], Any]


def _warmed_up(rate: Schedule, steps_per_epoch: int, warmup_length: float) -> Schedule:
    """`rate` of an epoch as a function of a step, after a warmup."""

    def schedule(step: Any) -> Any:
        epoch = step / steps_per_epoch
        if warmup_length > 0:
            return rate(epoch) * jnp.minimum(1.0, epoch / warmup_length)
        return rate(epoch)

    return schedule


def create_constant_learning_rate_schedule(
    base_learning_rate: float, steps_per_epoch: int, warmup_length: float = 0.0
) -> Schedule:
    """A constant rate, as a function of the step.

    >>> schedule = create_constant_learning_rate_schedule(0.5, 10, warmup_length=1.0)
    >>> float(schedule(5)), float(schedule(20))
    (0.25, 0.5)
    """
    return _warmed_up(lambda epoch: base_learning_rate, steps_per_epoch, warmup_length)


def create_stepped_learning_rate_schedule(
    base_learning_rate: float,
    steps_per_epoch: int,
    lr_sched_steps: Sequence[Sequence[float]],
    warmup_length: float = 0.0,
) -> Schedule:
    """A rate that changes after given epochs, as a function of the step.

    `lr_sched_steps` holds pairs of an epoch and the factor of the base rate from then on.

    >>> schedule = create_stepped_learning_rate_schedule(1.0, 10, [[2, 0.5], [4, 0.25]])
    >>> [float(schedule(step)) for step in (10, 30, 50)]
    [1.0, 0.5, 0.25]
    """
    epochs = jnp.asarray([epoch for epoch, _ in lr_sched_steps])
    rates = jnp.asarray([1.0, *(factor for _, factor in lr_sched_steps)]) * base_learning_rate

    def rate(epoch: Any) -> Any:
        return rates[jnp.sum(epochs < epoch)]

    return _warmed_up(rate, steps_per_epoch, warmup_length)


def create_cosine_learning_rate_schedule(
    base_learning_rate: float,
    steps_per_epoch: int,
    halfcos_epochs: float,
    warmup_length: float = 0.0,
) -> Schedule:
    """A rate that falls to 0 along half a cosine of `halfcos_epochs` epochs.

    >>> schedule = create_cosine_learning_rate_schedule(1.0, 10, 4)
    >>> [round(float(schedule(step)), 3) for step in (0, 20, 40)]
    [1.0, 0.5, 0.0]
    """

    def rate(epoch: Any) -> Any:
        return base_learning_rate * (jnp.cos(jnp.pi * epoch / halfcos_epochs) + 1) / 2

    return _warmed_up(rate, steps_per_epoch, warmup_length)
