"""Linen's contract, against Linen: the same answers for plain pairs, boxes and specs."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import spmd
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardflax import partitioning as ours
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.vocabulary import tie_rank
from tests.core.harness import quick_key

linen: Any = flax.linen
NAMES = ("batch", "embed", "mlp", "heads", "zzz")
AXES = ("data", "model", "x")

# Drawn whole from lists, which takes a fraction of the time of drawing each axis by itself.
SEVERAL = [each for count in range(4) for each in itertools.product(AXES, repeat=count)]
ONE_RULE = [
    (name, axes)
    for name in NAMES
    for axes in (None, *AXES, *SEVERAL, *(list(axes) for axes in SEVERAL if len(axes) < 3))
]
pairs = st.lists(st.sampled_from(ONE_RULE), max_size=7)
name = st.sampled_from([None, *NAMES, *NAMES, P.UNCONSTRAINED, *itertools.product(AXES, AXES)])
names = st.lists(name, max_size=5).map(tuple)


def outcome(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """What a call gives, or that it raises a ValueError."""
    try:
        return fn(*args, **kwargs)
    except ValueError:
        return ValueError


@given(names, pairs)
@settings(max_examples=400)
def test_logical_to_mesh_axes_equals_linens(names: Any, rules: Any) -> None:
    expected = outcome(linen.logical_to_mesh_axes, names, rules)
    assert outcome(ours.logical_to_mesh_axes, names, rules) == expected
    with ours.logical_axis_rules(rules):
        assert outcome(ours.logical_to_mesh_axes, names) == expected


strict_rules = st.tuples(
    *[st.sampled_from(["", "data", "model", "x?", "data x", "x data?", "model? x", "x model data"])]
    * len(NAMES)
).map(lambda axes: ours.AxisRules(zip(NAMES, axes, strict=True)))
strict_names = st.lists(st.sampled_from(NAMES), max_size=4, unique=True).flatmap(
    lambda some: st.permutations([*some, None])
)


@given(strict_names, strict_rules)
@settings(max_examples=100)
def test_strict_rules_equal_linens_where_nothing_is_wrong(names: Any, rules: Any) -> None:
    """Where no axis is claimed twice, nothing yields and nothing is refused: all is as in Linen.

    With no mesh, and on one whose axes divide every dim.
    """
    found = ours.resolve(tuple(names), rules)
    assume(not found.problems and not any(dim.given_up for dim in found.dims))
    mesh = (("data", 2), ("model", 4), ("x", 3))
    placed = ours.resolve(tuple(names), rules, (24,) * len(names), mesh)
    assert (placed.problems, placed.spec) == ((), found.spec)
    bare = [(name, tuple(axis.rstrip("?") for axis in axes)) for name, axes in rules]
    theirs = linen.logical_to_mesh_axes(names, bare)
    assert [spec_axes(part) for part in theirs] == [dim.taken for dim in found.dims]


one_axis = st.tuples(*[st.sampled_from(["", "data", "model", "data?", "model?"])] * len(NAMES)).map(
    lambda axes: ours.AxisRules(zip(NAMES, axes, strict=True))
)


@given(strict_names, one_axis)
@settings(max_examples=100)
def test_what_yields_is_linens_answer_to_the_order_written_out(names: Any, rules: Any) -> None:
    """Rules of one axis, those that must not yield first, the others by rank and by dim."""
    found = ours.resolve(tuple(names), rules)
    assume(not found.problems)

    def order(rule: Any) -> Any:
        name, axes = rule
        yields = bool(axes) and axes[0].endswith("?")
        return yields, tie_rank(name), names.index(name) if name in names else 0

    written = [
        (name, [axis.rstrip("?") for axis in axes]) for name, axes in sorted(rules, key=order)
    ]
    theirs = linen.logical_to_mesh_axes(names, written)
    assert [spec_axes(part) for part in theirs] == [dim.taken for dim in found.dims]


@pytest.mark.parametrize("names", [None, (), (None,), ("batch", "batch"), ("embed", "embed")])
def test_logical_to_mesh_axes_corner_cases(names: Any) -> None:
    rules = [("batch", "data"), ("embed", None)]
    expected = outcome(linen.logical_to_mesh_axes, names, rules)
    assert outcome(ours.logical_to_mesh_axes, names, rules) == expected


def test_trees_of_logical_specs() -> None:
    rules = [("batch", "data"), ("mlp", "model")]
    mesh = ours.make_mesh("data=4,model=2")
    tree = {"a": P("batch", "mlp"), "b": [P(None, "zzz"), P()], "c": None}
    assert ours.logical_to_mesh(tree, rules) == linen.logical_to_mesh(tree, rules)
    mine = ours.logical_to_mesh_sharding(tree, mesh, rules)
    assert mine == linen.logical_to_mesh_sharding(tree, mesh, rules)


BOXES = [("Partitioned", ("data", "model")), ("LogicallyPartitioned", ("batch", "mlp"))]


@pytest.mark.parametrize(("kind", "names"), BOXES)
def test_boxes_look_alike(kind: str, names: Any) -> None:
    """Fields, repr, leaves, paths and specs of a box equal Linen's."""
    value = np.ones((4, 2), "float32")
    mine, theirs = getattr(ours, kind)(value, names), getattr(linen, kind)(value, names)
    assert repr(mine) == repr(theirs)
    assert mine.get_partition_spec() == theirs.get_partition_spec()
    paths = [jax.tree_util.tree_flatten_with_path(box)[0][0][0] for box in (mine, theirs)]
    assert paths[0] == paths[1]
    assert hash(jax.tree.structure(mine)) == hash(jax.tree.structure(mine))
    assert mine.replace(value=1).value == 1
    assert mine.replace_boxed(1) == mine.replace(value=1)
    tree = [{"a": mine, "b": value, "c": 3}, {"a": theirs, "b": value, "c": 3}]
    assert ours.get_partition_spec(tree[0]) == linen.get_partition_spec(tree[1])


