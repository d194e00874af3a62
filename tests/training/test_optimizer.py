"""Optimizer configs: schedules, masks, and updates equal to optax written by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardflax.training.errors import OptimizerConfigError
from shardflax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

PARAMS = {
    "layers": {"mlp": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))}},
    "norm": {"scale": jnp.ones((2, 4))},
    "embedding": jnp.ones((5, 4)),
    "gain": jnp.ones(4),
}
DECAYED = {
    "layers": {"mlp": {"kernel": True, "bias": False}},
    "norm": {"scale": False},
    "embedding": True,
    "gain": False,
}


def run(tx: Any, steps: int = 3) -> Any:
    """Parameters after a few updates."""

    @jax.jit
    def updated() -> Any:
        def update(i: Any, carry: Any) -> Any:
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.sin(p + i) * 5, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, update, (PARAMS, tx.init(PARAMS)))[0]

    return jax.device_get(updated())


def test_adamw_with_clipping_and_a_mask_is_optax() -> None:
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, total_steps=10, weight_decay=0.3, b2=0.9, clip_norm=0.5
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10, end_value=0.01)
    want = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(rate, b1=0.9, b2=0.9, weight_decay=0.3, mask=DECAYED),
    )
    for a, b in zip(*map(jax.tree.leaves, (run(make_optimizer(config)), run(want))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_only_matrices_decay(name: str) -> None:
    def decayed_part(decay: float) -> Any:
        config = OptimizerConfig(
            name=name, learning_rate=0.1, warmup_steps=0, weight_decay=decay, clip_norm=None
        )
        return run(make_optimizer(config), steps=1)

    moved = jax.tree.map(lambda a, b: bool((a != b).any()), decayed_part(0.0), decayed_part(0.5))
    assert moved == DECAYED


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedules(schedule: str, halfway: float, end: float) -> None:
    rate = make_schedule(
        OptimizerConfig(schedule=schedule, learning_rate=1.0, warmup_steps=10, total_steps=110)
    )
    got = [np.asarray(rate(step)) for step in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(got, [0, 0.5, 1, halfway, end, end], atol=1e-6)


def test_no_warmup_starts_at_the_peak() -> None:
    assert make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=0))(0) == 0.5


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("name", "adam", "did you mean 'adamw'"),
        ("schedule", "cosin", "did you mean 'cosine'"),
        ("b2", 1.0, r"\[0, 1\)"),
        ("learning_rate", -1.0, "not negative"),
        ("eps", -1e-8, "not negative"),
        ("no_decay", "bias", "a tuple of names"),
        ("clip_norm", 0.0, "None"),
        ("warmup_steps", -1, "not negative"),
        ("total_steps", 100, "warmup_steps=100"),
    ],
)
def test_senseless_fields_are_refused(field: str, value: Any, hint: str) -> None:
    with pytest.raises(OptimizerConfigError, match=f"{field}=.*{hint}") as caught:
        OptimizerConfig(**{field: value})
    assert caught.value.field == field
