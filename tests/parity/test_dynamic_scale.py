"""Loss scaling beside Flax's, step by step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training import dynamic_scale as theirs

from shardflax.training import dynamic_scale as ours


def _square(params: Any) -> Any:
    return (jnp.asarray(params["w"], jnp.float16) ** 2).sum()


def _steps(scaling: Any) -> list[Any]:
    """Gradients that are finite twice in a row, that overflow, and that grow the factor again."""
    scale, found = scaling.DynamicScale(growth_interval=2, scale=4.0), []
    for x in (1.0, 2.0, jnp.inf, 3.0, 4.0, 5.0, jnp.nan):
        found.append(scale.value_and_grad(_square)({"w": jnp.full(2, x)}))
        scale = found[-1].dynamic_scale
    return found


def _ends(scaling: Any) -> list[Any]:
    """The largest and the smallest factor."""
    made = scaling.DynamicScale
    return [
        made(scale=3e38, growth_interval=0).value_and_grad(lambda x: x * 1e-20)(1.0),
        made(scale=1.2e-38).value_and_grad(lambda x: x / 0)(1.0),
        made(scale=1e-38, minimum_scale=None).value_and_grad(lambda x: x / 0)(1.0),
        made(scale=9.0, minimum_scale=8.0).value_and_grad(lambda x: x / 0)(1.0),
    ]


def _arguments(scaling: Any) -> Any:
    def loss(x: Any, y: Any) -> Any:
        return (x * y).sum(), {"x": x}

    scale = scaling.DynamicScale(scale=16.0)
    pair = jnp.ones(2), jnp.ones(2, jnp.float16)
    return jax.jit(lambda s: s.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*pair))(scale)


def _replicas(scaling: Any) -> Any:
    def one(x: Any) -> Any:
        return scaling.DynamicScale().value_and_grad(lambda x: x * x, axis_name="batch")(x)

    return [jax.vmap(one, axis_name="batch")(jnp.array([1.0, last])) for last in (4.0, jnp.inf)]


def test_factors_losses_and_gradients_are_those_of_flax() -> None:
    for case in (_steps, _ends, _arguments, _replicas):
        found, wanted = (jax.tree.leaves_with_path(case(scaling)) for scaling in (ours, theirs))
        for (path, x), (other, y) in zip(found, wanted, strict=True):
            assert path == other and (x.dtype, x.weak_type) == (y.dtype, y.weak_type), path
            np.testing.assert_array_equal(x, y, str(path))
