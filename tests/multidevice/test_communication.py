"""What compiled programs send, read from them, and contracts about it."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.partitioning import CollectivesError, assert_collectives, collectives, make_mesh
from shardflax.partitioning.communication import Collective, _found, _network
from shardflax.partitioning.communication_table import (
    communication_json,
    communication_table,
    communication_text,
)
from shardflax.partitioning.hlo import parse
from shardflax.partitioning.replica_groups import groups_of, mesh_axes
from shardflax.partitioning.slices import fake_slices

P = jax.P


def placed(mesh: Any, spec: Any, shape: tuple[int, ...] = (8, 8)) -> jax.Array:
    return jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, spec))


def manual(mesh: Any, body: Any, spec: Any, out: Any) -> Any:
    """A program with just the collectives that `body` calls."""
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(placed(mesh, spec)).compile()


def test_every_kind_with_its_axes_and_bytes() -> None:
    mesh = make_mesh("data=2,tensor=4")

    def body(x: Any) -> Any:  # 4 x 2 on each device
        x = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)  # 4 x 8
        x = jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)  # 4 x 2
        x = jax.lax.all_to_all(x, "data", split_axis=1, concat_axis=0, tiled=True)  # 8 x 1
        x = jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.psum(x, ("data", "tensor"))

    found = collectives(manual(mesh, body, P("data", "tensor"), P()))
    by_kind = {c.kind: (c.axes, c.bytes, c.count, c.network) for c in found}
    assert by_kind["all-gather"] == (("tensor",), 4 * 8 * 4, 1, "ICI")
    assert by_kind["all-to-all"] == (("data",), 8 * 4, 1, "ICI")
    assert by_kind["collective-permute"] == (("tensor",), 8 * 4, 1, "ICI")
    # The CPU has no reduce-scatter: XLA writes an all-reduce of the whole, and takes a slice.
    reduced = {(c.axes, c.bytes) for c in found if c.kind in ("all-reduce", "reduce-scatter")}
    assert reduced == {(("tensor",), 4 * 8 * 4), (("data", "tensor"), 8 * 4)}


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        h = nn.relu(nn.Dense(32, kernel_axes=("embed", "mlp"), use_bias=False, name="up")(x))
        return nn.Dense(16, kernel_axes=("mlp", "embed"), use_bias=False, name="down")(h), None


def compiled_stack(spec: str, rules: str) -> Any:
    mesh, axis_rules = make_mesh(spec), partitioning.preset(rules)
    x = jnp.ones((8, 4, 16))
    init = lambda key: Stack().init(key, x)  # noqa: E731
    state, _ = partitioning.init_sharded(init, jax.random.key(0), mesh=mesh, rules=axis_rules)
    with partitioning.use(mesh, axis_rules):
        x = jax.device_put(x, partitioning.batch_sharding(mesh, axis_rules))
        return jax.jit(Stack().apply).lower(state, x).compile()


def test_loops_count_and_paths_lead_to_modules() -> None:
    found = collectives(compiled_stack("fsdp=8", "fsdp"))
    assert {c.what for c in found} == {"all-gather over fsdp"}
    assert {c.count for c in found} == {3} and all(c.exact for c in found)
    paths = {c.path.partition("layers/")[2] for c in found}
    assert paths >= {"up", "down"}
    assert {c.source.partition(":")[0] for c in found} == {"test_communication.py"}
    assert not any(c.backward for c in found)


def test_a_loop_of_unknown_length_counts_as_one_step() -> None:
    mesh = make_mesh("data=8")

    def body(x: Any) -> Any:
        def step(c: Any) -> Any:
            return jax.lax.psum(c, "data") / 9

        return jax.lax.while_loop(lambda c: jax.lax.psum(c, "data").sum() > 1, step, x)

    found = collectives(manual(mesh, body, P("data"), P("data")))
    assert found and not any(c.exact for c in found)
    assert str(found[0]).startswith("all-reduce over data: each step")


def test_backward_is_told_from_forward() -> None:
    mesh = make_mesh("data=8")
    x, w = placed(mesh, P("data")), placed(mesh, P())
    step = jax.jit(jax.grad(lambda w, x: jnp.sin(x @ w).sum()))
    found = collectives(step.lower(w, x).compile())
    assert [(c.what, c.backward) for c in found] == [("all-reduce over data", True)]


def test_contracts() -> None:
    compiled = compiled_stack("data=4,tensor=2", "tp_sp")
    found = {c.what for c in collectives(compiled)}
    assert "all-reduce over tensor" in found or "reduce-scatter over tensor" in found
    assert_collectives(compiled, found)
    with pytest.raises(CollectivesError) as error:
        assert_collectives(compiled, {"all-to-all over data": 2})
    text = str(error.value)
    assert "all-to-all over data: expected 2, found 0" in text
    assert "over tensor: expected 0, found" in text and "down" in text


def test_a_count_that_differs_is_an_error() -> None:
    compiled = compiled_stack("fsdp=8", "fsdp")
    number = sum(c.count for c in collectives(compiled))
    assert_collectives(compiled, {"all-gather over fsdp": number})
    with pytest.raises(CollectivesError, match=f"expected 1, found {number}"):
        assert_collectives(compiled, {"all-gather over fsdp": 1})


def test_bytes_and_the_slow_network_are_part_of_a_contract() -> None:
    mesh = make_mesh("dcn(data=2) ici(tensor=4)")

    def body(x: Any) -> Any:
        return jax.lax.psum(jax.lax.psum(x, "tensor"), "data")

    compiled = manual(mesh, body, P("data", "tensor"), P())
    found = collectives(compiled, mesh)
    assert {(c.what, c.network) for c in found} == {
        ("all-reduce over tensor", "ICI"),
        ("all-reduce over data", "DCN"),
    }
    both = ["all-reduce over tensor", "all-reduce over data"]
    assert_collectives(compiled, both, mesh, across_dcn=["all-reduce over data"], most_bytes=64)
    with pytest.raises(CollectivesError) as error:
        assert_collectives(compiled, both, mesh, across_dcn=[], most_bytes=63)
    text = str(error.value)
    assert "across slices (DCN), which was not allowed: all-reduce over data: 1 x 32 B" in text
    assert "64 B in one call, allowed 63" in text and "all-reduce over tensor: 1 x 32 B" in text


def test_the_table() -> None:
    found = [
        Collective("all-gather", ("fsdp",), "ICI", 1024, 3, True, "layers/up", "model.py:4"),
        Collective("all-gather", ("fsdp",), "ICI", 1024, 3, True, "layers/up", "model.py:4"),
        Collective("all-reduce", ("data", "fsdp"), "DCN", 4, 1, False, backward=True),
    ]
    head, rule, first, second, ici, dcn = communication_text(found).splitlines()
    assert head.split()[:3] == ["collective", "axes", "network"] and set(rule) == {"-", " "}
    assert first.split()[-5:] == ["6", "1.0", "KiB", "6.0", "KiB"] and "layers/up" in first
    assert "data,fsdp" in second and "1 a step" in second and "backward" in second
    assert ici == "ICI: 6.0 KiB in 6 collectives."
    assert dcn == "DCN: 4 B in 1 collectives, more in loops of unknown length."
    table = communication_table(found)
    assert table.row_count == 2 and "DCN" in str(table.caption)
    rows = json.loads(communication_json(found))
    assert [row["total"] for row in rows] == [6144, 4] and rows[0]["path"] == "layers/up"
    assert communication_text([]).endswith("Nothing is sent.")


def test_programs_without_a_mesh_need_one() -> None:
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile()
    with pytest.raises(ValueError, match="pass mesh="):
        collectives(compiled)
    assert collectives(compiled, make_mesh("data=8")) == []


def test_slices_are_joined_by_the_slower_network() -> None:
    mesh = make_mesh("data=2,fsdp=4")
    with fake_slices(2):
        assert _network([[0, 1, 2, 3], [4, 5, 6, 7]], mesh) == "ICI"
        assert _network([[0, 4], [1, 5]], mesh) == "DCN"
    assert _network([[0, 4], [1, 5]], mesh) == "ICI"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{{0,4},{1,5},{2,6},{3,7}}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=4] {'a', 'b':(1)2}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (
            "mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}",
            [[0, 2], [1, 3], [4, 6], [5, 7]],
        ),
    ],
)
def test_replica_groups(text: str, groups: list[list[int]]) -> None:
    assert groups_of(text, 8) == groups


def test_unknown_replica_groups_are_an_error() -> None:
    with pytest.raises(ValueError, match="unknown replica groups"):
        groups_of("<8>", 8)


def test_axes_of_groups() -> None:
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert mesh_axes([[0, 1], [2, 3]], mesh) == ("tensor",)
    assert mesh_axes([[0, 2, 4, 6]], mesh) == ("data", "fsdp")


def test_asynchronous_forms_are_read() -> None:
    text = """HloModule m

