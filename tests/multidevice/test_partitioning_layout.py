"""Layouts of train states: every optimizer leaf named after its parameter, and what is refused."""

from __future__ import annotations

import dataclasses
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from shardflax.core.boxes import unbox
from shardflax.partitioning import (
    AxisRules,
    Layout,
    LayoutError,
    LogicallyPartitioned,
    Partitioned,
    UnknownNameError,
    make_mesh,
    preset,
)

MESH = make_mesh("fsdp=4,tensor=2")
STRICT = preset("fsdp_tp")


def params(embed: int = 128, mlp: int = 256) -> Any:
    """Boxed shapes: a kernel, its stacked likeness, a square one, and a scale."""

    def box(names: tuple[Any, ...], *shape: int) -> LogicallyPartitioned:
        return LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    return {
        "a": {"kernel": box(("embed", "mlp"), embed, mlp)},
        "b": {"a": {"kernel": box(("layers", "embed", "mlp"), 3, embed, mlp)}},
        "square": box(("embed", "mlp"), embed, embed),
        "scale": box(("norm",), embed),
    }


SPECS = {
    "a/kernel": P("fsdp", "tensor"),
    "b/a/kernel": P(None, "fsdp", "tensor"),
    "square": P("fsdp", "tensor"),
    "scale": P(),
}


def state_of(tx: optax.GradientTransformation, boxed_init: bool) -> Any:
    """A train state of shapes, the optimizer's part from boxed or from plain parameters."""
    boxed = params()
    plain = jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda b: isinstance(b, Partitioned))
    opt_state = jax.eval_shape(tx.init, boxed if boxed_init else plain)
    return {"params": boxed, "opt_state": opt_state, "step": jax.ShapeDtypeStruct((), jnp.int32)}


def ending(layout: Layout, part: str) -> dict[str, P]:
    """The specs of the leaves whose path has `part`, keyed by what comes after it."""
    marked = {leaf.where: leaf.spec for leaf in layout.leaves if f"/{part}/" in leaf.where}
    return {where.split(f"/{part}/")[-1]: spec for where, spec in marked.items()}


SAME = {
    "adamw": (lambda: optax.adamw(1e-3), ("mu", "nu")),
    "sgd": (lambda: optax.sgd(0.1, momentum=0.9), ("trace",)),
    "chain": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(1))),
        ("mu", "nu"),
    ),
    "MultiSteps": (
        lambda: optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
        ("mu", "nu", "acc_grads"),
    ),
    "inject": (lambda: optax.inject_hyperparams(optax.adamw)(1e-3), ("mu", "nu")),
    "ema": (lambda: optax.ema(0.9), ("ema",)),
    "lion": (lambda: optax.lion(1e-3), ("mu",)),
    "amsgrad": (lambda: optax.amsgrad(1e-3), ("mu", "nu", "nu_max")),
}


