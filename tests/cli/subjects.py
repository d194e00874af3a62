"""What the tests of the command line name by import path."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shardflax.nn as nn
from shardflax.partitioning import AxisRules, preset
from shardflax.programs import Program
from shardflax.training import TrainState

__all__ = ["MLP", "RULES", "broken", "made", "model_alone", "narrow", "pair", "program"]

RULES = AxisRules(preset("fsdp_tp"), title="own rules")
NUMBER = 3


class MLP(nn.Module):
    """Two layers."""

    width: int = 32

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(self.width, kernel_axes=("embed", "mlp"), use_bias=False, name="up")(x)
        h = nn.Dense(16, kernel_axes=("mlp", "embed"), use_bias=False, name="down")(nn.relu(h))
        return nn.with_logical_constraint(h, ("batch", "act_embed"))


def made() -> Any:
    """A state, made by a model."""
    return MLP().init(jax.random.key(0), jnp.ones((8, 16)))


def pair() -> Any:
    """A model, and its input."""
    return MLP(), jax.ShapeDtypeStruct((8, 16), jnp.float32)


def model_alone() -> Any:
    """A model without its input."""
    return MLP()


def broken() -> Any:
    """A function with a fault of its own."""
    raise RuntimeError("a fault of the user's")


def given(key: Any) -> Any:
    """An init, which wants a key."""
    return MLP().init(key, jnp.ones((8, 16)))


def forgot() -> Any:
    """A function that forgets to return its state."""
    made()


def text() -> Any:
    """A function that returns something else."""
    return {"a": "no array"}


def leaves() -> Any:
    """A function that ends the process, as one that parses options may."""
    sys.exit(0)


def _program(width: int) -> Program:
    model, tx = MLP(width), optax.sgd(0.1)

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, jnp.ones((8, 16)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def step(state: TrainState, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(
            lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)
        )(state.params)
        return state.apply_gradients(grads=grads), loss

    batch = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    return Program(init, step, batch, ("batch", None))


program = _program(32)
narrow = _program(16)
stateless = Program(program.init)
