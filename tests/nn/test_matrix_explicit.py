"""Explicit axes where names say nothing, and products that are not JAX's own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.partitioning import logical_axis_rules, use
from shardflax.partitioning.init import unboxed
from tests.nn.matrix import place, typed, with_sharding

EXPLICIT = place("fsdp_tp", "explicit")
X = np.ones((8, 4, 8), np.float32)


def own_dot(x: Any, y: Any, dimension_numbers: Any, precision: Any = None, **kw: Any) -> Any:
    """A product that knows nothing of shardings."""
    return 2.0 * lax.dot_general(x, y, dimension_numbers, precision, **kw)


class Doubled(nn.Module):
    """A product with state that can be told how to lay its output out."""

    @nn.compact
    def __call__(self, *args: Any, out_sharding: Any = None, **kw: Any) -> jax.Array:
        factor = self.variable("state", "factor", lambda: jnp.full((), 2.0))
        return factor.value * lax.dot_general(*args, out_sharding=out_sharding, **kw)


def shaped(x: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    return with_sharding(x, jax.NamedSharding(EXPLICIT.mesh, jax.P(*spec)))


def output(layer: nn.Module, x: jax.ShapeDtypeStruct, kernel: tuple[Any, ...]) -> str:
    """The type of a layer's output, and that of gradients checked against what they are of."""
    variables = jax.eval_shape(lambda: unboxed(layer.init(jax.random.key(0), jnp.ones(x.shape))))
    params = variables.pop("params")
    params["kernel"] = shaped(params["kernel"], *kernel)
    others = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), variables)

    def loss(params: Any, x: Any) -> tuple[Any, Any]:
        y = layer.apply({"params": params, **others}, x)
        return jnp.sum(y), y

    grads, y = jax.eval_shape(jax.grad(loss, (0, 1), has_aux=True), params, x)
    assert typed(grads[0]["kernel"]) == typed(params["kernel"]) and typed(grads[1]) == typed(x)
    return typed(y)


DENSE = {
    "jax": lambda **kw: nn.Dense(16, use_bias=False, **kw),
    "own": lambda **kw: nn.Dense(16, use_bias=False, dot_general=own_dot, **kw),
    "module": lambda **kw: nn.Dense(16, use_bias=False, dot_general_cls=Doubled, **kw),
    "general": lambda **kw: nn.DenseGeneral(16, use_bias=False, **kw),
    "einsum": lambda **kw: nn.Einsum((8, 16), "bld,df->blf", use_bias=False, **kw),
}


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_without_rules_dims_stay_as_the_operands_have_them(make: Any) -> None:
    with use(EXPLICIT.mesh, ()):
        rows = shaped(X, ("data", "fsdp"), None, "tensor")
        assert output(make(), rows, ("tensor", None)) == "float32[8@(data,fsdp),4,16]"
        long = shaped(X, "data", "tensor")
        assert output(make(), long, (None, "fsdp")) == "float32[8@data,4@tensor,16@fsdp]"
        # Both want `tensor`: the kernel's dims come first, and the activations are gathered.
        assert output(make(), long, ("fsdp", "tensor")) == "float32[8@data,4,16@tensor]"


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_names_come_before_the_operands(make: Any) -> None:
    out = ("batch", "norm_length", "act_embed")
    with use(EXPLICIT.mesh, EXPLICIT.rules):
        layer = make(kernel_axes=("mlp", "embed"), out_axes=out)
        rows = shaped(X, ("data", "fsdp"), None, "tensor")
        found = output(layer, rows, ("tensor", "fsdp"))
        assert found == "float32[8@(data,fsdp),4@tensor,16]"


def test_plain_rules_lay_out_explicit_axes_too() -> None:
    layer = nn.Dense(16, use_bias=False, out_axes=("batch", None, "mlp"))
    with use(EXPLICIT.mesh, ()), logical_axis_rules([("batch", "data"), ("mlp", "fsdp")]):
        assert output(layer, shaped(X), ()) == "float32[8@data,4,16@fsdp]"


def gathers(layer: nn.Module) -> Counter[tuple[str, ...]]:
    """How often the forward and backward pass of a layer gather, and over what."""
    on = place("fsdp")

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    kernel = jax.NamedSharding(on.mesh, jax.P("fsdp"))
    with use(on.mesh, on.rules):
        step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=({"kernel": kernel}, None))
        shape = {"kernel": jax.ShapeDtypeStruct((8, 16), np.float32, sharding=kernel)}
        spread = jax.NamedSharding(on.mesh, jax.P(("data", "fsdp")))
        compiled = step.lower(shape, with_sharding(X, spread)).compile()
    found = partitioning.collectives(compiled, on.mesh)
    return Counter(c.axes for c in found if c.kind == "all-gather")


def test_a_product_of_ones_own_keeps_the_stored_weight_too() -> None:
    """Not the gathered one: the backward pass gathers again."""
    ours, own = (gathers(DENSE[name]()) for name in ("jax", "own"))
    assert ours == own == {("fsdp",): 2}


def test_random_masks_lie_as_what_they_mask() -> None:
    def dropped(x: Any) -> Any:
        layer = nn.Dropout(0.5, deterministic=False)
        return layer.apply({}, x, rngs={"dropout": jax.random.key(0)})

    with use(EXPLICIT.mesh, ()):
        x = shaped(X, "data", "tensor")
        text = str(jax.make_jaxpr(dropped)(x))
        assert typed(jax.eval_shape(dropped, x)) == "float32[8@data,4@tensor,8]"
    assert "bool[8@data,4@tensor,8]" in text and "bool[8,4,8] = select" not in text
