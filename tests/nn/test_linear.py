"""Linear layers and tables beyond the matrix: what is passed in, complex numbers, vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import shardflax.nn as nn
from shardflax.partitioning import collectives, init_sharded, make_mesh, preset, use
from tests.core.harness import quick_key
from tests.nn.matrix import close, same
from tests.nn.row import floats

X = floats(2, 6, 8)
IDS = jnp.asarray([[0, 3, 15, -1], [16, -17, 7, 7]])


def doubled(x: Any, y: Any, dimension_numbers: Any, precision: Any = None, **kw: Any) -> Any:
    return 2.0 * lax.dot_general(x, y, dimension_numbers, precision=precision, **kw)


def in_half(*args: Any, dtype: Any, **kw: Any) -> list[Any]:
    """A rule of promotion of one's own."""
    return [None if a is None else jnp.asarray(a, jnp.bfloat16) for a in args]


def made(layer: str, *args: Any, x: Any = X, **options: Any) -> Callable[[Any], Any]:
    def run(namespace: Any) -> Any:
        model = getattr(namespace, layer)(*args, **options)
        variables = model.init(quick_key(0), x)

        def loss(variables: Any, x: Any) -> Any:
            y = model.apply(variables, x)
            return jnp.sum(jnp.abs(y.astype(jnp.complex64)) ** 2).real, y

        return variables, jax.grad(loss, has_aux=True)(variables, x)

    return run


PASSED = [
    made("Dense", 3, dot_general=doubled),
    made("Dense", 3, dot_general_cls=lambda: doubled, precision="highest"),
    made("Dense", 3, promote_dtype=in_half),
    made("Dense", 3, x=X * (1 + 2j)),
    made("Dense", 3, x=jnp.arange(8)),
    made("DenseGeneral", (3, 2), dot_general=doubled, axis=(-1, 1), batch_dims=(0,)),
    made("DenseGeneral", 3, dot_general_cls=lambda: doubled, promote_dtype=in_half),
    made("DenseGeneral", (2, 2), axis=0, x=X * 1j),
    made("Einsum", (8, 3), "bld,dm->blm", preferred_element_type=jnp.float16),
    made("Einsum", (8, 3), "...d,dm->...m", promote_dtype=in_half, precision="highest"),
    made("Einsum", (2, 8, 3), "b...d,bdm->b...m", x=X * 1j),
    made("Einsum", (6, 8, 3), "...d,...dm->...m", bias_init=jax.nn.initializers.ones),
    made("Einsum", (5, 1, 8, 3), "b...d,...dm->bm..."),
    made("Embed", 16, 8, x=jnp.arange(4), promote_dtype=lambda table, **kw: [2 * table]),
    made("Embed", 16, 8, x=IDS[0], dtype=jnp.float16),
    made("Embed", 3, 8, x=jnp.arange(3, dtype=jnp.uint8)),
]


def test_what_is_passed_in_is_used_as_in_flax() -> None:
    """Products, promotion, precision; complex and integer inputs: values and gradients."""

    def all_of(namespace: Any) -> Any:
        return jax.jit(lambda: [case(namespace) for case in PASSED])()

    same(all_of(nn), all_of(flax.linen))


# --- tables


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_lookups_give_the_same(dtype: Any) -> None:
    """Ids from the end and out of range too, and the gradient of those that are in the table."""
    gather = nn.Embed(16, 8, dtype=dtype)
    variables = jax.jit(gather.init)(quick_key(0), IDS)

    def way(layer: Any) -> Any:
        def loss(variables: Any) -> Any:
            y = layer.apply(variables, IDS)
            return jnp.sum(jnp.sin(jnp.nan_to_num(y.astype(jnp.float32)))), y

        return jax.jit(jax.grad(loss, has_aux=True))(variables)

    (of_gather, y), (of_product, z) = way(gather), way(gather.clone(lookup="one_hot"))
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(z, np.float32))
    assert jnp.isnan(y[1, :2]).all() and not jnp.isnan(y[0]).any()
    close(of_gather, of_product, tolerance=1e-5 if dtype == jnp.float32 else 1e-2)


def test_numbers_of_numpy_are_numbers() -> None:
    def shapes(space: Any) -> Any:
        one, last = np.int64(3), np.int64(-1)
        layers = space.DenseGeneral(one, axis=last), space.LayerNorm(reduction_axes=last)
        return [jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 4))) for layer in layers]

    assert shapes(nn) == shapes(flax.linen)


class Tied(nn.Module):
    """A table that looks up and attends."""

    lookup: Any

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        table = nn.Embed(16, 8, lookup=self.lookup)
        return table.attend(jnp.sin(table(ids)))


@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
@pytest.mark.parametrize("lookup", ["gather", "one_hot"])
def test_a_vocabulary_over_devices(lookup: str, axis_types: Any) -> None:
    """The table is never gathered, each device looks up and scores what it has."""
    ids = jnp.asarray(np.random.RandomState(0).randint(0, 16, (8, 4)))
    model, mesh, rules = (
        Tied(lookup),
        make_mesh("data=2,tensor=4", axis_types=axis_types),
        preset("tp_sp"),
    )
    expected, _ = jax.jit(model.init_with_output)(quick_key(0), ids)
    state, layout = init_sharded(lambda: model.init(quick_key(0), ids), mesh=mesh, rules=rules)
    assert layout.leaf("params/Embed_0/embedding").spec == jax.P("tensor")
    given = jax.device_put(ids, jax.NamedSharding(mesh, jax.P("data")))
    with use(mesh, rules):
        compiled = jax.jit(model.apply).lower(state, given).compile()
    y = compiled(state, given)
    close(y, expected)
    assert y.sharding.spec == jax.P("data", None, "tensor")
    sent = collectives(compiled, mesh)
    assert all(c.kind != "all-gather" or 16 not in c.shape for c in sent), sent
