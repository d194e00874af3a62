"""Weights laid out for their use, inside of what a program rematerialises itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.partitioning import make_mesh, preset, use


class Net(nn.Module):
    policy: str | None = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        dense = nn.remat(nn.Dense, policy=self.policy)
        x = nn.tanh(dense(16, use_bias=False, kernel_axes=("embed", "mlp"), name="up")(x))
        return dense(8, use_bias=False, kernel_axes=("mlp", "embed"), name="down")(x)


@pytest.mark.parametrize(
    "policy",
    [None, "everything_saveable", "dots_saveable", "save_anything_except_these_names(x)"],
)
def test_every_policy_goes_around_it(policy: str | None) -> None:
    """JAX trips over what is rematerialised in parts, inside of what saves everything."""
    x = jnp.ones((8, 8))
    params = {"up": {"kernel": jnp.ones((8, 16))}, "down": {"kernel": jnp.ones((16, 8))}}

    def loss(params: Any) -> Any:
        return Net(policy).apply({"params": params}, x).sum()

    with use(make_mesh("fsdp=8"), preset("fsdp")):
        traced = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert traced.count("sharding_constraint") >= 6
