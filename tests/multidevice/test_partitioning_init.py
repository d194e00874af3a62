"""`init_sharded`: the same numbers on every mesh, placed as planned, refused before allocation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardflax.core.boxes import unbox
from shardflax.partitioning import (
    IndivisibleDimError,
    LayoutError,
    UnknownNameError,
    abstract_layout,
    batch_axes,
    batch_sharding,
    constrain,
    init_sharded,
    logical_axis_rules,
    make_mesh,
    named,
    plan_init,
    preset,
    use,
    with_logical_partitioning,
    with_partitioning,
)
from shardflax.training import TrainState
from tests.allocations import nothing_allocated
from tests.core.harness import quick_key

INITS = jax.nn.initializers
KEY = jax.random.key(0)
TX = optax.adamw(1e-3)


def init(key: jax.Array, kernel: tuple[str, ...] = ("embed", "mlp"), size: int = 24) -> Any:
    """A train state of two parameters, initialised with a batch of one example."""
    keys = jax.random.split(key)
    w = named(INITS.lecun_normal(), kernel)(keys[0], (16, size))
    b = named(INITS.normal(), ("norm",))(keys[1], (16,))
    x = constrain(jnp.ones((1, 16)), ("batch", "act_embed"))
    constrain((x + unbox(b)) @ unbox(w), ("batch", "act_mlp"))
    params = {"w": w, "b": b}
    return {"params": params, "opt_state": TX.init(unbox(params)), "step": 0}


CUBE = "data=2,fsdp=2,tensor=2"


@functools.cache
def made_alone() -> Any:
    """The state, made on one device."""
    with logical_axis_rules(()):
        return jax.device_get(jax.jit(lambda key: unbox(init(key)))(KEY))


@pytest.mark.parametrize(
    ("spec", "name", "types"),
    [
        ("fsdp=8", "fsdp", "auto"),
        ("fsdp=4,tensor=2", "tp_sp", "auto"),
        (CUBE, "dp", "auto"),
        (CUBE, "fsdp_tp", "auto"),
        ("fsdp=8", "fsdp", "explicit"),
        ("fsdp=4,tensor=2", "fsdp_tp", "explicit"),
        (CUBE, "fsdp_tp", "explicit"),
    ],
)
def test_same_numbers_on_every_mesh(spec: str, name: str, types: str) -> None:
    mesh = make_mesh(spec, axis_types=types)
    state, layout = init_sharded(init, KEY, mesh=mesh, rules=preset(name))
    jax.tree.map(np.testing.assert_array_equal, state, made_alone())
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(layout.shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert leaf.committed
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held == layout.bytes_per_device


def test_everything_wrong_is_said_at_once_and_nothing_runs(monkeypatch: Any) -> None:
    def bad(key: jax.Array) -> Any:
        state = init(key, size=17)
        state["params"]["c"] = named(INITS.ones, ("emebd",))(key, (8,))
        state["params"]["d"] = named(INITS.ones, ("mlp",))(key, (8, 8))
        constrain(jnp.ones((2, 2)), ("batch", "act_mpl"))
        return state

    monkeypatch.setattr(jax, "jit", None)
    with pytest.raises(LayoutError) as error:
        init_sharded(bad, KEY, mesh=make_mesh("fsdp=4,tensor=2"), rules=preset("fsdp_tp"))
    text = str(error.value)
    for part in ("params/w, shape (16, 17)", "params/c, shape (8,)", "params/d, shape (8, 8)"):
        assert part in text
    assert "constraint at " in text and "'act_mpl'" in text and "did you mean 'act_mlp'" in text
    assert "opt_state" not in text  # it is wrong as its parameter is, and no other way


def test_a_misspelt_name_has_its_class_and_path() -> None:
    with pytest.raises(UnknownNameError, match=r"params/w, .*'mpl'.*did you mean 'mlp'"):
        init_sharded(
            lambda key: {"params": {"w": named(INITS.ones, ("embed", "mpl"))(key, (8, 8))}},
            KEY,
            mesh=make_mesh("fsdp=8"),
            rules=preset("fsdp"),
        )


def layers(key: jax.Array, count: int = 100, bad: int = -1) -> Any:
    """A train state of equal layers, one name of one of them misspelt if asked for."""
    params = {}
    for i in range(count):
        names = ("embed", "mpl") if i == bad else ("embed", "mlp")
        init_fn = named(INITS.truncated_normal(), names)
        params[f"layer_{i}"] = {
            "kernel": init_fn(jax.random.fold_in(key, i), (8, 16)),
            "scale": named(INITS.ones, ("norm",))(key, (8,)),
        }
    plain = jax.tree.map(lambda x: x, unbox(params))
    return {"params": params, "opt_state": TX.init(plain), "ema": plain, "step": 0}


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_equal_parameters_share_a_program(types: str) -> None:
    mesh = make_mesh("fsdp=4,tensor=2", axis_types=types)
    fn = functools.partial(layers, count=30)
    plan = plan_init(fn, quick_key(0), mesh=mesh, rules=preset("fsdp_tp"))
    # A kernel, a scale, zeros like each of them, a count and a step.
    assert (plan.programs, plan.steps) == (6, 2 * 30 * 4 + 2)
    state = plan.run()
    programs = {id(step.program): step.program for step in plan._programs.steps}
    assert [program._cache_size() for program in programs.values()] == [1] * 6
    with logical_axis_rules(()):
        expected = jax.jit(lambda key: unbox(layers(key, 2)))(quick_key(0))
    for i in range(2):
        name = f"layer_{i}"
        np.testing.assert_array_equal(
            state["params"][name]["kernel"], expected["params"][name]["kernel"]
        )
        for part in ("params", "ema"):
            kernel = state[part][name]["kernel"]
            assert kernel.sharding.spec == P("fsdp", "tensor")
            np.testing.assert_array_equal(kernel, expected[part][name]["kernel"])
    first = state["params"]["layer_0"]["kernel"], state["ema"]["layer_0"]["kernel"]
    one, two = (x.addressable_shards[0].data.unsafe_buffer_pointer() for x in first)
    assert one != two  # a step may donate both


def test_loops_effects_and_arguments() -> None:
    """A loop is one program for all that it makes; an init that prints is not cut at all."""
    kernel = named(INITS.normal(), ("embed", "mlp"))

    def stacked(key: jax.Array, scale: jax.Array, said: bool) -> Any:
        def body(carry: jax.Array, key: jax.Array) -> Any:
            return carry + 1, (kernel(key, (8, 8)).value, carry)

        last, (kernels, counts) = jax.lax.scan(body, scale, jax.random.split(key, 3))
        if said:
            jax.debug.print("made {}", last)
        return {"kernels": kernels, "counts": counts, "last": last, "scale": scale, "key": key}

    args, mesh = (quick_key(1), jnp.float32(2.0)), make_mesh("data=8")
    for said in (False, True):
        fn = functools.partial(stacked, said=said)
        plan = plan_init(fn, *args, mesh=mesh, rules=preset("dp"))
        assert plan.steps == (1 if said else 3)
        state, expected = plan.run(), jax.jit(fn)(*args)
        assert state["key"] == args[0]
        for name in ("kernels", "counts", "last", "scale"):
            np.testing.assert_array_equal(state[name], expected[name])


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_peak_memory(types: str) -> None:
    """The state, and what the initializer of one array works in: a few shards, for threefry."""
    mesh = make_mesh("fsdp=8", axis_types=types)
    kernel = named(INITS.normal(), ("embed", "mlp"))

    def big(key: jax.Array) -> Any:
        shapes = {"a": (1024, 512), "b": (512, 512), "c": (512, 1024)}
        return {k: kernel(jax.random.fold_in(key, i), s) for i, (k, s) in enumerate(shapes.items())}

    plan = plan_init(big, KEY, mesh=mesh, rules=preset("fsdp"))
    assert plan.layout.bytes_per_device == 5 * 512 * 512 * 4 // 8
    memory: list[Any] = [one.memory_analysis() for one in plan.compiled()]
    sizes = sorted(one.output_size_in_bytes for one in memory)
    assert sizes == sorted(leaf.bytes_per_device for leaf in plan.layout.leaves)
    for one in memory:
        assert one.temp_size_in_bytes <= 4 * one.output_size_in_bytes


def test_a_misspelt_name_is_refused_before_anything_is_made(monkeypatch: Any) -> None:
    mesh = make_mesh("fsdp=4,tensor=2")
    key, traced = jax.ShapeDtypeStruct((), KEY.dtype), []
    monkeypatch.setattr(jax, "jit", traced.append)
    with nothing_allocated(), pytest.raises(UnknownNameError) as error:
        init_sharded(functools.partial(layers, bad=57), key, mesh=mesh, rules=preset("fsdp_tp"))
    assert len(error.value.problems) == 1  # not again for its moments and its average
    assert "params/layer_57/kernel" in str(error.value) and "did you mean 'mlp'" in str(error.value)
    assert not traced


def test_a_plan_is_printed_first_and_progress_last(capsys: Any) -> None:
    mesh, rules = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
    key, fn = quick_key(0), functools.partial(layers, count=2)
    with pytest.raises(UnknownNameError):
        init_sharded(functools.partial(fn, bad=1), key, mesh=mesh, rules=rules, print_plan=True)
    assert capsys.readouterr() == ("", "")
    _, layout = init_sharded(fn, key, mesh=mesh, rules=rules, print_plan=True, progress=True)
    out, err = capsys.readouterr()
    assert "Plan of an init on fsdp=4, tensor=2" in out and "18 arrays, 18 runs of 6 prog" in out
    assert "  64 B  ema/layer_0/kernel  float32(8, 16) fsdp,tensor" in out
    assert "whole on every device:\n  32 B  ema/layer_0/scale  float32(8,)" in out
    assert "18/18 arrays" in err and layout.bytes_per_device == 2 * 4 * (64 + 32) + 8


def test_names_that_only_constraints_use_count_as_used() -> None:
    layout = abstract_layout(init, KEY, mesh=make_mesh("data=2,fsdp=4"), rules=preset("fsdp_tp"))
    assert "batch" not in layout.unused_defaults and "act_mlp" not in layout.unused_defaults
    assert "vocab" in layout.unused_defaults
    assert layout.unused_axes == ()


def test_linens_wrappers_and_plain_pairs() -> None:
    def fn(key: jax.Array) -> Any:
        return {
            "params": {
                "a": with_logical_partitioning(INITS.normal(), ("embed", "mlp"))(key, (8, 6)),
                "b": with_partitioning(INITS.normal(), (None, "data"))(key, (8, 8)),
            }
        }

    mesh = make_mesh("data=4,model=2")
    state, layout = init_sharded(fn, KEY, mesh=mesh, rules=[("mlp", "model")])
    assert state["params"]["a"].sharding.spec == P(None, "model")
    assert state["params"]["b"].sharding.spec == P(None, "data")
    assert layout.unused_rules == ()


def test_constraints_hold_again_after_the_init() -> None:
    mesh, rules = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
    init_sharded(init, KEY, mesh=mesh, rules=rules)
    with use(mesh, rules), pytest.raises(IndivisibleDimError, match="dim 0 'batch' of size 1"):
        constrain(jnp.ones((1, 16)), ("batch", "act_embed"))


def test_a_step_keeps_the_layout_without_recompiling() -> None:
    """The specs of a layout are what `jit` hands back, so that a step compiles once."""
    mesh, rules = make_mesh("data=2,fsdp=2,tensor=2"), preset("fsdp_tp")
    state, layout = init_sharded(init, KEY, mesh=mesh, rules=rules)

    @jax.jit
    def step(state: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            h = constrain((x + params["b"]) @ params["w"], ("batch", "act_mlp"))
            return (h**2).mean()

        grads = jax.grad(loss)(state["params"])
        updates, opt_state = TX.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        state = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        return jax.lax.with_sharding_constraint(state, layout.shardings)

    sharding = batch_sharding(mesh, rules, ("batch", "act_embed"), (8, 16))
    x = jax.device_put(np.ones((8, 16), "float32"), sharding)
    with use(mesh, rules):
        for _ in range(3):
            state = step(state, x)
    steps: Any = step
    assert steps._cache_size() == 1
    assert state["params"]["w"].sharding.spec == P("fsdp", "tensor")


def test_batches() -> None:
    mesh, rules = make_mesh("data=2,fsdp=2,tensor=2"), preset("fsdp_tp")
    assert batch_sharding(mesh, rules).spec == P(("data", "fsdp"))
    assert batch_axes(mesh, rules) == ("data", "fsdp")
    assert batch_axes(make_mesh("tensor=8"), rules) == ()
    with pytest.raises(IndivisibleDimError, match=r"batch: dim 0 'batch' of size 6 .*by 4"):
        batch_sharding(mesh, rules, shape=(6, 128))
    with pytest.raises(UnknownNameError, match="batch: no rule for the name 'lenght'"):
        batch_sharding(mesh, rules, ("batch", "lenght"))


def test_an_optimizer_that_is_made_in_the_init_function() -> None:
    """Static parts that differ from one trace to the next do not matter."""

    def state(key: jax.Array) -> TrainState:
        params = {"w": named(INITS.lecun_normal(), ("embed", "mlp"))(key, (16, 24))}
        return TrainState.create(apply_fn=lambda: None, params=params, tx=optax.adamw(1e-3))

    made, layout = init_sharded(
        state, KEY, mesh=make_mesh("fsdp=4,tensor=2"), rules=preset("fsdp_tp")
    )
    assert jax.tree.structure(made) == jax.tree.structure(layout.abstract)
    assert made.params["w"].sharding.spec == P("fsdp", "tensor")
