"""The matrix: every property of a layer is one test over all rows."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.core.boxes import is_box
from shardflax.partitioning import AxisRules, make_mesh, preset, use
from tests.nn.row import LEARNED, Row, layers_of
from tests.nn.rows import ROWS

GOLDEN = Path(__file__).parent.parent / "golden" / "layers.json"
MESHES = {
    "dp": "data=8",
    "fsdp": "data=2,fsdp=4",
    "tp_sp": "data=4,tensor=2",
    "fsdp_tp": "data=2,fsdp=2,tensor=2",
}


def rows(
    *,
    flax: bool = False,
    dtype: bool = False,
    one: bool = False,
    mesh: bool = False,
    batched: bool = False,
) -> Any:
    """Parametrizes over all rows, or over those with a property; `one`: one row of each layer."""
    chosen = [
        r
        for r in ROWS
        if (r.like_flax or not flax)
        and (r.has_dtype or not dtype)
        and ("-" not in r.name or not one)
        and (r.divides or not mesh)
        and (r.batched or not batched)
    ]
    return pytest.mark.parametrize("row", chosen, ids=[r.name for r in chosen])


def same(a: Any, b: Any) -> None:
    """Two trees are equal bit for bit, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    """Two trees are equal but for the order of floating point sums."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        wide = np.complex64 if np.iscomplexobj(x) else np.float32
        x, y = np.asarray(x).astype(wide), np.asarray(y).astype(wide)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=str(path))


def as_dtype(tree: Any, dtype: Any) -> Any:
    """`tree` with its floating arrays in `dtype`."""
    real = functools.partial(jnp.issubdtype, arg2=jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if real(x.dtype) else x, tree)


def loss_of(y: Any) -> Any:
    """A number that all numbers of `y` matter to, each in its own way."""
    total = jnp.float32(0)
    for x in jax.tree.leaves(y):
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        for part in (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,):
            total += jnp.sum(part.astype(jnp.float32) * weights)
    return total


def split(variables: Any) -> tuple[Any, Any]:
    """The collections that gradients are taken to, and the others."""
    learned = {k: v for k, v in variables.items() if k in LEARNED}
    return learned, {k: v for k, v in variables.items() if k not in LEARNED}


def gradients(row: Row, variables: Any, inputs: Any, namespace: Any = nn) -> Any:
    """Gradients to the parameters and to those inputs that have one; with them, all results."""
    learned, rest = split(variables)
    leaves, shape = jax.tree.flatten(inputs)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def of(learned: Any, given: Any) -> Any:
        given = iter(given)
        full = [next(given) if g else x for x, g in zip(leaves, inexact, strict=True)]
        y, wrote = row.run(
            {**rest, **learned}, *jax.tree.unflatten(shape, full), namespace=namespace
        )
        return loss_of(y), (y, wrote)

    floating = [x for x, g in zip(leaves, inexact, strict=True) if g]
    return jax.grad(of, argnums=(0, 1), has_aux=True)(learned, floating)


class Facts(NamedTuple):
    """What a row gives, computed once, with no rules in scope."""

    inputs: Any
    variables: Any
    y: Any
    wrote: Any
    grads: Any


@functools.cache
def facts(row: Row) -> Facts:
    inputs = row.inputs()
    variables = jax.jit(row.init)()
    return Facts(inputs, variables, *everything(row, variables, inputs))


@functools.partial(jax.jit, static_argnums=(0, 3))
def everything(row: Row, variables: Any, inputs: Any, namespace: Any = nn) -> tuple[Any, Any, Any]:
    """Output, written collections and gradients, as one program to compile."""
    grads, (y, wrote) = gradients(row, variables, inputs, namespace)
    return y, wrote, grads


def test_every_layer_has_a_row() -> None:
    built = {type(row.build()).__name__ for row in ROWS}
    assert layers_of(nn) - built == set()


@rows(flax=True)
def test_parity_with_flax(row: Row) -> None:
    known = facts(row)
    same(known.variables, jax.jit(lambda: row.init(flax.linen))())
    theirs = everything(row, known.variables, known.inputs, flax.linen)
    same((known.y, known.wrote, known.grads), theirs)


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
        return variables, row.run(variables, *inputs, namespace=namespace, **options)

    chosen = {k: v for k, v in HALVES.items() if k in row.halves}
    return {name: one(options) for name, options in chosen.items()}


@rows(flax=True, dtype=True)
def test_half_precision_is_flax_s(row: Row) -> None:
    same(in_half_precision(row), in_half_precision(row, flax.linen))


@rows(dtype=True)
def test_half_precision(row: Row) -> None:
    """Outputs are in `dtype`, parameters stay as they are, and the numbers are about the same."""
    for dtype, (variables, (y, _)) in in_half_precision(row).items():
        if dtype != "narrow":
            assert {x.dtype.name for x in jax.tree.leaves(y)} == {dtype}
            params = jax.tree.leaves(variables.get("params", {}))
            assert all(x.dtype == jnp.float32 for x in params)
            close(as_dtype(y, jnp.float32), facts(row).y, tolerance=0.1)


@rows()
def test_shapes_are_known_without_numbers(row: Row) -> None:
    abstract = jax.eval_shape(row.init)
    known = jax.tree.map(lambda x: (x.shape, x.dtype), facts(row).variables)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == known


@rows()
@pytest.mark.usefixtures("strict_promotion")
def test_nothing_promotes_by_accident(row: Row) -> None:
    jax.eval_shape(lambda: everything(row, row.init(), row.inputs()))


@rows()
def test_gradients_are_finite_and_reach_all_parameters(row: Row) -> None:
    for path, g in jax.tree.leaves_with_path(facts(row).grads):
        assert np.isfinite(g).all(), path
        assert np.any(g != 0) or any(word in str(path) for word in row.no_gradient), path


@rows(one=True)
def test_transforms_agree(row: Row) -> None:
    known = facts(row)
    learned, rest = split(known.variables)

    @jax.checkpoint
    def rematted(learned: Any) -> Any:
        return loss_of(row.apply({**rest, **learned}, *known.inputs))

    @jax.jit
    def both(variables: Any, inputs: Any) -> Any:
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
        mapped = jax.vmap(row.apply, in_axes=(None, *[0] * len(inputs)))(variables, *twice)
        _, scanned = jax.lax.scan(lambda _, x: (None, row.apply(variables, *x)), None, twice)
        return mapped, scanned, jax.grad(rematted)(learned)

    y = jax.tree.map(lambda x: jnp.stack([x, x]), known.y)
    close(both(known.variables, known.inputs), (y, y, known.grads[0]))


@rows(one=True)
@pytest.mark.usefixtures("checking_leaks")
def test_no_tracer_leaks(row: Row) -> None:
    jax.make_jaxpr(lambda: everything(row, row.init(), row.inputs()))()


def described(row: Row) -> dict[str, Any]:
    """Every variable of a row: its path, shape, dtype, and names under strict rules."""
    with use(None, preset("fsdp_tp")):
        boxed = jax.eval_shape(row.init)
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=is_box)
    return {
        "/".join(str(k.key) for k in path): {
            "shape": list(unboxed.shape),
            "dtype": str(unboxed.dtype),
            "names": list(box.names) if is_box(box) else None,
        }
        for path, box in leaves
        for unboxed in [box.value if is_box(box) else box]
    }


def test_golden_trees() -> None:
    """Paths are checkpoint keys, and names are layouts: neither changes unnoticed.

    `python -m tests.nn.golden` writes the file anew.
    """
    assert {row.name: described(row) for row in ROWS} == json.loads(GOLDEN.read_text())


def on_a_mesh(row: Row, rules: str, with_gradients: bool) -> None:
    known = facts(row)
    mesh, axis_rules = make_mesh(MESHES[rules]), preset(rules)
    state, layout = partitioning.init_sharded(row.init, mesh=mesh, rules=axis_rules)
    close(jax.device_get(state), known.variables, tolerance=1e-6)
    for path, x in jax.tree.leaves_with_path(state):
        leaf = layout.leaf("/".join(str(k.key) for k in path))
        assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, leaf.spec), x.ndim), path
    with use(mesh, axis_rules):
        if with_gradients:
            close(everything(row, state, known.inputs), (known.y, known.wrote, known.grads))
        else:
            close(jax.jit(row.apply)(state, *known.inputs), known.y)


@rows(mesh=True)
def test_a_mesh_gives_the_same(row: Row) -> None:
    """Same numbers, and parameters placed as their names say."""
    on_a_mesh(row, "fsdp_tp", with_gradients="-" not in row.name)


@rows(one=True, mesh=True)
@pytest.mark.parametrize("rules", ["dp", "fsdp", "tp_sp"])
def test_any_preset_gives_the_same(row: Row, rules: str) -> None:
    on_a_mesh(row, rules, with_gradients=False)


@rows()
def test_plain_rules_see_no_boxes(row: Row) -> None:
    """Default names are off where a program follows Linen's contract, or has no rules."""
    with partitioning.logical_axis_rules([("batch", "data"), ("embed", "data")]):
        boxed = jax.eval_shape(row.init)
    assert not any(map(is_box, jax.tree.leaves(boxed, is_leaf=is_box)))


PARAMETERS_ONLY = AxisRules(
    {"embed": None, "vocab_embed": None, "mlp": None, "norm": None, "head_dim": None}
    | {"heads": None, "kv_heads": None, "vocab": None, "batch": "data", "length": "tensor"}
)


@rows(one=True, batched=True)
def test_guesses_about_outputs_never_fail(row: Row) -> None:
    """No rule for some names, sizes that do not divide: such outputs are left to the compiler."""
    odd = jax.tree.map(lambda x: x[:3], facts(row).inputs)
    variables = row.init(inputs=odd)
    y = row.apply(variables, *odd)
    with use(make_mesh("data=2,tensor=4"), PARAMETERS_ONLY):
        close(jax.jit(row.apply)(variables, *odd), y)
