"""Constraints on eight devices: auto, explicit and manual axes, every scope, every transform."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import (
    AxisConflictError,
    AxisRules,
    IndivisibleDimError,
    InvalidRuleError,
    LayoutError,
    LogicallyPartitioned,
    NamesRankError,
    NoRulesWarning,
    Partitioned,
    TreeMismatchError,
    UnknownAxisError,
    UnknownNameError,
    at_use,
    constrain,
    default_names,
    logical_axis_rules,
    make_mesh,
    preset,
    use,
    with_logical_constraint,
)
from shardflax.partitioning.at_use import used_spec
from shardflax.partitioning.constraints import wanted_spec

STRICT = preset("fsdp_tp")
NAMES = ("batch", "act_mlp")
TYPES: list[Any] = ["auto", "explicit", {"tensor": "explicit"}, {"fsdp": "explicit"}]


def spec(x: jax.Array) -> tuple[Any, ...]:
    """The spec of a concrete array, without None at the end."""
    parts = list(x.sharding.spec)  # pyright: ignore[reportAttributeAccessIssue]
    while parts and parts[-1] is None:
        parts.pop()
    return tuple(parts)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_every_axis_type(types: Any, jit: bool) -> None:
    mesh = make_mesh("fsdp=4,tensor=2", axis_types=types)
    x = np.arange(64.0, dtype="float32").reshape(8, 8)

    def fn(x: jax.Array) -> jax.Array:
        return constrain(x, NAMES)

    with use(mesh, STRICT):
        y = (jax.jit(fn) if jit else fn)(jnp.asarray(x))
    assert spec(y) == ("fsdp", "tensor")
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("types", ["auto", "explicit"])
@pytest.mark.parametrize("jit", [False, True])
def test_mesh_argument_without_a_scope(types: Any, jit: bool) -> None:
    mesh = make_mesh("fsdp=4,tensor=2", axis_types=types)

    def fn(x: jax.Array) -> jax.Array:
        return with_logical_constraint(x, NAMES, STRICT, mesh)

    if jit and types == "explicit":  # JAX wants the mesh in scope, and says so
        with pytest.raises(ValueError, match=r"jax.set_mesh"):
            jax.jit(fn)(jnp.ones((8, 8)))
        with jax.set_mesh(mesh):
            assert spec(jax.jit(fn)(jnp.ones((8, 8)))) == ("fsdp", "tensor")
    else:
        assert spec((jax.jit(fn) if jit else fn)(jnp.ones((8, 8)))) == ("fsdp", "tensor")


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_transforms(types: Any) -> None:
    """Under vmap, scan, grad and remat inside jit, constraints hold and numbers stay."""
    mesh = make_mesh("fsdp=4,tensor=2", axis_types=types)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8))

    def layer(x: jax.Array) -> jax.Array:
        return jnp.sin(constrain(x * 2, NAMES))

    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, v: (constrain(c + layer(v), NAMES), c), layer(x[0]), x)[0]

    def run() -> list[Any]:
        return [
            jax.jit(jax.vmap(layer))(x),
            jax.jit(scanned)(x),
            jax.jit(jax.grad(lambda x: jax.checkpoint(scanned)(x).sum()))(x),
        ]

    expected = [np.asarray(y) for y in _plain(run)]
    with use(mesh, STRICT):
        got = run()
    assert spec(got[0]) == (None, "fsdp", "tensor")
    assert spec(got[1]) == ("fsdp", "tensor")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def _plain(run: Any) -> Any:
    """The same with no rules, said."""
    with logical_axis_rules(()):
        return run()


def test_manual_axes_are_left_alone_and_the_others_are_not() -> None:
    """Inside `shard_map` over `fsdp` the local array has no `fsdp`; `tensor` still applies."""
    mesh = make_mesh("fsdp=4,tensor=2")
    seen: list[Any] = []

    def body(x: jax.Array) -> jax.Array:
        assert x.shape == (2, 6)
        y = constrain(x, NAMES)
        seen.append(jax.make_jaxpr(lambda x: constrain(x, NAMES))(x).eqns[0].params["sharding"])
        return with_logical_constraint(y, NAMES, STRICT, mesh)

    def whole(x: jax.Array) -> jax.Array:
        assert str(jax.make_jaxpr(lambda x: constrain(x, NAMES))(x).eqns) == "[]"
        return constrain(x, NAMES)

    with use(mesh, STRICT):
        x = jnp.ones((8, 6))
        args: Any = {"in_specs": P("fsdp"), "out_specs": P("fsdp")}
        y = jax.jit(jax.shard_map(body, axis_names={"fsdp"}, **args))(x)
        jax.jit(jax.shard_map(whole, mesh=mesh, **args))(x)
    assert [s.spec for s in seen] == [P(None, "tensor")]
    assert spec(y) == ("fsdp", "tensor")


def test_a_constraint_follows_its_mesh_on_another_backend() -> None:
    """Lowered for TPU on a CPU host, every constraint is in the program."""
    mesh = make_mesh("fsdp=4,tensor=2")
    with use(mesh, STRICT):
        traced = jax.jit(lambda x: constrain(x, NAMES)).trace(jnp.ones((8, 8)))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert '"fsdp"' in text and '"tensor"' in text


def test_abstract_mesh() -> None:
    mesh = make_mesh("fsdp=4,tensor=2").abstract_mesh
    with use(mesh, STRICT):
        jaxpr = jax.make_jaxpr(lambda x: constrain(x, NAMES))(jnp.ones((8, 8)))
    assert jaxpr.eqns[0].params["sharding"].spec == P("fsdp", "tensor")


def test_use_inside_jit() -> None:
    mesh = make_mesh("fsdp=4,tensor=2")

    def fn(x: jax.Array) -> jax.Array:
        with use(mesh, STRICT):
            return constrain(x, NAMES)

    assert spec(jax.jit(fn)(jnp.ones((8, 8)))) == ("fsdp", "tensor")
    with use(mesh, STRICT):
        assert spec(jax.jit(fn)(jnp.ones((8, 8)))) == ("fsdp", "tensor")


def test_default_names_by_rank_and_rules() -> None:
    names = default_names("batch", ..., "act_mlp")
    mesh = make_mesh("data=2,context=2,tensor=2")
    rules = preset("default")
    with use(mesh, rules):
        assert spec(constrain(jnp.ones((2, 4)), names)) == ("data", "tensor")
        assert spec(constrain(jnp.ones((2, 2, 4)), names)) == ("data", "context", "tensor")
        for shape in ((4,), (2, 2, 2, 4)):
            x = jnp.ones(shape)
            assert constrain(x, names) is x
    with use(mesh, [("batch", "data")]):
        x = jnp.ones((2, 4))
        assert constrain(x, names) is x
        assert spec(constrain(x, ("batch", "act_mlp"))) == ("data",)
    assert constrain(x, names) is x and constrain(x, None) is x


def test_trees_of_arrays_and_of_names() -> None:
    mesh = make_mesh("fsdp=4,tensor=2")
    tree = {"a": jnp.ones((8, 8)), "b": [jnp.ones((4, 2))]}
    with use(mesh, STRICT):
        for names in (NAMES, {"a": NAMES, "b": [NAMES]}, {"a": NAMES, "b": NAMES}):
            out = with_logical_constraint(tree, names)
            assert spec(out["a"]) == spec(out["b"][0]) == ("fsdp", "tensor")
        out = with_logical_constraint(tree, {"a": None, "b": [P("batch", None)]})
        assert out["a"] is tree["a"] and spec(out["b"][0]) == ("fsdp",)


def test_in_a_tree_errors_say_which_leaf() -> None:
    tree = {"a": jnp.ones((8, 8)), "b": [jnp.ones((4, 2)), jnp.ones(3)]}
    with logical_axis_rules(STRICT):
        with pytest.raises(NamesRankError, match=r"b/1: .*2 names"):
            with_logical_constraint(tree, NAMES)
        with pytest.raises(UnknownNameError, match=r"a: .*no rule for the name 'x'"):
            with_logical_constraint(tree, {"a": ("x", None), "b": None})
        with pytest.raises(TreeMismatchError, match="b/0: the names say nothing of this leaf"):
            with_logical_constraint(tree, {"a": NAMES})
        with pytest.raises(TreeMismatchError, match="c: the names have a leaf there"):
            with_logical_constraint(tree["a"], {"c": NAMES})


def test_names_and_rank_are_checked_without_a_mesh() -> None:
    x = jnp.ones((8, 8))
    with logical_axis_rules(STRICT):
        with pytest.raises(UnknownNameError, match="did you mean 'act_mlp'"):
            constrain(x, ("batch", "act_mpl"))
        with pytest.raises(NamesRankError, match="1 names"):
            constrain(x, ("batch",))
        assert constrain(x, NAMES) is x
    with pytest.raises(NamesRankError, match="3 names"):
        with_logical_constraint(x, ("a", "b", "c"), [("a", "data")])


def test_sizes_are_checked_with_a_mesh() -> None:
    with (
        use(make_mesh("fsdp=4,tensor=2"), STRICT),
        pytest.raises(IndivisibleDimError, match=r"dim 1 'act_mlp' of size 17 .* Make it 18"),
    ):
        constrain(jnp.ones((8, 17)), NAMES)


def test_plain_pairs_name_what_jax_would_not() -> None:
    mesh = make_mesh("data=4,model=2")
    rules = [("batch", "data"), ("mlp", "modle")]
    with pytest.raises(UnknownAxisError, match=r"'modle', which the mesh lacks.*'model'"):
        with_logical_constraint(jnp.ones((8, 8)), ("batch", "mlp"), rules, mesh)
    with pytest.raises(IndivisibleDimError, match=r"names \('batch', None\): dim 0 of size 5"):
        with_logical_constraint(jnp.ones((5, 8)), ("batch", None), rules, mesh)
    with pytest.raises(IndivisibleDimError, match=r"names \(None, 'model'\): dim 1 of size 17"):
        Partitioned(jnp.ones((4, 17)), (None, "model"), mesh).unbox()


def test_boxes_on_every_axis_type() -> None:
    for types in TYPES:
        with use(make_mesh("fsdp=4,tensor=2", axis_types=types), STRICT):
            box: Any = Partitioned(jnp.ones((8, 8)), ("fsdp", "tensor"))
            assert spec(box.unbox()) == ("fsdp", "tensor")
            box = LogicallyPartitioned(jnp.ones((8, 8)), ("embed", "mlp"))
            assert spec(jax.jit(lambda b: b.unbox())(box)) == ("fsdp", "tensor")
            assert box.unbox(apply_constraint=False) is box.value


def test_unconstrained_dims() -> None:
    for types in ("auto", "explicit"):
        with use(make_mesh("fsdp=4,tensor=2", axis_types=types), STRICT):
            x = constrain(jnp.ones((8, 8)), (None, "act_mlp"))
            y = constrain(x, ("batch", P.UNCONSTRAINED))
            assert spec(y)[0] == "fsdp"
            if types == "explicit":
                assert spec(y) == ("fsdp", "tensor")


def test_no_rules_warns_once_and_names_the_call() -> None:
    def call() -> Any:
        return with_logical_constraint(jnp.ones((2, 3)), ("batch", "mlp"))

    with pytest.warns(NoRulesWarning, match=r"\('batch', 'mlp'\) at .*constraints.py:\d+") as got:
        assert call().shape == (2, 3)
        call()
    assert len(got) == 1
    with logical_axis_rules(()):
        with_logical_constraint(jnp.ones((2, 3)), ("batch", "mlp"))
        constrain(jnp.ones((2, 3)), ("batch", "mlp"))
    with pytest.warns(NoRulesWarning, match="does nothing"):
        constrain(jnp.ones((2, 3)), ("batch", "mlp"))


def test_rules_are_checked_against_the_mesh_in_scope() -> None:
    with (
        pytest.raises(UnknownAxisError, match=r"'model' \(size 2\): did you mean 'tensor'"),
        use(make_mesh("data=4,model=2"), STRICT),
    ):
        raise AssertionError("not reached")
    with (
        pytest.raises(LayoutError, match="names the axis 'cols'"),
        use(make_mesh("rows=8"), AxisRules({"batch": "rows cols"})),
    ):
        raise AssertionError("not reached")


def test_rules_and_mesh_that_came_into_scope_apart_are_checked_too() -> None:
    with (
        jax.set_mesh(make_mesh("data=4,model=2")),
        logical_axis_rules(STRICT),
        pytest.raises(UnknownAxisError, match=r"'model' \(size 2\): did you mean 'tensor'"),
    ):
        constrain(jnp.ones((8, 8)), NAMES)


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_an_axis_that_a_vmap_around_has_taken(types: str) -> None:
    """JAX's errors here name a spec that nobody wrote."""
    with use(make_mesh("fsdp=4,tensor=2", axis_types=types), STRICT):
        x = jax.device_put(jnp.ones((4, 8, 8)), P("fsdp"))
        mapped = jax.vmap(lambda x: constrain(x, NAMES), spmd_axis_name="fsdp")
        with pytest.raises(AxisConflictError, match=r"names \('batch', 'act_mlp'\).*vmap around"):
            jax.jit(mapped)(x)
        y = jax.jit(jax.vmap(lambda x: constrain(x, (None, "act_mlp")), spmd_axis_name="fsdp"))(x)
    assert spec(y) == ("fsdp", None, "tensor")


