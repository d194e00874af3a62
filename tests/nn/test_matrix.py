"""The matrix on one device: every property of a layer is one test over all rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.core.boxes import is_box
from tests.nn.matrix import (
    as_dtype,
    close,
    described,
    facts,
    golden,
    loss_of,
    program,
    rows,
    same,
    split,
)
from tests.nn.row import Row, layers_of
from tests.nn.rows import ROWS


def test_every_layer_has_a_row() -> None:
    """A row's name is that of its layer, up to the first hyphen."""
    assert layers_of(nn) - {row.name.split("-")[0] for row in ROWS} == set()


def test_names_of_rows_tell_them_apart() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


@rows(flax=True)
def test_parity_with_flax(row: Row) -> None:
    """Tree, values, what is written, and gradients."""
    same(facts(row), program(row, flax.linen)())


@rows(flax=True)
def test_fields_are_those_of_flax(row: Row) -> None:
    """Flax's fields come first, in its order, with its defaults; ours are keyword-only."""
    if row.own_class:
        return
    ours, theirs = type(row.build()), type(row.build(flax.linen))
    skip = {"parent", "name"}
    expected = [f for f in dataclasses.fields(theirs) if f.name not in skip]
    found = [f for f in dataclasses.fields(ours) if f.name not in skip]
    assert [f.name for f in found[: len(expected)]] == [f.name for f in expected]
    assert all(f.kw_only for f in found[len(expected) :])
    for a, b in zip(found, expected, strict=False):
        if not callable(b.default):
            assert a.default == b.default, a.name


HALVES = {
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16},
    "narrow": {"param_dtype": jnp.bfloat16},
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_half_precision(row: Row, namespace: Any = nn) -> Any:
    """Variables and outputs where the computation, or what goes into it, is half precision."""

    def one(options: Any) -> Any:
        inputs = row.inputs()
        if "param_dtype" in options:
            inputs = as_dtype(inputs, options["param_dtype"])
        variables = row.init(namespace, inputs, **options)
        given, inputs = jax.lax.optimization_barrier((variables, inputs))
        return variables, row.run(given, *inputs, namespace=namespace, **options)

    further = "-" in row.name  # rows of a layer that has another
    return {name: one(HALVES[name]) for name in (row.halves[:1] if further else row.halves)}


@rows(flax=True, dtype=True)
def test_half_precision_is_flax_s(row: Row) -> None:
    same(in_half_precision(row), in_half_precision(row, flax.linen))


@rows(dtype=True)
def test_half_precision(row: Row) -> None:
    """Outputs are in `dtype`, parameters stay as they are, and the numbers are about the same."""
    for dtype, (variables, (y, _)) in in_half_precision(row).items():
        if dtype == "narrow":
            continue
        params = jax.tree.leaves(variables.get("params", {}))
        assert {x.dtype.name for x in jax.tree.leaves(y)} == {dtype}
        assert all(x.dtype == jnp.float32 for x in params)
        close(as_dtype(y, jnp.float32), facts(row).y, tolerance=0.1)


@rows(dtype=True, one=True)
def test_double_precision(row: Row) -> None:
    """Everything is float64 where the layer is told so, and nothing is rounded on the way."""
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64}

    def run(namespace: Any) -> Any:
        inputs = as_dtype(row.inputs(), jnp.float64)
        variables = row.init(namespace, inputs, **options)
        given, inputs = jax.lax.optimization_barrier((variables, inputs))
        return variables, row.apply(given, *inputs, namespace=namespace, **options)

    with jax.enable_x64(True):
        variables, y = jax.jit(functools.partial(run, nn))()
        learned, _ = split(variables)
        assert {x.dtype.name for x in jax.tree.leaves((learned, y))} == {"float64"}
        if row.like_flax:
            same((variables, y), jax.jit(functools.partial(run, flax.linen))())


@rows()
def test_shapes_are_known_without_numbers(row: Row) -> None:
    abstract = jax.eval_shape(row.init)
    known = jax.tree.map(lambda x: (x.shape, x.dtype), facts(row).variables)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == known


@rows()
@pytest.mark.usefixtures("strict_promotion")
def test_nothing_promotes_by_accident(row: Row) -> None:
    jax.eval_shape(program(row))


@rows(one=True)
@pytest.mark.usefixtures("checking_leaks")
def test_no_tracer_leaks(row: Row) -> None:
    jax.make_jaxpr(program(row))()


@rows()
def test_gradients_are_finite_and_reach_all_parameters(row: Row) -> None:
    for path, g in jax.tree.leaves_with_path(facts(row).grads):
        assert np.isfinite(g).all(), path
        assert np.any(g != 0) or any(word in str(path) for word in row.no_gradient), path


@rows(one=True)
def test_transforms_agree(row: Row) -> None:
    """`jit`, `vmap`, `scan`, `remat` and `grad`, as one program."""
    known = facts(row)
    learned, rest = split(known.variables)

    @jax.checkpoint
    def rematted(learned: Any) -> Any:
        return loss_of(row.apply({**rest, **learned}, *known.inputs))

    @jax.jit
    def all_of_them(variables: Any, inputs: Any) -> Any:
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
        mapped = jax.vmap(row.apply, in_axes=(None, *[0] * len(inputs)))(variables, *twice)
        _, scanned = jax.lax.scan(lambda _, x: (None, row.apply(variables, *x)), None, twice)
        return mapped, scanned, jax.grad(rematted)(learned)

    y = jax.tree.map(lambda x: jnp.stack([x, x]), known.y)
    close(all_of_them(known.variables, known.inputs), (y, y, known.grads[0]))


def test_golden_trees() -> None:
    """Paths are checkpoint keys, names and types of outputs are layouts: none changes unnoticed.

    `python -m tests.nn.golden` writes the file anew.
    """
    assert {row.name: described(row) for row in ROWS} == golden()


@rows()
def test_plain_rules_see_no_boxes(row: Row) -> None:
    """Default names are off where a program follows Linen's contract, or has no rules."""
    with partitioning.logical_axis_rules([("batch", "data"), ("embed", "data")]):
        boxed = jax.eval_shape(row.init)
    assert not any(map(is_box, jax.tree.leaves(boxed, is_leaf=is_box)))
