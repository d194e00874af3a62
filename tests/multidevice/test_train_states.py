"""Train states of a 12-layer decoder under every preset, on meshes of one, two and three axes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardflax.core.boxes import unbox
from shardflax.models import Decoder, DecoderConfig
from shardflax.partitioning import (
    PRESETS,
    Layout,
    assert_collectives,
    batch_sharding,
    explain,
    init_sharded,
    logical_axis_rules,
    make_mesh,
    preset,
    use,
)
from shardflax.partitioning.scope import InitTrace, init_tracing
from shardflax.partitioning.spec_check import spec_axes
from shardflax.training import TrainState, TrainStep, cross_entropy, make_train_step
from tests.core.harness import quick_key

CONFIG = DecoderConfig(
    vocab_size=32,
    num_layers=12,
    embed_dim=16,
    mlp_dim=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    max_length=16,
    remat=None,
    dtype="float32",
)
MODEL = Decoder(CONFIG)
TX = optax.adamw(1e-2)
TOKENS = np.arange(8 * 16, dtype="int32").reshape(8, 16) * 7 % 32

# The axes of each preset, the first for a mesh of 8, two for 4 x 2, all for 2 x 2 x 2.
AXES = {
    "dp": "data tensor fsdp",
    "zero1": "data tensor fsdp",
    "fsdp": "fsdp data tensor",
    "hsdp": "fsdp data tensor",
    "fsdp2d": "fsdp fsdp2 data",
    "tp_sp": "tensor data fsdp",
    "tp_embed": "tensor data fsdp",
    "fsdp_tp": "fsdp tensor data",
    "cp": "context data tensor",
    "ep": "expert data tensor",
    "ep_as_cp": "expert data tensor",
    "cp_as_ep": "context data tensor",
    "ep_as_dp": "expert data tensor",
    "pp": "stage data tensor",
    "decode": "tensor expert data",
}


def mesh_of(name: str, sizes: tuple[int, ...], types: Any = "auto") -> Any:
    axes = AXES[name].split()[: len(sizes)]
    spec = ",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))
    return make_mesh(spec, axis_types=types)


def init(key: jax.Array) -> TrainState:
    params = MODEL.init(key, jnp.asarray(TOKENS))["params"]
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=TX)


def loss_fn(params: Any, batch: Any, _: Any) -> Any:
    logits: Any = MODEL.apply({"params": params}, batch["tokens"])
    return cross_entropy(logits, batch["targets"])


STEP: TrainStep = make_train_step(loss_fn)
BATCH = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, axis=1)}


@functools.cache
def losses() -> list[float]:
    """Of two steps on one device."""
    with logical_axis_rules(()):
        state, step, found = jax.jit(lambda key: unbox(init(key)))(quick_key(0)), jax.jit(STEP), []
        for _ in range(2):
            state, metrics = step(state, BATCH)
            found.append(float(metrics["loss"]))
    return found


# What each preset sends, and nothing else.  A CPU has no reduce-scatter, and sums in its place.
# Gathers over an axis of the parameters are those of weights, sums over it those of gradients.
SENT = {
    "dp 4x2": "all-reduce data",
    "zero1 4x2": "all-reduce data, all-gather data",
    "fsdp 4x2": "all-gather fsdp, all-reduce fsdp, all-reduce data+fsdp",
    "hsdp 4x2": "all-gather fsdp, all-reduce fsdp, all-reduce data+fsdp",
    "fsdp2d 4x2": "all-gather fsdp, all-gather fsdp2, all-gather fsdp+fsdp2, "
    "all-reduce fsdp, all-reduce fsdp2, all-reduce fsdp+fsdp2",
    "tp_sp 4x2": "all-gather tensor, all-reduce tensor, all-reduce data",
    "tp_embed 4x2": "all-gather tensor, all-reduce tensor, all-reduce data",
    "fsdp_tp 4x2": "all-gather fsdp, all-gather tensor, all-reduce fsdp, all-reduce tensor",
    "cp 4x2": "all-gather context, collective-permute context, all-reduce context, all-reduce data",
    "ep 4x2": "all-gather expert, all-reduce expert, all-reduce data+expert",
    "ep_as_cp 4x2": "all-gather expert, collective-permute expert, all-reduce expert, "
    "all-reduce data",
    "cp_as_ep 4x2": "all-gather context, collective-permute context, all-reduce context, "
    "all-reduce data",
    "ep_as_dp 4x2": "all-reduce data+expert",
    "pp 4x2": "all-gather data, all-gather stage, all-gather data+stage, all-reduce data, "
    "all-reduce data+stage",
    "decode 4x2": "all-gather tensor, all-reduce tensor, all-reduce expert",
    "dp 8": "all-reduce data",
    "zero1 8": "all-reduce data, all-gather data",
    "fsdp_tp 8": "all-gather fsdp, all-reduce fsdp",
    "tp_sp 8": "all-gather tensor, all-reduce tensor",
    "fsdp2d 2x2x2": "all-gather fsdp, all-gather fsdp2, all-gather fsdp+fsdp2, all-reduce fsdp, "
    "all-reduce fsdp2, all-reduce fsdp+fsdp2, all-reduce data+fsdp+fsdp2",
    "fsdp_tp 2x2x2": "all-gather fsdp, all-gather tensor, all-reduce fsdp, all-reduce tensor, "
    "all-reduce data+fsdp",
}
QUICK = ("zero1 8", "fsdp_tp 2x2x2")
EXPLICIT = ("dp 8", "zero1 8", "fsdp2d 2x2x2", "fsdp_tp 4x2", "fsdp_tp 2x2x2", "ep_as_dp 4x2")
CASES = [(case, "auto") for case in SENT] + [(case, "explicit") for case in EXPLICIT]


@pytest.mark.parametrize(
    ("case", "types"),
    [
        pytest.param(case, types, marks=() if case in QUICK else pytest.mark.slow)
        for case, types in CASES
    ],
)
def test_placed_as_explained_and_the_same_loss(case: str, types: str) -> None:
    name, sizes = case.split()
    mesh, rules = mesh_of(name, tuple(map(int, sizes.split("x"))), types), preset(name)
    state, layout = init_sharded(init, quick_key(0), mesh=mesh, rules=rules)
    explained = explain(layout, mesh, rules).leaves
    check_placed(state, layout, explained)
    with use(mesh, rules):
        sharding = batch_sharding(mesh, rules, ("batch", "length"), TOKENS.shape)
        batch = jax.device_put(BATCH, sharding)
        step = jax.jit(STEP, out_shardings=(layout.shardings, None))
        compiled = step.lower(state, batch).compile()
        for expected in losses():
            state, metrics = compiled(state, batch)
            np.testing.assert_allclose(metrics["loss"], expected, 2e-6)
    check_placed(state, layout, explained)
    words = [sent.split() for sent in SENT[case].split(", ")]
    assert_collectives(compiled, [f"{kind} over {axes.replace('+', ',')}" for kind, axes in words])


def check_placed(state: Any, layout: Layout, explained: Any) -> None:
    """Every array lies as its layout and its explanation say."""
    rows = zip(jax.tree.leaves(state), layout.leaves, explained, strict=True)
    for array, leaf, row in rows:
        assert array.sharding.spec == leaf.spec, leaf.where
        assert tuple(spec_axes(part) for part in leaf.spec) == row.spec[: len(leaf.spec)]
        local = array.addressable_shards[0].data
        assert local.shape == tuple(dim.local for dim in row.dims), leaf.where
        assert local.nbytes == leaf.bytes_per_device == row.bytes_per_device
    assert sum(row.bytes_per_device for row in explained) == layout.bytes_per_device


def test_every_preset_names_every_leaf() -> None:
    """15 presets, three meshes, auto and explicit axes; the state is traced once."""
    mesh = make_mesh("data=8")
    with use(mesh, preset("dp")), init_tracing(InitTrace()):
        state = jax.eval_shape(init, quick_key(0))
    assert set(AXES) == set(PRESETS)
    whole = Layout(state, mesh, preset("dp")).bytes_per_device
    for name in AXES:
        for sizes in ((8,), (4, 2), (2, 2, 2)):
            found = [
                Layout(state, mesh_of(name, sizes, types), preset(name))
                for types in ("auto", "explicit")
            ]
            assert found[0].problems == () and found[0].unnamed == (), (name, sizes)
            assert found[0].leaves == found[1].leaves
            rest = found[0].bytes_per_device
            assert (rest == whole) == (name in ("dp", "ep_as_dp", "pp")), (name, sizes)
