"""The matrix: every property of a layer is one test over all rows."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.core.boxes import is_box
from shardflax.partitioning import AxisRules, make_mesh, preset, use
from tests.nn.rows import ROWS, Row, layers_of

GOLDEN = Path(__file__).parent.parent / "golden" / "layers.json"
MESHES = {
    "dp": "data=8",
    "fsdp": "data=2,fsdp=4",
    "tp_sp": "data=4,tensor=2",
    "fsdp_tp": "data=2,fsdp=2,tensor=2",
}


def rows(*, flax: bool = False, dtype: bool = False, one: bool = False, mesh: bool = False) -> Any:
    """Parametrizes over all rows, over those like Flax's, or over one row of each layer."""
    chosen = [r for r in ROWS if (r.like_flax or not flax) and (r.has_dtype or not dtype)]
    chosen = [r for r in chosen if r.divides or not mesh]
    chosen = [r for r in chosen if not one or "-" not in r.name]
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
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=str(path))


def loss(row: Row, variables: Any, inputs: Any, namespace: Any = nn) -> Any:
    """A number that all outputs matter to, each in its own way."""
    y = row.apply(variables, *inputs, namespace=namespace)
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y.astype(jnp.float32) * weights)


def gradients(row: Row, variables: Any, inputs: Any, namespace: Any = nn) -> Any:
    """Gradients to the parameters and to those inputs that have one."""
    params, rest = (
        variables.get("params", {}),
        {k: v for k, v in variables.items() if k != "params"},
    )
    real = [jnp.issubdtype(x.dtype, jnp.floating) for x in inputs]

    def of(params: Any, floating: Any) -> Any:
        given = iter(floating)
        full = [next(given) if r else x for x, r in zip(inputs, real, strict=True)]
        return loss(row, {**rest, "params": params}, full, namespace)

    return jax.grad(of, argnums=(0, 1))(params, [x for x, r in zip(inputs, real, strict=True) if r])


@functools.cache
def facts(row: Row) -> tuple[Any, Any, Any, Any]:
    """Inputs, variables, output and gradients of a row: computed once, with no rules in scope."""
    inputs, variables = row.inputs(), row.init()
    return inputs, variables, *everything(row, variables, inputs)


@functools.partial(jax.jit, static_argnums=(0, 3))
def everything(row: Row, variables: Any, inputs: Any, namespace: Any = nn) -> tuple[Any, Any]:
    """Output and gradients, as one program to compile."""
    y = row.apply(variables, *inputs, namespace=namespace)
    return y, gradients(row, variables, inputs, namespace)


def test_every_layer_has_a_row() -> None:
    built = {type(row.build()).__name__ for row in ROWS}
    assert layers_of(nn) - built == set()


@rows(flax=True)
def test_parity_with_flax(row: Row) -> None:
    inputs, variables, y, grads = facts(row)
    same(variables, row.init(flax.linen))
    same((y, grads), everything(row, variables, inputs, flax.linen))


@rows(flax=True)
def test_fields_are_those_of_flax(row: Row) -> None:
    """Flax's fields come first, in its order, with its defaults; ours are keyword-only."""
    ours, theirs = type(row.build()), type(row.build(flax.linen))
    skip = {"parent", "name"}
    expected = [f for f in dataclasses.fields(theirs) if f.name not in skip]
    found = [f for f in dataclasses.fields(ours) if f.name not in skip]
    assert [f.name for f in found[: len(expected)]] == [f.name for f in expected]
    assert all(f.kw_only for f in found[len(expected) :])
    for a, b in zip(found, expected, strict=False):
        if not callable(b.default):
            assert a.default == b.default, a.name


@rows(flax=True, dtype=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_flax_s(row: Row, dtype: str) -> None:
    inputs = row.inputs()
    variables = row.init(dtype=dtype)
    same(variables, row.init(flax.linen, dtype=dtype))
    ours = row.apply(variables, *inputs, dtype=dtype)
    same(ours, row.apply(variables, *inputs, namespace=flax.linen, dtype=dtype))
    assert ours.dtype == dtype
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables.get("params", {})))


