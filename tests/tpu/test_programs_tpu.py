"""Programs of the library, compiled for TPUs: nothing is dropped, and what is sent is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.models import DecoderConfig
from shardflax.partitioning import (
    assert_collectives,
    collectives,
    explain,
    logical_axis_rules,
    make_mesh,
    networks,
    preset,
    tpu_topology,
    use,
    with_logical_constraint,
)
from shardflax.programs import DecoderProgram, Program, layout_of, traced_step
from shardflax.training import OptimizerConfig

pytestmark = pytest.mark.tpu

LAYERS, WEIGHTS = 5, 7  # of a block: query, key, value, out, gate, up, down
CONFIG = DecoderConfig(
    num_layers=LAYERS,
    vocab_size=256,
    embed_dim=256,
    mlp_dim=512,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    remat=None,
)
KERNEL = 'custom_call_target="tpu_custom_call"'
P = jax.P


def traced(mesh: Any, rules: str, shape: tuple[int, int]) -> Any:
    """The train step of a decoder."""
    program = DecoderProgram(CONFIG, OptimizerConfig(), shape)
    layout = layout_of(program, mesh, preset(rules))
    return traced_step(program, layout, preset(rules))


# --- constraints


@pytest.mark.filterwarnings("ignore:.with mesh.:DeprecationWarning")
def test_constraints_are_kept_however_the_mesh_is_said(tpus: list[Any]) -> None:
    """On a host whose default backend is the CPU."""
    mesh, rules = make_mesh("fsdp=4,tensor=2", tpus), preset("fsdp_tp")
    assert jax.default_backend() == "cpu"

    def constrained(x: Any) -> Any:
        return with_logical_constraint(x, ("batch", "act_mlp"))

    def body(x: Any) -> Any:
        with use(mesh, rules):
            used = constrained(x * 2)
        with logical_axis_rules(rules):
            with mesh:
                entered = constrained(x * 3)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                abstract = constrained(x * 4)
        said = with_logical_constraint(x * 5, ("batch", "act_mlp"), rules, mesh)
        return used, entered, abstract, said, x * 6

    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=jax.NamedSharding(mesh, P()))
    given = jax.jit(body).lower(x).compile().output_shardings
    assert [one.spec for one in given] == [P("fsdp", "tensor")] * 4 + [P()]


def test_a_step_has_the_constraints_that_it_has_on_cpus(tpus: list[Any]) -> None:
    found = []
    for devices in (jax.devices(), tpus):
        text = traced(make_mesh("fsdp=4,tensor=2", devices), "fsdp_tp", (8, 96)).lower().as_text()
        found.append(text.count("sdy.sharding_constraint"))
    assert found[0] == found[1] > 10


# --- what is sent, and kernels


def test_fsdp_gathers_each_weight_twice_and_attention_is_a_kernel(tpus: list[Any]) -> None:
    """Steps of the loop over layers count, also behind a kernel; nothing else is sent."""
    mesh = make_mesh("data=4,fsdp=2", tpus)
    compiled = traced(mesh, "fsdp", (8, 128)).lower().compile()
    assert compiled.as_text().count(KERNEL) == 3  # forward; backward of the query, of key and value
    # The head is gathered in both passes, the table of the embedding in one: both lie outside.
    gathers = 2 * WEIGHTS * LAYERS + 3
    sums = ["all-reduce over data,fsdp", "all-reduce over fsdp"]
    assert_collectives(compiled, {"all-gather over fsdp": gathers, **dict.fromkeys(sums)})
    inside = [c for c in collectives(compiled) if "layers/" in c.path]
    assert inside and {(c.count, c.exact) for c in inside} == {(LAYERS, True)}


def test_tp_sp_gathers_and_scatters_rows_alone_and_attention_has_no_kernel(tpus: list[Any]) -> None:
    """Lengths that are no multiple of 128 are attended to without a kernel."""
    mesh = make_mesh("data=2,tensor=4", tpus)
    compiled = traced(mesh, "tp_sp", (8, 96)).lower().compile()
    assert compiled.as_text().count(KERNEL) == 0
    kinds = ("all-gather over tensor", "reduce-scatter over tensor", "all-reduce over tensor")
    sums = ("all-reduce over data", "all-reduce over data,tensor")
    assert_collectives(compiled, [*kinds, *sums])
    # Weights stay where they are: what is gathered in a layer is rows of the residual stream.
    rows = 4 * 96 * CONFIG.embed_dim * 2
    inside = [c for c in collectives(compiled) if c.count == LAYERS and c.kind == "all-gather"]
    assert inside and {c.bytes for c in inside} == {rows}


# --- memory, and several slices


def mlp() -> Program:
    """A step whose parts on eight devices are whole tiles of a TPU's memory, with no scalar."""

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.Dense(256, kernel_axes=("embed", "mlp"), use_bias=False, name="up")(x)
            return nn.Dense(1024, kernel_axes=("mlp", "embed"), use_bias=False, name="down")(h)

    def init(key: jax.Array) -> Any:
        return {"params": MLP().init(key, jnp.ones((1, 1024)))["params"]}

    def step(state: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean(MLP().apply({"params": params}, x) ** 2)  # pyright: ignore[reportOperatorIssue]

        value, grads = jax.value_and_grad(loss)(state["params"])
        return {"params": jax.tree.map(lambda p, g: p - g, state["params"], grads)}, value

    return Program(init, step, jax.ShapeDtypeStruct((128, 1024), "float32"), ("batch", None))


def test_two_slices_and_the_memory_that_explain_says() -> None:
    mesh = make_mesh("dcn(data=-1) ici(fsdp=-1)", tpu_topology("v5e:2x4", slices=2))
    assert networks(mesh) == {"data": (2, 1), "fsdp": (1, 8)}
    rules = preset("hsdp")
    layout = layout_of(mlp(), mesh, rules)
    compiled = traced_step(mlp(), layout, rules).lower().compile()
    # Gradients are summed over the slices, and nothing else leaves one.
    slow = ["all-reduce over data"]
    fast = ["all-gather over fsdp", "reduce-scatter over fsdp", "all-reduce over fsdp"]
    assert_collectives(compiled, [*slow, *fast], mesh, across_dcn=slow)
    assert {c.network for c in collectives(compiled, mesh)} == {"ICI", "DCN"}
    stored = explain(layout, mesh, rules).bytes_per_device
    assert stored == layout.bytes_per_device == 2 * 1024 * 256 * 4 // 8
    batch = 128 * 1024 * 4 // 16
    assert compiled.memory_analysis().argument_size_in_bytes == stored + batch