def test_an_array_on_explicit_axes_has_a_mesh_where_none_is_in_scope() -> None:
    mesh = make_mesh("fsdp=4,tensor=2", axis_types="explicit")
    x = jax.device_put(jnp.ones((8, 8)), jax.NamedSharding(mesh, P("fsdp", None)))
    with logical_axis_rules(STRICT):
        assert spec(jax.jit(lambda x: constrain(x * 2, NAMES))(x)) == ("fsdp", "tensor")
        with pytest.raises(IndivisibleDimError, match="of size 7"):
            jax.eval_shape(lambda x: constrain(x[:, :7], NAMES), x)


def test_the_mesh_argument_counts_and_not_one_that_looks_alike() -> None:
    """Equal axes, other devices: JAX is asked for the mesh that was given, and refuses."""
    devices = jax.devices()
    mine, scope = (make_mesh("data=4", part) for part in (devices[4:], devices[:4]))
    rules = AxisRules({"batch": "data"})
    with use(scope, rules), pytest.raises(ValueError, match=r"device ids \[4, 5, 6, 7\]"):
        with_logical_constraint(jnp.ones(4), ("batch",), mesh=mine)
    with logical_axis_rules(rules):
        y = with_logical_constraint(jnp.ones(4), ("batch",), mesh=mine)
    assert y.sharding.device_set == set(devices[4:])


