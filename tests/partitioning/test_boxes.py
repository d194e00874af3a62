"""Boxes and initializer wrappers: names in, names out, and every refusal."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardflax.core import boxes
from shardflax.partitioning import (
    AxisRules,
    LayoutError,
    LogicallyPartitioned,
    NamesRankError,
    Partitioned,
    PartitioningUnspecifiedError,
    PartitionNameMismatchError,
    RepeatedNameError,
    default_names,
    logical_axis_rules,
    named,
    preset,
    with_logical_partitioning,
    with_partitioning,
)

KEY = jax.random.key(0)
ONES = jax.nn.initializers.ones
KINDS = [Partitioned, LogicallyPartitioned]
STRICT = preset("fsdp_tp")


@pytest.mark.parametrize("kind", KINDS)
def test_adding_a_dim_needs_a_partition_name(kind: Any) -> None:
    with pytest.raises(PartitioningUnspecifiedError, match="metadata_params") as error:
        kind(jnp.ones((2,)), ("embed",)).add_axis(0, {})
    assert "('embed',)" in str(error.value)
    with pytest.raises(PartitioningUnspecifiedError, match="metadata_params"):
        kind(jnp.ones((2,)), ("embed",)).remove_axis(0, {"other": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_taking_another_dim_away_says_what_was_found(kind: Any) -> None:
    box = kind(jnp.ones((3, 2)), ("layers", "embed"))
    with pytest.raises(PartitionNameMismatchError, match=r"dim 1 named 'layers'.*'embed' stands"):
        box.remove_axis(1, {"partition_name": "layers"})
    with pytest.raises(PartitionNameMismatchError, match="'nothing' stands"):
        box.remove_axis(2, {"partition_name": "layers"})


@pytest.mark.parametrize("kind", KINDS)
def test_nested_transforms_need_different_names(kind: Any) -> None:
    box = kind(jnp.ones((2,)), ("embed",)).add_axis(0, {"partition_name": "layers"})
    with pytest.raises(RepeatedNameError, match="which have it already"):
        box.add_axis(0, {"partition_name": "layers"})
    assert box.add_axis(0, {"partition_name": None}).names == (None, "layers", "embed")


@pytest.mark.parametrize("kind", KINDS)
def test_negative_axes_count_from_the_end(kind: Any) -> None:
    """`variable_axes={'params': -1}` puts the name on the last dim (Linen: on the one before)."""
    box = kind(jnp.ones((4, 2)), ("embed", "mlp"))
    assert box.add_axis(-1, {"partition_name": "l"}).names == ("embed", "mlp", "l")
    tree = boxes.add_axis({"w": kind(jnp.ones((4, 2, 3)), ("embed", "mlp"))}, -1,
                          {"partition_name": "l"})  # fmt: skip
    assert tree["w"].names == ("embed", "mlp", "l")
    assert boxes.remove_axis(tree, -1, {"partition_name": "l"})["w"].names == ("embed", "mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_is_a_pytree_through_jit_grad_and_vmap(kind: Any) -> None:
    box = kind(jnp.arange(4.0), ("embed",))
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(box)
    assert doubled.names == box.names
    grad = jax.grad(lambda b: (b.value**2).sum())(box)
    assert isinstance(grad, kind) and (grad.value == 2 * box.value).all()
    assert jax.vmap(lambda b: b.value * 2)(box).shape == (4,)
    assert pickle.loads(pickle.dumps(box)).names == box.names


WRAPPERS = [with_partitioning, with_logical_partitioning, named]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_values_and_check_rank(wrap: Any) -> None:
    assert wrap(ONES, ("embed", None)) == wrap(ONES, ("embed", None))
    assert hash(wrap(ONES, ["embed", None])) == hash(wrap(ONES, ("embed", None)))
    assert wrap(ONES, ("embed", None))(KEY, (2, 3)).names == ("embed", None)
    with pytest.raises(NamesRankError, match=r"1 names \('embed',\) for a value of rank 2"):
        wrap(ONES, ("embed",))(KEY, (2, 3))
    with pytest.raises(RepeatedNameError, match="stands twice"):
        wrap(ONES, ("embed", "embed"))(KEY, (2, 3))
    assert wrap(ONES, ("embed",)).box(jnp.ones(2)).names == ("embed",)


def test_list_rules_are_made_hashable() -> None:
    wrapper = with_logical_partitioning(ONES, ("embed",), rules=[("embed", ["fsdp", "data"])])
    assert hash(wrapper) == hash(wrapper)
    assert wrapper.rules == (("embed", ("fsdp", "data")),)


def test_default_names_hold_only_under_strict_rules() -> None:
    init = named(ONES, default_names("embed", "mlp"))
    assert isinstance(init(KEY, (2, 3)), jax.Array)
    with logical_axis_rules([("embed", "data")]):
        assert isinstance(init(KEY, (2, 3)), jax.Array)
    with logical_axis_rules(STRICT):
        box = init(KEY, (2, 3))
    assert isinstance(box, LogicallyPartitioned)
    assert box.names == ("embed", "mlp") and type(box.names) is tuple
    assert named(ONES, None)(KEY, (2,)).shape == (2,)


def test_an_initializer_that_boxes_wins_over_defaults_and_clashes_with_explicit_names() -> None:
    own = with_partitioning(ONES, (None, "data"))
    with logical_axis_rules(STRICT):
        assert named(own, default_names("embed", "mlp"))(KEY, (2, 3)).names == (None, "data")
    with pytest.raises(LayoutError, match=r"boxes already \(Partitioned with the names"):
        named(own, ("embed", "mlp"))(KEY, (2, 3))


def test_opening_a_box_checks_names_under_strict_rules_without_a_mesh() -> None:
    box = LogicallyPartitioned(jnp.ones((2, 3)), ("emebd", "mlp"))
    with (
        logical_axis_rules(AxisRules({"embed": None, "mlp": None})),
        pytest.raises(LayoutError, match="did you mean 'embed'"),
    ):
        box.unbox()


def test_opening_a_box_of_a_shape_gives_the_shape() -> None:
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    with logical_axis_rules(STRICT):
        assert LogicallyPartitioned(shape, ("embed",)).unbox() is shape
