"""`reshard`: concrete, traced and abstract arrays, by names and by layouts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import (
    AxisRules,
    IndivisibleDimError,
    Layout,
    LayoutError,
    LogicallyPartitioned,
    MeshScopeError,
    NamesRankError,
    TreeMismatchError,
    UnknownAxisError,
    UnknownNameError,
    logical_axis_rules,
    make_abstract_mesh,
    make_mesh,
    reshard,
    use,
)

RULES = AxisRules({"embed": "fsdp", "mlp": "tensor", "norm": None}, compute={"embed": None})
NAMES = {"w": ("embed", "mlp"), "b": ("mlp",)}
TYPES: list[Any] = ["auto", "explicit", {"tensor": "explicit"}]


def params(kind: Any = jnp) -> dict[str, Any]:
    return {"w": kind.arange(48.0).reshape(8, 6), "b": kind.ones(6)}


def spec(x: Any) -> tuple[Any, ...]:
    parts = list(x.sharding.spec)
    while parts and parts[-1] is None:
        parts.pop()
    return tuple(parts)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_there_and_back(types: Any, jit: bool) -> None:
    """To the layout of the names, to another set of the rules, and whole; the numbers stay."""

    def moves(tree: Any) -> Any:
        there = reshard(tree, NAMES)
        return there, reshard(there, NAMES, RULES.compute), reshard(there, None)

    with use(make_mesh("fsdp=4,tensor=2", axis_types=types), RULES):
        found = (jax.jit(moves) if jit else moves)(params())
    specs = [(spec(tree["w"]), spec(tree["b"])) for tree in found]
    assert specs == [(("fsdp", "tensor"), ("tensor",)), ((None, "tensor"), ("tensor",)), ((), ())]
    for tree in found:
        np.testing.assert_array_equal(tree["w"], params()["w"])


def test_what_can_be_given() -> None:
    """One tuple for all, a prefix, pairs as rules, a mesh argument, NumPy, numbers, no arrays."""
    mesh = make_mesh("fsdp=4,tensor=2")
    pairs = [("embed", "fsdp"), ("mlp", "tensor")]
    tree = reshard({"a": [np.ones((8, 6))], "b": np.ones((4, 2))}, ("embed", "mlp"), pairs, mesh)
    assert spec(tree["a"][0]) == spec(tree["b"]) == ("fsdp", "tensor")
    tree = reshard({"a": [1.0, np.ones(3)], "b": "text"}, {"a": None, "b": None}, RULES, mesh)
    assert tree["b"] == "text" and tree["a"][0].sharding.is_fully_replicated
    one = reshard(np.ones(8), ("embed",), RULES, mesh)
    assert spec(one) == ("fsdp",)
    assert (
        spec(reshard(reshard(np.ones((8, 6)), NAMES["w"], RULES, mesh), (None, None), mesh=mesh))
        == ()
    )
    kept = reshard(
        reshard(np.ones((8, 6)), NAMES["w"], RULES, mesh), (P.UNCONSTRAINED, None), RULES, mesh
    )
    assert spec(kept) == ("fsdp",)
    assert spec(reshard(np.ones((8, 6)), (P.UNCONSTRAINED, "mlp"), RULES, mesh)) == (None, "tensor")


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_what_a_jitted_function_closes_over_moves_in_its_program(types: Any) -> None:
    kept = params()
    with use(make_mesh("fsdp=4,tensor=2", axis_types=types), RULES):
        moved = jax.jit(lambda: reshard(kept, NAMES))()
    assert spec(moved["w"]) == ("fsdp", "tensor")


def test_abstract_arrays_get_a_sharding() -> None:
    shapes = jax.eval_shape(params)
    with use(make_abstract_mesh("fsdp=4,tensor=2"), RULES):
        found = reshard(shapes, NAMES)
    assert found["w"].sharding.spec == P("fsdp", "tensor") and found["w"].shape == (8, 6)


def test_from_one_mesh_to_another() -> None:
    before, after = make_mesh("fsdp=8"), make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    state = reshard(params(), NAMES, RULES, before)
    moved = reshard(state, NAMES, RULES, after)
    assert spec(moved["w"]) == ("fsdp", "tensor") and moved["w"].sharding.mesh == after
    np.testing.assert_array_equal(moved["w"], params()["w"])


def test_donated_buffers_are_given_up() -> None:
    with use(make_mesh("fsdp=4,tensor=2"), RULES):
        state = reshard(params(), None)
        kept = reshard(state, NAMES)
        assert not state["w"].is_deleted()
        moved = reshard(kept, {"w": ("embed", None), "b": None}, donate=True)
        assert kept["w"].is_deleted() and not moved["w"].is_deleted()
        same = reshard(moved, {"w": ("embed", None), "b": None}, donate=True)
        np.testing.assert_array_equal(same["w"], params()["w"])
        for x in (jnp.arange(8.0), jax.device_put(jnp.arange(8.0), jax.devices()[3])):
            whole = reshard(x, None, donate=True)  # one device of the eight has it already
            np.testing.assert_array_equal(whole, np.arange(8.0))
        with pytest.raises(MeshScopeError, match=r"w: .*traced value.*donate_argnums"):
            jax.eval_shape(lambda x: reshard({"w": x}, {"w": None}, donate=True), same["w"])


def test_manual_axes_are_left_alone() -> None:
    mesh = make_mesh("fsdp=4,tensor=2")

    def body(x: jax.Array) -> jax.Array:
        return reshard(x, ("embed", "mlp"))

    with use(mesh, RULES):
        jaxpr = jax.make_jaxpr(
            jax.shard_map(body, in_specs=P("fsdp"), out_specs=P("fsdp"), axis_names={"fsdp"})
        )(jnp.ones((8, 6)))
    inside = next(eqn.params["jaxpr"] for eqn in jaxpr.eqns if "shard_map" in str(eqn.primitive))
    specs = [tuple(e.params["sharding"].spec) for e in inside.eqns if "sharding" in e.params]
    assert specs == [(None, "tensor")]


def test_by_layout() -> None:
    """A state, boxed or not, to the places of a layout; both trees must be the same."""
    mesh = make_mesh("fsdp=4,tensor=2")
    boxed = {"params": {"w": LogicallyPartitioned(jnp.ones((8, 6)), ("embed", "mlp"))}, "n": 1}
    plain = {"params": {"w": jnp.ones((8, 6))}, "n": 1}
    layout = Layout(boxed, mesh, RULES)
    for state in (boxed, plain):
        found = reshard(state, layout)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        assert [spec(x) for x in jax.tree.leaves(found)] == [(), ("fsdp", "tensor")]
    with pytest.raises(TreeMismatchError, match=r"params/w: expected the shape \(8, 6\).*\(8, 5\)"):
        reshard({"params": {"w": jnp.ones((8, 5))}, "n": 1}, layout)
    with pytest.raises(
        TreeMismatchError, match=r"did you mean 'params/v'(.|\n)*params/v: .*nothing"
    ):
        reshard({"params": {"v": jnp.ones((8, 6))}, "n": 1}, layout)
    with pytest.raises(MeshScopeError, match="leave them out"):
        reshard(plain, layout, mesh=mesh)


WRONG: list[Any] = [
    ({"w": ("embed", "mpl"), "b": None}, UnknownNameError, "w: .*'mpl'.*did you mean 'mlp'"),
    ({"w": ("embed",), "b": None}, NamesRankError, r"w: 1 names .* rank 2"),
    ({"w": ("mlp", "embed"), "b": None}, IndivisibleDimError, "w: dim 1 'embed' of size 6"),
    ({"w": ("embed",), "b": ("x",)}, LayoutError, r"2 problems(.|\n)*- b: (.|\n)*- w: 1 names"),
    ({"w": None}, TreeMismatchError, "b: the names say nothing of this leaf. Say None"),
    ({"w": None, "b": None, "bb": None}, TreeMismatchError, "bb: .*none: did you mean 'b'"),
    ([None], TreeMismatchError, "0: the names have a leaf there"),
]


@pytest.mark.parametrize(("names", "error", "text"), WRONG)
@pytest.mark.parametrize("abstract", [False, True])
def test_mistakes_are_named_with_their_path(
    names: Any, error: Any, text: str, abstract: bool
) -> None:
    make = make_abstract_mesh if abstract else make_mesh
    with use(make("fsdp=4,tensor=2"), RULES), pytest.raises(error, match=text):
        reshard(params(np), names)


def test_plain_pairs_and_missing_scopes() -> None:
    mesh = make_mesh("fsdp=4,tensor=2")
    with pytest.raises(UnknownAxisError, match=r"b: .*'tensr', which the mesh lacks"):
        reshard(params(), NAMES, [("mlp", "tensr")], mesh)
    with pytest.raises(NamesRankError, match=r"b: 2 names"):
        reshard(params(), ("mlp", None), [("mlp", "tensor")], mesh)
    with pytest.raises(UnknownNameError, match=r"w: names .* no rules are in scope"):
        reshard(params(), NAMES, mesh=mesh)
    with logical_axis_rules(RULES), pytest.raises(MeshScopeError, match="no mesh is in scope"):
        reshard(params(), NAMES)
    with pytest.raises(UnknownNameError, match="w: "), logical_axis_rules(RULES):
        reshard(params(), {"w": ("x", None), "b": None})
    with pytest.raises(MeshScopeError, match=r"abstract mesh \(fsdp=4, tensor=2\)"):
        reshard(params(), NAMES, RULES, make_abstract_mesh("fsdp=4,tensor=2"))