ENTRY %main (a: bf16[4]) -> bf16[8] {
  %a = bf16[4]{0} parameter(0)
  %s = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%a), replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %d = bf16[8]{0} all-gather-done(%s)
}"""
    ops = [i.op for i in parse(text).computations["main"]]
    assert ops == ["parameter", "all-gather-start", "all-gather-done"]
    (found,) = _found(parse(text), make_mesh("data=2", jax.devices()[:2]))
    assert (found.kind, found.shape, found.bytes) == ("all-gather", (8,), 16)


def test_of_a_ragged_one_what_is_sent_counts() -> None:
    """And not the array that it goes into, nor the places."""
    text = """HloModule m

ENTRY %main (a: f32[4], b: f32[8], c: s32[2]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %c = s32[2]{0} parameter(2)
  ROOT %r = f32[8]{0} ragged-all-to-all(%a, %b, %c, %c, %c, %c), replica_groups={{0,1}}
}"""
    (found,) = _found(parse(text), make_mesh("data=2", jax.devices()[:2]))
    assert (found.what, found.bytes) == ("ragged-all-to-all over data", 32)


def test_what_runs_in_the_background_counts_once() -> None:
    text = """HloModule m

%wrapped (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[4]{0} reduce-scatter(%p), replica_groups=[1,2]<=[2], dimensions={0}, to_apply=%add
}