def test_activations_follow_the_compute_rules() -> None:
    rules = AxisRules(
        {"batch": "fsdp", "embed": "fsdp"}, compute={"embed": None, "batch": "tensor"}
    )
    x = jnp.ones((8, 8))
    with use(make_mesh("fsdp=4,tensor=2"), rules):
        assert spec(constrain(x, ("batch", None))) == ("tensor",)
        assert wanted_spec((8, 8), ("batch", None)) == P("tensor")
        box: Any = LogicallyPartitioned(x, ("embed", None))
        assert spec(jax.jit(lambda b: b.unbox())(box)) == ("fsdp",)
    with use(make_mesh("fsdp=4,tensor=2"), rules.stored):
        assert spec(constrain(x, ("batch", None))) == ("fsdp",)


def test_weights_at_their_use_follow_the_compute_rules() -> None:
    """Gathered over the axes that compute takes away; `eval` may have another layout."""
    rules = AxisRules(
        {"batch": "data", "embed": "fsdp", "mlp": "tensor"},
        compute={"embed": None},
        eval={"mlp": "fsdp"},
    )
    names = ("embed", "mlp")
    with use(make_mesh("data=2,fsdp=2,tensor=2"), rules):
        weight = jax.device_put(jnp.ones((8, 8)), P("fsdp", "tensor"))
        assert used_spec(weight, names) == P(None, "tensor")
        grad = jax.jit(jax.grad(lambda w: (at_use(w, names) ** 2).sum()))(weight)
        assert spec(at_use(weight, names)) == (None, "tensor")
        assert spec(grad) == ("fsdp", "tensor")
    with use(make_mesh("data=2,fsdp=2,tensor=2"), rules, "eval"):
        assert spec(constrain(jnp.ones((8, 8)), names)) == (None, "fsdp")
        assert used_spec(weight, names) == P(None, "fsdp")
    for wrong in [("optimizer", rules), ("eval", [("embed", "fsdp")])]:
        with pytest.raises(InvalidRuleError, match=f"which='{wrong[0]}'"), use(None, *wrong[::-1]):
            raise AssertionError("not reached")
    small = rules.with_min_size(65)
    with use(make_mesh("data=2,fsdp=2,tensor=2"), small):
        assert used_spec(weight, names) is None


def test_one_device_needs_no_lowering() -> None:
    with use(make_mesh("data=1", jax.devices()[:1]), STRICT):
        x = jnp.ones((3, 5))
        assert constrain(x, NAMES) is x


def test_constraints_add_nothing_to_a_program_where_they_say_what_is_so() -> None:
    """A step with constraints compiles to the same flops and no more collectives."""
    mesh = make_mesh("fsdp=4,tensor=2")
    x = jax.device_put(jnp.ones((8, 8)), jax.NamedSharding(mesh, P("fsdp", "tensor")))

    def count(fn: Any) -> Any:
        text: Any = jax.jit(fn).lower(x).compile().as_text()
        return [line.split("=")[1] for line in text.splitlines() if " = " in line].__len__()

    with use(mesh, STRICT):
        assert count(lambda x: constrain(jnp.sin(x), NAMES)) == count(jnp.sin)