@rows(flax=True, dtype=True)
def test_narrow_parameters_and_inputs_are_flax_s(row: Row) -> None:
    narrow = [
        x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in row.inputs()
    ]
    variables = row.init(inputs=narrow, param_dtype=jnp.bfloat16)
    same(variables, row.init(flax.linen, inputs=narrow, param_dtype=jnp.bfloat16))
    same(
        row.apply(variables, *narrow, param_dtype=jnp.bfloat16),
        row.apply(variables, *narrow, namespace=flax.linen, param_dtype=jnp.bfloat16),
    )


@rows()
def test_bf16_outputs(row: Row) -> None:
    if not row.has_dtype:
        y = row.apply(row.init(), *[x.astype(jnp.bfloat16) for x in row.inputs()])
        assert y.dtype == (jnp.float32 if row.name == "Sequential" else jnp.bfloat16)
        return
    y = row.apply(row.init(dtype=jnp.bfloat16), *row.inputs(), dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    close(y, facts(row)[2], tolerance=0.1)


@rows()
def test_shapes_are_known_without_numbers(row: Row) -> None:
    model, (inputs, variables, _, _) = row.build(), facts(row)
    abstract = jax.eval_shape(lambda *xs: model.init(row.rngs(), *xs, **row.call), *inputs)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), variables
    )


@rows()
@pytest.mark.usefixtures("strict_promotion")
def test_nothing_promotes_by_accident(row: Row) -> None:
    jax.eval_shape(lambda: everything(row, row.init(), row.inputs()))


@rows()
def test_gradients_are_finite_and_reach_all_parameters(row: Row) -> None:
    for path, g in jax.tree.leaves_with_path(facts(row)[3]):
        assert np.isfinite(g).all(), path
        assert np.any(g != 0) or "key" in str(path) or "query" in str(path), path


@rows(one=True)
def test_transforms_agree(row: Row) -> None:
    inputs, variables, y, (grads, _) = facts(row)
    params = variables.get("params", {})

    @jax.checkpoint
    def rematted(params: Any) -> Any:
        return loss(row, {**variables, "params": params}, inputs)

    @jax.jit
    def both(variables: Any, *inputs: Any) -> Any:
        twice = [jnp.stack([x, x]) for x in inputs]
        mapped = jax.vmap(row.apply, in_axes=(None, *[0] * len(inputs)))(variables, *twice)
        return row.apply(variables, *inputs), mapped, jax.grad(rematted)(params)

    close(both(variables, *inputs), (y, jnp.stack([y, y]), grads))


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
    inputs, variables, y, grads = facts(row)
    mesh, axis_rules = make_mesh(MESHES[rules]), preset(rules)
    state, layout = partitioning.init_sharded(row.init, mesh=mesh, rules=axis_rules)
    close(jax.device_get(state), variables, tolerance=1e-6)
    for path, x in jax.tree.leaves_with_path(state):
        leaf = layout.leaf("/".join(str(k.key) for k in path))
        assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, leaf.spec), x.ndim), path
    with use(mesh, axis_rules):
        if with_gradients:
            close(everything(row, state, inputs), (y, grads))
        else:
            close(jax.jit(row.apply)(state, *inputs), y)


@rows(mesh=True)
def test_a_mesh_gives_the_same(row: Row) -> None:
    """Same numbers, and parameters placed as their names say."""
    on_a_mesh(row, "fsdp_tp", with_gradients="-" not in row.name)


@rows(one=True)
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


@rows(one=True)
def test_guesses_about_outputs_never_fail(row: Row) -> None:
    """No rule for some names, sizes that do not divide: such outputs are left to the compiler."""
    odd = [x[:3, :3] for x in row.inputs()]
    variables = facts(row)[1]
    y = row.apply(variables, *odd)
    with use(make_mesh("data=2,tensor=4"), PARAMETERS_ONLY):
        close(jax.jit(row.apply)(variables, *odd), y)
