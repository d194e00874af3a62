"""Arrays that meet on explicit axes, in a layer and in the loss, under rules that cut one more."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import shardflax.nn as nn
from shardflax.partitioning import (
    abstract_layout,
    batch_sharding,
    constrain,
    make_mesh,
    preset,
    use,
)
from shardflax.partitioning.alike import laid_out_like
from shardflax.training import cross_entropy

IDS = jnp.arange(32).reshape(8, 4) % 6
LOGITS = jnp.asarray(np.random.RandomState(0).randn(8, 4, 6), jnp.float32)


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_a_loss_whose_logits_lie_over_more_axes_than_its_targets(types: str) -> None:
    mesh, rules = make_mesh("data=2,stage=2,tensor=2", axis_types=types), preset("pp + tp_sp")
    names = ("vocab_batch", "length", "act_vocab")

    def loss(logits: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
        return cross_entropy(constrain(logits, names), ids, weights=weights, z_loss=1e-2)

    ids, weights = jax.device_put((IDS, jnp.ones(IDS.shape)), batch_sharding(mesh, rules))
    with use(mesh, rules):
        found, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(LOGITS, ids, weights)
    want = jax.jit(lambda: cross_entropy(LOGITS, IDS, z_loss=1e-2))()
    np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
    assert grads.shape == LOGITS.shape


def test_a_table_whose_rows_lie_over_more_axes_than_the_ids() -> None:
    mesh, rules = make_mesh("data=2,context=2,tensor=2", axis_types="explicit"), preset("default")
    embed = nn.Embed(6, 8, lookup="one_hot", out_axes=("batch", "norm_length", "act_embed"))
    variables = {"params": {"embedding": jnp.ones((6, 8))}}
    with use(mesh, rules):
        ids = jax.device_put(IDS, batch_sharding(mesh, rules))
        rows = jax.eval_shape(embed.apply, variables, ids)
    assert rows.sharding.spec == P("data", ("context", "tensor"), None)


def test_an_init_whose_weights_cut_one_dim_in_two_ways() -> None:
    """Two outputs of one width: `embed` over two axes in one kernel, over one in the other."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def down(name: str) -> nn.Dense:
                return nn.Dense(8, use_bias=False, kernel_axes=(name, "embed"), name=name)

            return down("heads")(x) + down("mlp")(x)

    mesh = make_mesh("fsdp=2,fsdp2=2,data=2", axis_types="explicit")
    layout = abstract_layout(
        lambda key: Twice().init(key, jnp.ones((1, 4))),
        jax.random.key(0),
        mesh=mesh,
        rules=preset("fsdp2d"),
    )
    layout.check()
    assert layout.leaf("params/heads/kernel").spec == P(None, ("fsdp", "fsdp2"))
    assert layout.leaf("params/mlp/kernel").spec == P("fsdp2", "fsdp")


def test_elsewhere_nothing_happens() -> None:
    x = jnp.ones(8)
    assert laid_out_like(x, LOGITS) is x
    with use(make_mesh("data=8"), preset("dp")):
        assert laid_out_like(x, constrain(LOGITS, ("batch", None, None))) is x