@pytest.mark.parametrize("boxed_init", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_moments_lie_as_their_parameters(name: str, boxed_init: bool) -> None:
    make, parts = SAME[name]
    layout = Layout(state_of(make(), boxed_init), MESH, STRICT)
    assert layout.problems == () and layout.unnamed == ()
    for part in parts:
        assert ending(layout, part) == SPECS, part
    assert layout.specs["step"] == P()


@pytest.mark.parametrize("boxed_init", [False, True])
def test_adafactors_factored_moments_drop_the_reduced_dim(boxed_init: bool) -> None:
    layout = Layout(state_of(optax.adafactor(1e-3), boxed_init), MESH, STRICT)
    assert layout.problems == () and layout.unnamed == ()
    assert ending(layout, "v_row") == {
        "a/kernel": P("fsdp"),
        "b/a/kernel": P(None, "fsdp"),
        "square": P("fsdp"),
        "scale": P(),
    }
    assert ending(layout, "v_col") == {
        "a/kernel": P("tensor"),
        "b/a/kernel": P(None, "tensor"),
        "square": P("tensor"),
        "scale": P(),
    }
    leaf = layout.leaf("opt_state/0/v_row/a/kernel")
    assert (leaf.names, leaf.origin) == (("embed",), "its parameter, factored")
    assert layout.leaf("opt_state/0/v/a/kernel").origin == "a single number"


def test_masked_and_partitioned_optimizers() -> None:
    kernels = {"a": {"kernel": True}, "b": {"a": {"kernel": True}}, "square": True, "scale": False}
    labels = jax.tree.map(lambda m: "adam" if m else "sgd", kernels)
    masked = optax.masked(optax.adam(1e-3), kernels)
    split = optax.multi_transform({"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}, labels)
    for tx in (masked, split):
        layout = Layout(state_of(tx, boxed_init=False), MESH, STRICT)
        assert layout.problems == () and layout.unnamed == ()
        assert ending(layout, "mu") == {k: v for k, v in SPECS.items() if k != "scale"}


def test_dims_reduced_to_1() -> None:
    state = {"params": params(), "rms": {"square": jnp.ones((128, 1))}}
    layout = Layout(state, MESH, STRICT)
    assert layout.names["rms"]["square"] == ("embed", None)


def test_shapes_that_do_not_follow_are_reported() -> None:
    state = {"params": params(), "odd": {"a": {"kernel": jnp.ones((7, 7))}}}
    layout = Layout(state, MESH, STRICT)
    assert layout.unnamed == ("odd/a/kernel",)
    assert layout.leaf("odd/a/kernel").origin.startswith("a shape that does not follow")


def test_lists_for_each_parameter() -> None:
    """SM3 keeps a list of vectors for each parameter, one for each dim."""
    layout = Layout(state_of(optax.sm3(1e-3), boxed_init=False), MESH, STRICT)
    assert layout.problems == ()
    found = ending(layout, "mu")
    assert found["a/kernel/0"] == P("fsdp") and found["a/kernel/1"] == P("tensor")
    assert found["square/0"] == P("fsdp") and found["square/1"] == P("tensor")


def test_a_history_has_dims_in_front() -> None:
    layout = Layout(state_of(optax.lbfgs(memory_size=4), boxed_init=False), MESH, STRICT)
    found = ending(layout, "diff_params_memory")
    assert found == {k: P(None, *v) if v else P() for k, v in SPECS.items()}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Custom:
    weights: Any
    moments: Any


def test_states_of_every_kind() -> None:
    boxed = params()
    moments = jax.eval_shape(optax.adam(1e-3).init, unbox(boxed))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    for state in (
        State(step, boxed, moments),
        State(
            step, {"params": boxed}, jax.eval_shape(optax.adam(1).init, {"params": unbox(boxed)})
        ),
        (boxed, moments),
        Custom(boxed, moments),
    ):
        layout = Layout(state, MESH, STRICT)
        assert layout.unnamed == (), type(state)
        assert {k.removeprefix("params/"): v for k, v in ending(layout, "mu").items()} == SPECS
    other = {"model": boxed, "opt": moments}
    assert Layout(other, MESH, STRICT, parameters=("model",)).unnamed == ()
    unnamed = Layout(other, MESH, STRICT).unnamed
    assert len(unnamed) == 8 and unnamed[0] == "opt/0/mu/a/kernel"


def test_averages_and_unrelated_leaves() -> None:
    state = {
        "params": params(),
        "ema_params": unbox(params()),
        "batch_stats": {"norm": {"mean": jnp.ones(128), "count": jnp.ones(())}},
    }
    layout = Layout(state, MESH, STRICT)
    assert layout.unnamed == ("batch_stats/norm/mean",)
    assert layout.specs["ema_params"]["a"]["kernel"] == P("fsdp", "tensor")
    assert "replicated, for nothing names them: batch_stats/norm/mean" in str(layout)


def test_trees_of_the_layout_fit_the_state() -> None:
    state = state_of(optax.adamw(1e-3), boxed_init=False)
    layout = Layout(state, MESH, STRICT)
    plain = unbox(state)
    structure = jax.tree.structure(plain)
    assert jax.tree.structure(layout.shardings) == structure
    assert jax.tree.structure(layout.abstract) == structure
    assert layout.abstract["params"]["scale"].sharding == layout.shardings["params"]["scale"]
    assert layout.names["params"]["a"]["kernel"] == ("embed", "mlp")
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plain))
    kernels = 3 * 4 * (128 * 256 * 4 + 128 * 128)
    assert layout.bytes_per_device == whole - kernels + kernels // 8
    placed = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), layout.abstract)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert held == layout.bytes_per_device


