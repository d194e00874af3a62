"""Axis metadata through every dim-adding transform and every nesting of two of them."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardflax.core.boxes import is_box
from shardflax.core.transform_errors import TransformAxisError
from shardflax.partitioning import LogicallyPartitioned, Partitioned
from shardflax.partitioning.errors import LayoutError, RepeatedNameError
from tests.core.expressions import Expressions
from tests.core.harness import OURS as nn
from tests.core.harness import quick_key, same, same_arrays

KEY = quick_key(0)
BOXES = {"partitioned": Partitioned, "logical": LogicallyPartitioned}


def boxed(box: Any, names: tuple[str | None, ...]) -> Any:
    def init(key: Any, shape: Any) -> Any:
        return box(jax.random.uniform(key, shape), names=names)

    return init


def lift(nn: Any, kind: str, target: Any, axis: int, name: str, size: int) -> Any:
    """`target`, a class whose call is `(x) -> x`, through a transform."""
    meta = {"partition_name": name}
    options = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
    if kind == "vmap":
        return nn.vmap(target, in_axes=None, axis_size=size, metadata_params=meta, **options)
    if kind in ("jit", "remat"):
        return getattr(nn, kind)(target)

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return x, target(name="at")(x)

    over = nn.scan(
        Step, length=size, metadata_params=meta, check_constancy_invariants=False, **options
    )

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return over(name="at")(x, None)[1]

    return Scanned


def layer(nn: Any, init: Any) -> Any:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x @ self.param("w", init, (3, 5))

    return Layer


def insert(names: tuple[Any, ...], axis: int, name: Any) -> tuple[Any, ...]:
    at = axis if axis >= 0 else len(names) + 1 + axis
    return (*names[:at], name, *names[at:])


def only(tree: Any) -> Any:
    """The one leaf (or box) of a tree."""
    (leaf,) = jax.tree.leaves(tree, is_leaf=is_box)
    return leaf


# The names of the tests are its axes.
SIZES = {"embed": 1, "mlp": 1, "in": 2, "out": 4}
MESH = jax.make_mesh((*SIZES.values(),), (*SIZES,), axis_types=(jax.sharding.AxisType.Auto,) * 4)
DEVICES = jax.devices()[:4]
KINDS = ["vmap", "scan", "jit", "remat"]
NESTINGS = [
    (inner, outer, a, b)
    for inner, outer in itertools.product(KINDS, KINDS)
    if {inner, outer} & {"vmap", "scan"}
    for a, b in itertools.product((0, 1, -1), (0, 1, -1))
    if (inner in ("vmap", "scan") or a == 0) and (outer in ("vmap", "scan") or b == 0)
]


@pytest.mark.parametrize(("inner", "outer", "a", "b"), NESTINGS)
def test_names_follow_dims(inner: str, outer: str, a: int, b: int) -> None:
    box = LogicallyPartitioned if (a + b) % 2 else Partitioned
    names, shape = ("embed", "mlp"), (3, 5)
    target = layer(nn, boxed(box, names))
    bare = layer(nn, lambda key, shape: jax.random.uniform(key, shape))
    for kind, axis, name, size in ((inner, a, "in", 2), (outer, b, "out", 4)):
        target, bare = (lift(nn, kind, t, axis, name, size) for t in (target, bare))
        if kind in ("vmap", "scan"):
            names, shape = insert(names, axis, name), insert(shape, axis, size)

    x = jnp.ones((2, 3))
    shapes = jax.eval_shape(target().init, KEY, x)
    assert (only(shapes).names, only(shapes).value.shape) == (names, shape)
    specs = nn.get_partition_spec(shapes)
    assert only(specs) == jax.sharding.PartitionSpec(*names)
    # In boxes and without, the variables are made as they lie on the devices.
    laid_out = jax.tree.map(lambda spec: jax.sharding.NamedSharding(MESH, spec), specs)
    make = lambda: (target().init(KEY, x), bare().init(KEY, x))  # noqa: E731
    variables, others = jax.jit(make, out_shardings=(laid_out, laid_out))()
    cut = tuple(n // MESH.shape[name] for n, name in zip(shape, names, strict=True))
    for value in (only(variables).value, only(others)):
        assert len(value.sharding.device_set) == 8
        assert {shard.data.shape for shard in value.addressable_shards} == {cut}
    assert (only(variables).names, only(variables).value.shape) == (names, shape)
    np.testing.assert_array_equal(only(others), only(variables).value)

    # What is computed of them is the same, too, and what JAX alone computes.
    def used(model: Any) -> Any:
        variables = model.init(KEY, x)
        return model.apply(variables, x), jax.grad(lambda v: model.apply(v, x).sum())(variables)

    grads = only(jax.eval_shape(lambda: used(target()))[1])
    assert (grads.names, grads.value.shape) == (names, shape)
    assert expressions_of(lambda: used(target())) == expressions_of(lambda: used(bare()))
    if a == b:
        ys = jax.jit(lambda v: bare().apply(v, x))(others)
        expected = expected_output(only(others), x, [(inner, a), (outer, b)])
        np.testing.assert_allclose(ys, expected, rtol=1e-5)


EXPRESSIONS = Expressions()


def expressions_of(fn: Any) -> list[int]:
    """What `fn()` computes: see `expressions.py`."""
    return EXPRESSIONS.of(jax.make_jaxpr(fn)())


def expected_output(w: Any, x: Any, lifts: list[tuple[str, int]]) -> Any:
    """What raw `jax.vmap` over the same dims gives, from the outside in."""
    fn = lambda w: x @ w  # noqa: E731
    for kind, axis in lifts:
        if kind in ("vmap", "scan"):
            fn = jax.vmap(fn, in_axes=axis)
    return fn(w)


@pytest.mark.parametrize("kind", ["vmap", "scan"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("init", ["with_partitioning", "with_logical_partitioning"])
def test_same_boxes_as_linen(kind: str, axis: int, init: str) -> None:
    def program(nn: Any) -> Any:
        wrapped = getattr(nn, init)(nn.uniform, ("embed", "mlp"))
        model = lift(nn, kind, layer(nn, wrapped), axis, "layers", 4)()
        variables = model.init(KEY, jnp.ones((2, 3)))
        return variables, jax.grad(lambda v: model.apply(v, jnp.ones((2, 3))).sum())(variables)

    same(lambda nn: jax.eval_shape(lambda: program(nn)))
    same_arrays(lambda nn: jax.tree.leaves(program(nn)))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_no_partition_name_says_none(box: Any) -> None:
    target = layer(nn, boxed(box, ("embed", "mlp")))
    model = nn.vmap(
        target,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
        metadata_params={nn.PARTITION_NAME: None},
    )
    assert only(model().init(KEY, jnp.ones((2, 3)))).names == (None, "embed", "mlp")


def test_state_gets_names_too() -> None:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            v = self.variable("cache", "k", lambda: Partitioned(x, ("batch", "embed")))
            v.value = v.value + 1
            return x, v.value

    model = nn.scan(Body, {"cache": 1}, length=4, metadata_params={"partition_name": "layers"})()
    x = jnp.ones((2, 3))
    variables = model.init({}, x, None)
    (_, ys), new = model.apply(variables, x, None, mutable=["cache"])
    for made in (variables, new):
        found = only(made)
        assert (found.names, found.value.shape) == (("batch", "layers", "embed"), (2, 4, 3))
    np.testing.assert_array_equal(ys, 3 * jnp.ones((4, 2, 3)))


def test_a_collection_that_only_goes_in_keeps_its_names() -> None:
    target = layer(nn, boxed(Partitioned, ("embed", "mlp")))
    options = {"in_axes": None, "axis_size": 2, "metadata_params": {"partition_name": "layers"}}
    made = nn.vmap(target, {"params": 0}, split_rngs={"params": True}, **options)()
    variables = made.init(KEY, jnp.ones((2, 3)))
    reader = nn.vmap(target, {"params": nn.In(0)}, **options)()
    y = reader.apply(variables, jnp.ones((2, 3)))
    np.testing.assert_allclose(y, made.apply(variables, jnp.ones((2, 3))))
    assert only(variables).names == ("layers", "embed", "mlp")


def test_result_shards_as_its_names_say() -> None:
    mesh = jax.make_mesh((2, 4), ("stage", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = nn.vmap(
        layer(nn, boxed(Partitioned, (None, None))),
        variable_axes={"params": -1},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=8,
        metadata_params={"partition_name": "model"},
    )()
    shapes = jax.eval_shape(model.init, KEY, jnp.ones((2, 3)))
    specs = nn.get_partition_spec(shapes)
    shardings = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs)
    variables = jax.jit(model.init, out_shardings=shardings)(KEY, jnp.ones((2, 3)))
    value = only(variables).value
    assert value.sharding.spec == jax.sharding.PartitionSpec(None, None, "model")
    assert value.addressable_shards[0].data.shape == (3, 5, 2)


# --- lifts that keep the shape of their argument: square layers


def square(target_names: tuple[str, str]) -> Any:
    class Square(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x @ self.param("w", boxed(LogicallyPartitioned, target_names), (4, 4))

    return Square


def stack(kind: str, target: Any, axis: int, name: str) -> Any:
    """`target` through one level of a lift, and the size of the dim it adds (None: no dim)."""
    meta = {"partition_name": name}
    axes = {"params": axis}
    if kind == "remat_scan":
        return nn.remat_scan(target, (2,), variable_axes=axes, metadata_params=meta)
    if kind == "add_metadata_axis":
        return nn.add_metadata_axis(target, variable_axes=axes, metadata_params=meta)
    if kind == "map_variables":
        return nn.map_variables(target, "params", mutable=True)
    stacked = lift(nn, kind, target, axis, name, 2)

    class Summed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return stacked(name="at")(x).sum(0)

    return Summed


STACKS = ["remat_scan", "vmap", "scan", "map_variables", "add_metadata_axis"]
STACKED = [
    (a, b, i, j)
    for a, b in itertools.product(STACKS, STACKS)
    if {a, b} & {"remat_scan", "add_metadata_axis", "map_variables"}
    # A dim of which only the box knows must be the outermost: lifts inside look at values.
    if a != "add_metadata_axis" or b in ("map_variables", "add_metadata_axis")
    for i, j in itertools.product((0, 1, -1), (0, 1, -1))
    if not (a in ("map_variables",) and i) and not (b in ("map_variables",) and j)
    if not (a == "add_metadata_axis" and i < 0) and not (b == "add_metadata_axis" and j < 0)
]


@pytest.mark.parametrize(("inner", "outer", "i", "j"), STACKED)
def test_names_follow_dims_of_stacks(inner: str, outer: str, i: int, j: int) -> None:
    target, names, shape = square(("embed", "mlp")), ("embed", "mlp"), (4, 4)
    for kind, axis, name in ((inner, i, "in"), (outer, j, "out")):
        target = stack(kind, target, axis, name)
        if kind != "map_variables":
            names = insert(names, axis, name)
        if kind in ("vmap", "scan", "remat_scan"):
            shape = insert(shape, axis, 2)

    def both() -> Any:
        variables = target().init(KEY, jnp.ones((2, 4)))
        return variables, target().apply(variables, jnp.ones((2, 4)))

    variables, _ = jax.eval_shape(both)
    assert (only(variables).names, only(variables).value.shape) == (names, shape)


OVER = [pair for pair in itertools.product(STACKS[:3], STACKS[:3]) if "remat_scan" in pair]


@pytest.mark.parametrize(("inner", "outer"), OVER)
def test_stacks_are_cut_as_their_names_say(inner: str, outer: str) -> None:
    """For real, with other sizes of axes, and dims in the middle and at the end."""
    mesh = jax.make_mesh(
        (1, 1, 2, 2), (*SIZES,), axis_types=(jax.sharding.AxisType.Auto,) * 4, devices=DEVICES
    )
    target, names = square(("embed", "mlp")), ("embed", "mlp")
    for kind, axis, name in ((inner, 1, "in"), (outer, -1, "out")):
        target, names = stack(kind, target, axis, name), insert(names, axis, name)
    x = jnp.ones((2, 4))
    specs = nn.get_partition_spec(jax.eval_shape(target().init, KEY, x))
    laid_out = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    made = only(jax.jit(target().init, out_shardings=laid_out)(KEY, x))
    assert made.names == names
    cut = tuple(4 if name in ("embed", "mlp") else 1 for name in names)
    assert {shard.data.shape for shard in made.value.addressable_shards} == {cut}


def test_levels_of_remat_scan_have_names_of_their_own() -> None:
    levels = [{"partition_name": "stage"}, {"partition_name": "layers"}]
    model = nn.remat_scan(square(("embed", "mlp")), (2, 4), metadata_params=levels)()
    mesh = jax.make_mesh((2, 4), ("stage", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("stage", "stage"), ("layers", "model"), ("embed", None), ("mlp", None))
    x = jnp.ones((2, 4))
    shapes = jax.eval_shape(model.init, KEY, x)
    assert only(shapes).names == ("stage", "layers", "embed", "mlp")
    with nn.logical_axis_rules(rules):
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh)
        variables = jax.jit(model.init, out_shardings=shardings)(KEY, x)
    value = only(variables).value
    assert value.addressable_shards[0].data.shape == (1, 1, 4, 4)


def test_one_name_for_two_levels_is_refused() -> None:
    model = nn.remat_scan(square(("a", "b")), (2, 2), metadata_params={"partition_name": "layers"})
    with pytest.raises(RepeatedNameError, match="'layers'"):
        jax.eval_shape(model().init, KEY, jnp.ones((2, 4)))


@pytest.mark.parametrize("names", [("stage", "layers"), ["stage", "layers"]])
def test_names_of_levels_in_one_mapping_say_how_to_write_them(names: Any) -> None:
    model = nn.remat_scan(square(("a", "b")), (2, 2), metadata_params={"partition_name": names})
    with pytest.raises(LayoutError, match=r"params=\[\{'partition_name': .*'layers'\}\]"):
        jax.eval_shape(model().init, KEY, jnp.ones((2, 4)))


def test_a_negative_axis_of_metadata_alone_is_refused() -> None:
    with pytest.raises(TransformAxisError, match="count it from the front"):
        nn.add_metadata_axis(square(("a", "b")), {"params": -1}, {"partition_name": "layers"})
