"""What the columns of the matrix share: which rows, what a row gives, and how results compare."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.core.boxes import is_box
from shardflax.partitioning import AxisRules, batch_axes, make_mesh, preset, use
from tests.nn.row import LEARNED, Row
from tests.nn.rows import ROWS

GOLDEN = Path(__file__).parent.parent / "golden" / "layers.json"


@functools.cache
def golden() -> dict[str, Any]:
    """What `python -m tests.nn.golden` wrote."""
    return json.loads(GOLDEN.read_text())


def chosen(
    *, flax: bool = False, dtype: bool = False, one: bool = False, further: bool = False
) -> list[Row]:
    """All rows, or those with a property; `one`: one row of each layer, `further`: the others."""
    return [
        r
        for r in ROWS
        if (r.like_flax or not flax)
        and (r.has_dtype or not dtype)
        and not (r.further and one)
        and (r.further or not further)
    ]


def rows(**properties: bool) -> Any:
    """Parametrizes a test over the chosen rows."""
    found = chosen(**properties)
    return pytest.mark.parametrize("row", found, ids=[r.name for r in found])


# --- comparing


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


# --- what a row gives


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


def gradients(run: Callable[..., tuple[Any, Any]], variables: Any, inputs: Any) -> Any:
    """Gradients to the parameters and to those inputs that have one; with them, all results.

    `run(variables, *inputs)` gives the output and what is written, as that of a row does.
    """
    learned, rest = split(variables)
    leaves, shape = jax.tree.flatten(inputs)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def of(learned: Any, given: Any) -> Any:
        given = iter(given)
        full = [next(given) if g else x for x, g in zip(leaves, inexact, strict=True)]
        y, wrote = run({**rest, **learned}, *jax.tree.unflatten(shape, full))
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
    return lowered(row).compile()()


@functools.cache
def lowered(row: Row) -> Any:
    """The program of a row, traced where nothing promotes but where the code says so."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        return program(row).lower()


def program(row: Row, namespace: Any = nn) -> Callable[[], Facts]:
    """Variables and all results, as one program to compile."""

    def all_of() -> Facts:
        variables = row.init(namespace)
        # What is initialised to a constant must not make the results one.
        given, inputs = jax.lax.optimization_barrier((variables, row.inputs()))
        run = functools.partial(row.run, namespace=namespace)
        grads, (y, wrote) = gradients(run, given, inputs)
        return Facts(inputs, variables, y, wrote, grads)

    return jax.jit(all_of)


def one_program(ours: Any, theirs: Any) -> bool:
    """Whether two lowered programs are the same, to the letter: so are their results, then."""
    assert jax.tree.structure(ours.out_info) == jax.tree.structure(theirs.out_info)
    return ours.as_text() == theirs.as_text()


@functools.partial(jax.jit, static_argnums=0)
def everything(row: Row, variables: Any, inputs: Any) -> tuple[Any, Any, Any]:
    """Output, written collections and gradients, as one program to compile."""
    grads, (y, wrote) = gradients(row.run, variables, inputs)
    return y, wrote, grads


# --- meshes


class Place(NamedTuple):
    """A mesh and the rules that go with it."""

    mesh: jax.sharding.Mesh
    rules: AxisRules

    def spread(self, row: Row, inputs: Any) -> Any:
        """The shardings of inputs: their batch over the mesh."""
        axes = batch_axes(self.mesh, self.rules)

        def one(_: Any, dim: int | None) -> jax.NamedSharding:
            spec = () if dim is None else (*[None] * dim, axes)
            return jax.NamedSharding(self.mesh, jax.P(*spec))

        return row.by_batch(one, inputs)


MESHES = {
    "dp": "data=8",
    "fsdp": "data=2,fsdp=4",
    "tp_sp": "data=4,tensor=2",
    "fsdp_tp": "data=2,fsdp=2,tensor=2",
}


@functools.cache
def place(rules: str, axis_types: str = "auto") -> Place:
    return Place(make_mesh(MESHES[rules], axis_types=axis_types), preset(rules))


def typed(tree: Any) -> Any:
    """The types of arrays, as explicit axes show them: `float32[8@data,4]`."""
    return jax.tree.map(lambda x: jax.typeof(x).str_short(short_dtypes=False), tree)


def described(row: Row) -> dict[str, Any]:
    """Every variable of a row: its path, shape, dtype, and names; and the types of its outputs.

    The types are those on an explicit mesh: they say how each dim is laid out.
    """
    on = place("fsdp_tp", "explicit")
    with use(None, on.rules):
        boxed = jax.eval_shape(row.init)
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=is_box)
    variables = {
        "/".join(str(k.key) for k in path): {
            "shape": list(unboxed.shape),
            "dtype": str(unboxed.dtype),
            "names": list(box.names) if is_box(box) else None,
        }
        for path, box in leaves
        for unboxed in [box.value if is_box(box) else box]
    }
    layout = partitioning.Layout(boxed, on.mesh, on.rules)
    assert not layout.problems
    return {"variables": variables, "outputs": output_types(row, layout)}


def output_types(row: Row, layout: partitioning.Layout) -> list[str]:
    """The types of all outputs on the explicit mesh; their gradients are traced too."""
    on, inputs = place("fsdp_tp", "explicit"), row.inputs()
    state = jax.tree.map(with_sharding, layout.abstract, layout.shardings)
    inputs = jax.tree.map(with_sharding, inputs, on.spread(row, inputs))
    with use(on.mesh, on.rules):
        of = functools.partial(gradients, row.run)
        (learned, _), (y, _) = jax.eval_shape(of, state, inputs)
    assert typed(learned) == typed(split(state)[0])
    return jax.tree.leaves(typed(y))


def with_sharding(x: Any, sharding: Any) -> Any:
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)  # lengths of numpy have 64 bits
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)
