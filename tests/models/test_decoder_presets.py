"""The decoder under presets: its layout, and on explicit axes the types of its gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardflax.core.boxes import unbox
from shardflax.models import Decoder, DecoderConfig, generate
from shardflax.partitioning import (
    abstract_layout,
    batch_sharding,
    make_mesh,
    preset,
    use,
)
from shardflax.partitioning.spec_check import canonical_spec
from shardflax.training import cross_entropy
from tests.core.harness import quick_key

TINY = DecoderConfig(
    vocab_size=16, num_layers=2, embed_dim=16, mlp_dim=32, head_dim=4, dtype="float32", remat=None
)
TOKENS = jax.ShapeDtypeStruct((8, 8), jnp.int32)
# What a dense decoder sees of the other presets is in these, or in tests/multidevice.
MESHES = {
    "fsdp2d": "data=2,fsdp=2,fsdp2=2",
    "tp_embed": "data=4,tensor=2",
    "cp": "data=4,context=2",
    "ep": "data=2,expert=4",
    "ep_as_cp": "data=4,expert=2",
    "pp": "data=4,stage=2",
    "decode": "data=2,fsdp=2,tensor=2",
    "fsdp + cp + tp_sp": "fsdp=2,context=2,tensor=2",
}


def init(key: jax.Array) -> Any:
    return Decoder(TINY).init(key, jnp.ones((1, 8), jnp.int32))["params"]


def step(params: Any, tokens: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        return cross_entropy(Decoder(TINY).apply({"params": params}, tokens), tokens)[0]

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("name", MESHES)
def test_gradients_are_typed_as_the_parameters(name: str) -> None:
    rules = preset(name)
    mesh = make_mesh(MESHES[name], axis_types="explicit")
    layout = abstract_layout(init, jax.random.key(0), mesh=mesh, rules=rules)
    layout.check()
    rows = batch_sharding(mesh, rules, shape=TOKENS.shape)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype, sharding=rows)
    with use(mesh, rules):
        _, grads = jax.eval_shape(step, layout.abstract, tokens)
    for leaf, grad in zip(layout.leaves, jax.tree.leaves(grads), strict=True):
        assert canonical_spec(grad.sharding.spec, dict(mesh.shape)) == leaf.spec, leaf.where


@pytest.mark.parametrize(("types", "tokens"), [("auto", 3), ("explicit", 4)])
def test_a_sample_of_any_size(types: str, tokens: int) -> None:
    """Training lays lengths over `context` and logits over `stage`: one token fits neither."""
    mesh, rules = make_mesh("data=2,stage=2,context=2", axis_types=types), preset("cp + pp")
    config = dataclasses.replace(TINY, num_layers=1, max_length=8)

    def written(params: Any) -> jax.Array:
        prompt = jnp.ones((2, tokens), jnp.int32)
        return generate(config, params, prompt, 3, quick_key(1), temperature=0.0)

    def make(key: jax.Array) -> Any:
        return Decoder(config).init(key, jnp.ones((2, 8), jnp.int32))["params"]

    params = jax.device_get(jax.jit(lambda key: unbox(make(key)))(quick_key(0)))
    layout = abstract_layout(make, quick_key(0), mesh=mesh, rules=rules)
    with use(mesh, rules):
        found = written(jax.device_put(params, layout.shardings))
    assert (found == written(params)).all()


def test_lengths_over_explicit_axes() -> None:
    """`decode` leaves keys where they are, and the softmax sums over them."""
    mesh, rules = make_mesh("data=2,context=2,tensor=2", axis_types="explicit"), preset("decode")
    layout = abstract_layout(init, quick_key(0), mesh=mesh, rules=rules)
    rows = batch_sharding(mesh, rules, ("batch", "length"), TOKENS.shape)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype, sharding=rows)
    with use(mesh, rules):
        _, grads = jax.eval_shape(step, layout.abstract, tokens)
    assert rows.spec == jax.P("data", "context")
    assert grads["layers"]["mlp"]["up"]["kernel"].sharding.spec[2] == "tensor"
