"""Layouts of train states: every optimizer leaf named after its parameter, and what is refused."""

from __future__ import annotations

import dataclasses
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from shardflax.partitioning.derive import Parameter, derive

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


def test_which_of_equal_dims_adafactor_reduced() -> None:
    """Asked of optax: gradients that differ along one dim make the moment differ along it."""
    names = ("a", "b", "c", "d")
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    for shape in [(8, 8), (6, 6, 4, 4)]:
        kernel = Parameter(("params", "w"), shape, names[: len(shape)])
        state = tx.init({"w": jnp.zeros(shape)})
        for dim in range(len(shape)):
            along = np.arange(1.0, 1 + shape[dim], dtype="float32")
            grads = np.broadcast_to(
                np.moveaxis(along.reshape(-1, *[1] * (len(shape) - 1)), 0, dim), shape
            )
            after = tx.update({"w": grads}, state, {"w": grads})[1]
            for part in ("v_row", "v_col"):
                moment = np.asarray(getattr(after, part)["w"])
                found = derive(("opt_state", part, "w"), moment.shape, kernel).names
                assert found is not None
                differs = [
                    found[i] for i in range(moment.ndim) if np.ptp(moment, axis=i).max() > 1e-6
                ]
                assert differs == [name for name in found if name == names[dim]], (shape, dim, part)


def test_products_of_one_dim() -> None:
    """Shampoo's: a square matrix for each dim, in a list or by name, behind stacked dims too."""
    kernel = Parameter(("params", "w"), (4, 8), ("embed", "mlp"))
    assert derive(("l", "w"), (4, 4), kernel).names == ("embed", None)
    assert derive(("statistics", "w", 1), (8, 8), kernel).names == ("mlp", None)
    stacked = Parameter(("params", "w"), (3, 4, 8), ("layers", "embed", "mlp"))
    assert derive(("r", "w"), (3, 8, 8), stacked).names == ("layers", "mlp", None)
    square = Parameter(("params", "w"), (2, 4, 4), ("layers", "embed", "mlp"))
    assert derive(("statistics", "w", 0), (3, 3), square).names is None
    cube = Parameter(("params", "w"), (4, 4, 4), ("a", "b", "c"))
    assert derive(("statistics", "w", 2), (4, 4), cube).names == ("c", None)
    assert derive(("l", "w"), (4, 4), cube).names is None


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


def test_what_wraps_the_parameters_is_not_in_the_optimizers_paths() -> None:
    boxed = params()
    moments = jax.eval_shape(optax.adam(1e-3).init, unbox(boxed))
    twice = optax.LookaheadParams(boxed, boxed)
    split = {"params": boxed, "_overwrite_with_gradient": {"scale": jnp.ones(())}}
    for wrapped in (twice, split):
        layout = Layout({"params": wrapped, "opt_state": moments}, MESH, STRICT)
        assert layout.unnamed == ()
        assert ending(layout, "mu") == SPECS


def test_a_few_numbers_need_no_names() -> None:
    state = {
        "params": params(),
        "few": jnp.ones((4, 8)),
        "more": jnp.ones((4, 9)),
        "none": jnp.ones((0, 9)),
    }
    layout = Layout(state, MESH, STRICT)
    assert layout.unnamed == ("more",)
    assert layout.leaf("few").origin == "a few numbers"


def test_names_by_path() -> None:
    """For any leaf by its whole path, for parameters below the root; both before boxes."""
    state = {
        "params": {"a": {"kernel": jnp.ones((8, 16))}, "b": params()["a"]},
        "opt_state": {"mu": {"a": {"kernel": jnp.ones((8, 16))}}, "all": jnp.ones(64)},
        "batch": {"tokens": jnp.ones((8, 128), "int32")},
    }
    rules = STRICT.with_overrides(params={"a/kernel": ("embed", "mlp"), "b/.*": (None, "mlp")})
    names = {"batch/.*": ("batch", "length"), "opt_state/all": (None,)}
    layout = Layout(state, MESH, rules, names=names)
    assert layout.problems == () and layout.unnamed == ()
    assert layout.specs["params"]["a"]["kernel"] == P("fsdp", "tensor")
    assert layout.specs["opt_state"]["mu"]["a"]["kernel"] == P("fsdp", "tensor")
    assert layout.specs["params"]["b"]["kernel"] == P(None, "tensor")
    assert layout.specs["batch"]["tokens"] == P("fsdp")
    wrong = Layout(state, MESH, rules.with_overrides(params={".*/kernel": ("mlp",), "c/.*": ()}))
    texts = [str(problem) for problem in wrong.problems]
    assert any(
        "a/kernel, shape (8, 16): the overrides of params for 'a/kernel' differ" in t for t in texts
    )
    assert any("'c/.*' matches nothing" in t for t in texts)
    assert any(
        "'bach/.*' matches nothing" in str(p)
        for p in Layout(state, MESH, rules, names={"bach/.*": ()}).problems
    )
    pairs = Layout(state, MESH, [("batch", "fsdp")], names={"batch/.*": ("batch", None)})
    assert pairs.specs["batch"]["tokens"] == P("fsdp")


def test_each_kind_of_leaf_has_its_rules() -> None:
    rules = AxisRules(
        {"embed": None, "mlp": "tensor", "layers": None, "norm": None},
        optimizer={"embed": "fsdp"},
        compute={"mlp": "fsdp"},
    )
    state = state_of(optax.adamw(1e-3), boxed_init=False)
    cache = {"keys": LogicallyPartitioned(jnp.ones((4, 8)), ("embed", "mlp"))}
    rank = {"low_rank": {"square": jnp.ones((8, 3, 16))}}  # nothing of its shape follows
    said = {"low_rank/square": ("embed", None, "mlp")}
    layout = Layout(
        state | rank | {"ema": unbox(params()), "cache": cache}, MESH, rules, names=said
    )
    assert layout.problems == () and layout.unnamed == ()
    assert layout.specs["params"]["square"] == P(None, "tensor")
    assert layout.specs["low_rank"]["square"] == P("fsdp", None, "tensor")
    assert layout.specs["opt_state"][0].mu["square"] == P("fsdp", "tensor")
    assert layout.specs["ema"]["square"] == P("fsdp", "tensor")
    assert layout.specs["cache"]["keys"] == P(None, "fsdp")
    kinds = {leaf.where.split("/")[0]: leaf.rule_set for leaf in layout.leaves if leaf.shape}
    assert kinds == {
        "params": "stored",
        "opt_state": "optimizer",
        "low_rank": "optimizer",
        "ema": "optimizer",
        "cache": "compute",
    }


def test_a_threshold() -> None:
    state = {"params": params(16, 32), "cache": LogicallyPartitioned(jnp.ones(16), ("mlp",))}
    layout = Layout(state, MESH, STRICT.with_min_size(512))
    assert layout.specs["params"]["a"]["kernel"] == P("fsdp", "tensor")
    assert layout.specs["params"]["square"] == P() and layout.specs["cache"] == P("tensor")
    square = layout.leaf("params/square")
    assert square.dims[0].given_up == (
        ("fsdp", "below the threshold of 512 elements"),
        *square.dims[0].given_up[1:],
    )
    odd = {"w": LogicallyPartitioned(jnp.ones((3, 5)), ("embed", "mlp"))}
    assert Layout(odd, MESH, STRICT.with_min_size(512)).problems == ()
    assert len(Layout(odd, MESH, STRICT).problems) == 2


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