def test_random_keys_have_a_size() -> None:
    state = {
        "params": params(),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0)),
    }
    layout = Layout(state, MESH, STRICT)
    assert layout.leaf("key").bytes_per_device == 8
    assert layout.leaf("keys").bytes_per_device == 16


def test_all_bad_parameters_in_one_error() -> None:
    state = {
        "params": {
            "a": LogicallyPartitioned(jnp.ones((8, 17)), ("embed", "mlp")),
            "b": LogicallyPartitioned(jnp.ones((8, 8)), ("emebd", "mlp")),
            "c": LogicallyPartitioned(jnp.ones((8, 8)), ("mlp",)),
            "d": LogicallyPartitioned(jnp.ones((8, 8)), ("heads", "mlp")),
            "e": Partitioned(jnp.ones((8, 8)), ("fspd", None)),
            "ok": LogicallyPartitioned(jnp.ones((8, 8)), ("embed", "mlp")),
        }
    }
    layout = Layout(state, MESH, STRICT)
    assert [p.where.split(",")[0] for p in layout.problems] == [f"params/{k}" for k in "abcde"]
    with pytest.raises(LayoutError) as error:
        layout.check()
    for text in (
        "5 problems in this layout",
        "params/a, shape (8, 17): dim 1 'mlp' of size 17",
        "not divisible by 2 (tensor=2; rule 'mlp': 'tensor')",
        "params/b, shape (8, 8): no rule for the name 'emebd'",
        "params/c, shape (8, 8): 1 names ('mlp',) for an array of rank 2",
        "params/d, shape (8, 8): dims 0 'heads' and 1 'mlp'",
        "params/e, shape (8, 8): names ('fspd', None): dim 0 names the axis 'fspd'",
    ):
        assert text in str(error.value)
    assert layout.specs["params"]["a"] == P()


def test_one_cause_raises_its_own_class() -> None:
    state = {k: LogicallyPartitioned(jnp.ones(8), ("emebd",)) for k in "ab"}
    with pytest.raises(UnknownNameError, match="2 problems"):
        Layout(state, MESH, STRICT).check()


def test_plain_pairs_and_mesh_names() -> None:
    state = {
        "params": {
            "a": LogicallyPartitioned(jnp.ones((8, 8)), ("embed", "zzz")),
            "b": Partitioned(jnp.ones((8, 8)), (("fsdp", "tensor"), None)),
            "c": LogicallyPartitioned(jnp.ones((8,)), ("x",), rules=(("x", "tensor"),)),
        },
        "mu": {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones(8)},
    }
    layout = Layout(state, MESH, [("embed", "fsdp")])
    expected = {"a": P("fsdp"), "b": P(("fsdp", "tensor")), "c": P("tensor")}
    assert layout.problems == ()
    assert layout.specs == {"params": expected, "mu": expected}
    bad = Layout(
        {"w": LogicallyPartitioned(jnp.ones((17,)), ("embed",))}, MESH, [("embed", "fsdp")]
    )
    assert "w, shape (17,): names ('embed',): dim 0 of size 17" in str(bad.problems[0])


def test_report_lists_what_nothing_used() -> None:
    rules = AxisRules({"embed": "fsdp", "mlp": None, "stale": "fsdp"})
    layout = Layout({"w": LogicallyPartitioned(jnp.ones((8, 8)), ("embed", "mlp"))}, MESH, rules)
    assert (layout.unused_rules, layout.unused_axes) == (("stale",), ("tensor",))
    text = str(layout)
    assert "rules that nothing used: stale" in text and "axes that nothing used: tensor" in text
    assert "w     (8, 8)  float32" in text and "(embed, mlp)" in text and "64 B" in text
    console = Console(file=io.StringIO(), width=100)
    console.print(layout)
    assert "(embed, mlp)" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(layout) == "<Layout of 1 leaves on fsdp=4,tensor=2, 64 bytes>"
    with pytest.raises(LayoutError, match="no leaf at 'v'"):
        layout.leaf("v")


def test_abstract_mesh_makes_a_layout() -> None:
    layout = Layout({"params": params()}, MESH.abstract_mesh, STRICT)
    assert ending(layout, "a") == {"kernel": SPECS["b/a/kernel"]}
