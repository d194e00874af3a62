"""ZeRO-1: the optimizer's state is spread over the axis of the batch, parameters are not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardflax.nn as nn
from shardflax.partitioning import (
    batch_sharding,
    collectives,
    init_sharded,
    make_mesh,
    preset,
    use,
)
from shardflax.training import TrainState
from tests.core.harness import quick_key


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(8, name="last")(nn.tanh(nn.Dense(64, name="first")(x)))


def run(name: str, spec: str, types: Any) -> tuple[Any, Any, Any]:
    mesh, rules = make_mesh(spec, axis_types=types), preset(name)
    model, x = Model(), jnp.linspace(-1, 1, 16 * 8).reshape(16, 8)

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, x)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))

    state, layout = init_sharded(init, quick_key(0), mesh=mesh, rules=rules)

    def step(state: TrainState, x: jax.Array) -> TrainState:
        grads = jax.grad(lambda p: jnp.mean((model.apply({"params": p}, x) - x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    with use(mesh, rules):
        placed = jax.device_put(x, batch_sharding(mesh, rules, ("batch", "act_embed")))
        compiled = jax.jit(step, out_shardings=layout.shardings).lower(state, placed).compile()
        for _ in range(2):
            state = compiled(state, placed)
    return state, layout, compiled


def held(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ("data=8", "auto"),
        ("data=4,tensor=2", "auto"),
        ("data=2,fsdp=2,tensor=2", "auto"),
        ("data=2,fsdp=2,tensor=2", "explicit"),
    ],
)
def test_memory_falls_and_numbers_stay(spec: str, types: str) -> None:
    (plain, _, before), (state, layout, after) = run("dp", spec, types), run("zero1", spec, types)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), state.params, plain.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-8), state.opt_state, plain.opt_state
    )
    # Parameters lie whole on each device, moments of kernels a part of it.
    assert held(state.params) == held(plain.params) == sum(4 * n for n in (8 * 64, 64, 64 * 8, 8))
    whole, spread = held(plain.opt_state), held(state.opt_state)
    kernels, parts = 2 * 4 * (8 * 64 + 64 * 8), layout.mesh.shape["data"]
    assert whole - spread == kernels * (parts - 1) // parts
    assert held(state) == layout.bytes_per_device
    assert state.opt_state[0].mu["first"]["kernel"].sharding.spec == jax.P("data")
    memory = before.memory_analysis(), after.memory_analysis()
    assert memory[0].argument_size_in_bytes - memory[1].argument_size_in_bytes == whole - spread

    # Gradients are summed (a TPU scatters the sum; the CPU has no reduce-scatter, and takes a
    # slice), and updates gathered, or the parameters that they make.  On auto axes, where one
    # idles, XLA cuts a gradient along that one too, sums half as much, and passes parts on: as many
    # bytes in all.  Constraints to the layout of the moments do not change its mind.
    sent = [collectives(one) for one in (before, after)]
    assert {c.what for c in sent[0]} == {"all-reduce over data"}
    assert {c.what for c in sent[1] if c.kind == "all-gather"} == {"all-gather over data"}
    gathered, summed = (
        [sum(c.total for c in found if (c.kind == "all-gather") == gathers) for found in sent]
        for gathers in (True, False)
    )
    assert gathered == [0, kernels // 2]
    assert summed[1] <= summed[0] + 4
    idle = types == "auto" and "fsdp" in spec
    others = {c.what for c in sent[1] if c.kind not in ("all-gather", "all-reduce")}
    assert others <= (
        {"collective-permute over data,fsdp"} if idle else {"reduce-scatter over data"}
    )