@pytest.mark.parametrize(("kind", "names"), BOXES)
@pytest.mark.parametrize("index", [0, 1, 2, 4])
@pytest.mark.parametrize("axis", ["layers", None])
def test_added_axes_equal_linens(kind: str, names: Any, index: int, axis: Any) -> None:
    params = {"partition_name": axis, "other": 1}
    mine = getattr(ours, kind)(1.0, names).add_axis(index, params)
    theirs = getattr(linen, kind)(1.0, names).add_axis(index, params)
    assert mine.names == theirs.names
    assert mine.remove_axis(index, params).names == theirs.remove_axis(index, params).names


def test_get_sharding_equals_linens() -> None:
    mesh = ours.make_mesh("data=4,model=2")
    trees = [{"a": lib.Partitioned(1.0, ("data", None)), "b": jnp.ones(3)} for lib in (ours, linen)]
    assert ours.get_sharding(trees[0], mesh) == linen.get_sharding(trees[1], mesh)


RULES = [("batch", "data"), ("mlp", "model"), ("embed", None)]


def sharding(x: jax.Array) -> Any:
    return x.sharding.spec if isinstance(x.sharding, NamedSharding) else "not constrained"


def in_scope(where: str, mesh: Mesh) -> Any:
    return jax.set_mesh(mesh) if where == "scope" else contextlib.nullcontext()


