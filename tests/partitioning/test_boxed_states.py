"""Optimizers that are given boxed parameters leave boxes around what is no parameter any more."""

from __future__ import annotations

from typing import Any

import jax
import optax
import pytest
from optax import contrib

import shardflax.nn as nn
from shardflax.partitioning import AxisRules, Layout, make_mesh, named, preset

MESH, RULES = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
ONES = jax.nn.initializers.ones


def boxed() -> Any:
    """A kernel and its bias, which has one dim alone."""
    key = jax.random.key(0)
    names = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    shapes = {"kernel": (8, 16), "bias": (16,)}
    return {name: named(ONES, names[name])(key, shapes[name]) for name in names}


def _sums(params: Any) -> Any:
    return jax.tree.map(lambda x: x.sum(-1, keepdims=True), params)


CASES = {
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9),
    "galore": contrib.galore(0.1, rank=4),
    "keepdims": optax.identity()._replace(init=_sums),
    "lbfgs": optax.lbfgs(memory_size=3),
    "masked": optax.masked(optax.adam(0.1), {"kernel": True, "bias": False}),
    "sm3": optax.sm3(0.1),
}


def layout(tx: Any, whole: bool, rules: AxisRules = RULES) -> Layout:
    """Of parameters and their optimizer, which has got them in their boxes (`whole`) or without."""
    params = jax.eval_shape(boxed)
    given = params if whole else nn.unbox(params)
    return Layout({"params": params, "opt": jax.eval_shape(tx.init, given)}, MESH, rules)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_state_lies_as_if_it_had_been_made_without_boxes(name: str) -> None:
    one, other = (layout(CASES[name], whole) for whole in (False, True))
    assert other.problems == () and other.unnamed == one.unnamed
    assert [(leaf.where, leaf.spec) for leaf in other.leaves] == [
        (leaf.where, leaf.spec) for leaf in one.leaves
    ]


def test_names_by_path_are_those_of_the_boxed_moments_too() -> None:
    rules = RULES.with_overrides(params={"kernel": ("mlp", "embed")})
    found = layout(optax.adam(0.1), True, rules)
    assert found.leaf("opt/0/mu/kernel").spec == jax.P("tensor", "fsdp")
    assert found.leaf("params/kernel").spec == found.leaf("opt/0/nu/kernel").spec


def test_names_that_differ_are_said_of_the_parameter_alone() -> None:
    names = {".*kernel": ("mlp", "embed"), "kernel": ("embed", "mlp")}
    tx = optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9)
    for whole in (False, True):
        found = layout(tx, whole, RULES.with_overrides(params=names))
        assert [problem.where for problem in found.problems] == ["params/kernel, shape (8, 16)"]


def test_a_box_of_its_own_is_kept() -> None:
    mine = named(ONES, ("embed", None))(jax.random.key(0), (8, 16))
    found = Layout({"params": boxed(), "ema": {"kernel": mine}}, MESH, RULES)
    assert found.leaf("ema/kernel").spec == jax.P("fsdp")
    assert found.leaf("ema/kernel").origin == "its box"


def test_boxes_around_lists_are_opened() -> None:
    """As SM3's: also where the list has one element, of a parameter with one dim."""
    found = layout(CASES["sm3"], True)
    assert found.leaf("opt/0/mu/kernel/1").spec == jax.P("tensor")
    assert found.leaf("opt/0/mu/bias/0").names == ("mlp",)
