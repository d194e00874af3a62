"""Caches of keys and values lie by the rules of their names, and are read where they lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax.core.boxes import unbox
from shardflax.models import Decoder, DecoderConfig
from shardflax.partitioning import (
    abstract_layout,
    batch_sharding,
    collectives,
    make_mesh,
    preset,
    use,
)
from tests.core.harness import quick_key

P = jax.P
LAYERS = {
    "multi-head": nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16, decode=True),
    "grouped": nn.GroupedQueryAttention(num_heads=4, num_kv_heads=2, decode=True),
}
X = np.random.default_rng(0).normal(size=(4, 8, 16)).astype("float32")


def init_of(layer: Any) -> Any:
    """An init with a cache of eight slots."""
    return lambda key: layer.init(key, jnp.asarray(X))


@pytest.mark.parametrize("types", ["auto", "explicit"])
@pytest.mark.parametrize("kind", LAYERS)
def test_slots_over_an_axis_are_never_gathered(kind: str, types: str) -> None:
    """`decode` lays them over `context`: what is sent are sums, as long as one token."""
    layer = LAYERS[kind]
    mesh, rules = make_mesh("data=2,context=2,tensor=2", axis_types=types), preset("decode")
    layout = abstract_layout(init_of(layer), quick_key(0), mesh=mesh, rules=rules)
    slots = layout.leaf("cache/cached_key")
    assert (slots.spec, slots.rule_set) == (P("data", "context", "tensor"), "compute")

    def step(variables: Any, x: jax.Array) -> Any:
        y, new = layer.apply(variables, x, mutable=["cache"])  # pyright: ignore[reportGeneralTypeIssues]
        return y, {**variables, **new}

    made = jax.device_get(jax.jit(lambda key: unbox(init_of(layer)(key)))(quick_key(0)))
    alone, many = made, jax.device_put(made, layout.shardings)
    with use(mesh, rules):
        rows = batch_sharding(mesh, rules, ("batch", None, None))
        xs = [jax.device_put(X[:, i : i + 1], rows) for i in range(2)]
        options: Any = {"out_shardings": (rows, layout.shardings)}
        compiled = jax.jit(step, **options).lower(many, xs[0]).compile()
    one = jax.jit(step)
    for x in xs:
        expected, alone = one(alone, np.asarray(x))
        found, many = compiled(many, x)
        np.testing.assert_allclose(found, expected, 1e-5, 1e-6)
    sent = collectives(compiled)
    assert {c.what for c in sent} == {"all-reduce over context", "all-reduce over tensor"}
    assert max(c.bytes for c in sent) <= 2 * 16 * 4  # rows on a device, features, bytes


def test_the_cache_of_a_decoder_is_part_of_its_layout() -> None:
    config = DecoderConfig(num_layers=3, embed_dim=16, mlp_dim=32, head_dim=4, max_length=32)

    def init(key: jax.Array) -> Any:
        return Decoder(config, decode=True).init(key, jnp.ones((8, 1), jnp.int32))

    for spec, name, wanted in (
        ("data=2,fsdp=2,tensor=2", "fsdp_tp", P(None, ("data", "fsdp"), None, "tensor")),
        ("data=8", "dp", P(None, "data")),
        ("data=2,tensor=4", "tp_sp", P(None, "data")),  # two heads: `tensor?` yields
        ("data=2,context=4", "cp", P(None, "data")),
        ("context=2,tensor=2,expert=2", "decode", P(None, "expert", "context", "tensor")),
    ):
        mesh = make_mesh(spec)
        layout = abstract_layout(init, quick_key(0), mesh=mesh, rules=preset(name))
        assert layout.problems == () and layout.unnamed == ()
        for part in ("cached_key", "cached_value"):
            leaf = layout.leaf(f"cache/layers/attention/{part}")
            assert (leaf.spec, leaf.shape) == (wanted, (3, 8, 32, config.num_kv_heads, 4)), name


def test_rows_of_a_cache_are_not_replicated_in_silence() -> None:
    """They are those of a batch; `decode` says that they may yield."""
    layer, mesh = LAYERS["grouped"], make_mesh("fsdp=8")
    found = abstract_layout(init_of(layer), quick_key(0), mesh=mesh, rules=preset("fsdp"))
    assert {(p.where, p.error.__name__) for p in found.problems} == {
        (f"cache/cached_{what}, shape (4, 8, 2, 4)", "IndivisibleDimError")
        for what in ("key", "value")
    }
    whole = abstract_layout(init_of(layer), quick_key(0), mesh=mesh, rules=preset("decode"))
    rows = whole.leaf("cache/cached_key").dims[0]
    assert rows.given_up[-1] == ("fsdp", "8 does not divide 4") and whole.problems == ()