def constrained(fn: Any, jit: bool) -> list[Any]:
    """The constraints that a function of an array puts on it; those of a trace, if jitted."""
    if jit:
        eqns = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((8, 6), jnp.float32)).eqns
        found = [e.params["sharding"] for e in eqns if e.primitive.name == "sharding_constraint"]
    else:
        found = [fn(jnp.ones((8, 6))).sharding]
    # A spec may leave out the None at its end.
    return [(*s.spec, None, None)[:2] for s in found if isinstance(s, NamedSharding)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("given_mesh", ["none", "argument", "scope"])
@pytest.mark.filterwarnings("ignore::shardflax.partitioning.NoRulesWarning")
def test_with_logical_constraint_equals_linens(jit: bool, given_mesh: str) -> None:
    mesh = ours.make_mesh("data=4,model=2")

    def run(lib: Any, fallbacks: Any, rules: str, fallback: str, names: Any) -> Any:
        def fn(x: jax.Array) -> jax.Array:
            return lib.with_logical_constraint(
                x,
                names,
                RULES if rules == "argument" else None,
                mesh if given_mesh == "argument" else None,
                fallbacks[fallback],
            )

        with lib.logical_axis_rules(RULES if rules == "scope" else ()):
            return outcome(constrained, fn, jit)

    found: list[Any] = []
    with in_scope(given_mesh, mesh):
        for case in itertools.product(
            ("none", "argument", "scope"),
            [one.name for one in ours.RulesFallback],
            [("batch", "mlp"), ("batch", "zzz"), ("batch",), None],
        ):
            mine, theirs = (
                run(ours, ours.RulesFallback, *case),
                run(linen, spmd.RulesFallback, *case),
            )
            assert mine == theirs, case
            found.append(theirs)
    assert ValueError in found
    assert any(one == [("data", "model")] for one in found) == (given_mesh != "none")


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", ["Partitioned", "LogicallyPartitioned"])
def test_unbox_equals_linens(jit: bool, kind: str) -> None:
    mesh = ours.make_mesh("data=4,model=2")

    def run(lib: Any, given_mesh: str, apply_constraint: bool) -> Any:
        def fn(x: jax.Array) -> jax.Array:
            own = mesh if given_mesh == "argument" else None
            if kind == "Partitioned":
                box = lib.Partitioned(x, ("data", "model"), own)
            else:
                box = lib.LogicallyPartitioned(x, ("batch", "mlp"), own, RULES)
            return box.unbox(apply_constraint)

        with in_scope(given_mesh, mesh):
            return constrained(fn, jit)

    for given_mesh in ("none", "argument", "scope"):
        for apply_constraint in (False, True):
            theirs = run(linen, given_mesh, apply_constraint)
            assert run(ours, given_mesh, apply_constraint) == theirs
            assert bool(theirs) == (apply_constraint and given_mesh != "none") or not jit


def test_initializer_wrappers_equal_linens() -> None:
    key = quick_key(3)

    def init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        return jnp.broadcast_to(jax.random.key_data(key)[-1] % 7, shape).astype(dtype)

    for lib in (ours, linen):
        box = lib.with_partitioning(init, (None, "data"))(key, (4, 8), jnp.bfloat16)
        assert repr(box)[:12] == "Partitioned("
        assert box.names == (None, "data")
        np.testing.assert_array_equal(box.value, init(key, (4, 8), jnp.bfloat16))
        box = lib.with_logical_partitioning(init, ("embed", "mlp"), rules=RULES)(key, (4, 8))
        assert box.names == ("embed", "mlp")
        assert dict(box.rules) == dict(RULES)


def test_legacy_mesh_scope_keeps_constraints_that_linen_drops() -> None:
    """Under `with mesh:` Linen drops every constraint without a word; ours hold."""
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def run(lib: Any, jit: bool) -> list[Any]:
        def box(x: jax.Array) -> jax.Array:
            return lib.Partitioned(x, ("data", "model")).unbox()

        def names(x: jax.Array) -> jax.Array:
            return lib.with_logical_constraint(x, ("batch", "mlp"), RULES)

        x = jnp.ones((8, 6))
        return [sharding((jax.jit(fn) if jit else fn)(x)) for fn in (box, names)]

    with pytest.warns(DeprecationWarning, match="with mesh"):
        mesh.__enter__()
    try:
        for jit in (False, True):
            assert run(linen, jit) == ["not constrained"] * 2
            assert run(ours, jit) == [P("data", "model")] * 2
    finally:
        mesh.__exit__(None, None, None)