%all-reduce-scatter.1 (q: f32[8]) -> f32[4] {
  %q = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} all-reduce(%q), replica_groups=[1,2]<=[2], to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[4] {
  %x = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[4]{0}, u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[8]{0}), f32[4]{0}, u32[]) async-update(%s), calls=%wrapped
  %d = f32[4]{0} async-done(%u), calls=%wrapped
  %f = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %c = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}
  ROOT %e = f32[4]{0} collective-permute-done(%c)
}"""
    found = [*_found(parse(text), make_mesh("data=2", jax.devices()[:2]))]
    assert sorted((c.kind, c.bytes, c.count, c.shape) for c in found) == [
        ("collective-permute", 16, 1, (4,)),
        ("reduce-scatter", 32, 1, (4,)),
        ("reduce-scatter", 32, 1, (8,)),
    ]


PIECES = """HloModule m

%start (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %g.1 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %s = (f32[4]{0}, f32[8]{0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%piece (q: f32[4]) -> f32[8] {
  %q = f32[4]{0} parameter(0)
  %g.2 = f32[8]{0} all-gather(%q), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %m = f32[8]{0} multiply(%g.2, %g.2)
}

%all-reduce-scatter.1 (r: f32[8]) -> f32[4] {
  %r = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} all-reduce(%r), channel_id=8, replica_groups=[1,2]<=[2], to_apply=%add
}

%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[4]{0} get-tuple-element(%b), index=1
  %f.1 = (f32[4]{0}, f32[8]{0}) fusion(%x), kind=kCustom, calls=%start
  %f.2 = f32[8]{0} fusion(%x), kind=kCustom, calls=%piece
  %f.3 = f32[4]{0} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.1, METADATA
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %f.3)
}

%condition (b: (s32[], f32[4])) -> pred[] {
  %bound = s32[] constant(12)
  %b = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %state = (s32[], f32[4]{0}) tuple(%copied, %x)
  ROOT %loop = (s32[], f32[4]{0}) while(%state), condition=%condition, body=%body
}""".replace("METADATA", 'metadata={op_name="jit(f)/while/body/layers/up/dot_general"}')


def test_what_a_tpu_cuts_into_pieces_is_one() -> None:
    """Its compiler fuses pieces of a collective with other work, and counts no loops for us."""
    found = [*_found(parse(PIECES), make_mesh("data=2", jax.devices()[:2]))]
    assert sorted((c.kind, c.bytes, c.count, c.exact, c.path) for c in found) == [
        ("all-gather", 32, 12, True, ""),
        ("reduce-scatter", 32, 12, True, "layers/up"),
    ]


def test_steps_that_were_taken_out_of_a_loop_are_not_counted_in_it() -> None:
    """Programs for several slices begin a step while the one before still sends."""
    peeled = parse(PIECES.replace("constant(0)", "constant(1)"))
    found = [*_found(peeled, make_mesh("data=2", jax.devices()[:2]))]
    assert {(c.count, c.exact) for c in found} == {(11, True)}


KERNEL = """HloModule m

ENTRY %main (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %k = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call", attributes={metadata={
"xprof":"{\\"block\\": 128}"
}}, metadata={op_name="jit(f)/up/kernel"}
  ROOT %g = f32[8]{0} all-gather(%k), replica_groups=[1,2]<=[2], dimensions={0}
}"""


def test_what_comes_after_a_kernel_is_read() -> None:
    """The attributes of a kernel (Pallas) take several lines, one of which begins with a brace."""
    program = parse(KERNEL)
    assert [i.op for i in program.computations["main"]] == [
        "parameter",
        "custom-call",
        "all-gather",
    ]
    assert program.computations["main"][1].op_name == "jit(f)/up/kernel"
    (found,) = _found(program, make_mesh("data=2", jax.devices()[:2]))
    assert found.what == "all-gather over data"


@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("constant(0)", "parameter(1)"),  # it may begin anywhere
        ("direction=LT", "direction=GT"),  # it ends otherwise
        ("cond/lt", "cond/other"),  # no loop of JAX's
        ("constant(12)", "parameter(1)"),  # no bound that is known
    ],
)
def test_a_loop_that_may_run_otherwise_is_not_counted(what: str, instead: str) -> None:
    text = PIECES.replace(what, instead)
    found = [*_found(parse(text), make_mesh("data=2", jax.devices()[:2]))]
    assert {(c.count, c.exact) for c in found} == {(1, False)}
