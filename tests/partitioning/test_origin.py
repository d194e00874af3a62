"""Collectives are traced back to the user's own lines, whatever stands between."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shardflax.nn as nn
from shardflax.partitioning import abstract_layout, batch_sharding, collectives, make_mesh, preset
from shardflax.partitioning import use as scope
from tests.core.harness import quick_key


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.tanh(nn.Dense(16, use_bias=False, kernel_axes=("embed", "mlp"), name="up")(x))
        return nn.Dense(8, use_bias=False, kernel_axes=("embed", "vocab"), name="head")(x)


def loss(params: Any, x: Any, ids: Any) -> Any:
    logits = Model().apply({"params": params}, x)
    logits = nn.with_logical_constraint(logits, ("batch", "act_vocab"))
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()


def line(fn: Any, text: str) -> str:
    """Where `text` stands in the source of `fn`."""
    lines, first = inspect.getsourcelines(fn)
    return f"test_origin.py:{first + next(i for i, each in enumerate(lines) if text in each)}"


def test_every_collective_has_a_line_of_ours() -> None:
    """A weight gathered inside of what JAX rematerialises, and a sum in a function of optax's."""
    mesh, rules = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
    x, ids = jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    layout = abstract_layout(
        lambda key, x: Model().init(key, x)["params"], quick_key(0), x, mesh=mesh, rules=rules
    )
    rows = batch_sharding(mesh, rules, ("batch",))
    given = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=rows) for one in (x, ids)]
    with scope(mesh, rules):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, layout.shardings))
        compiled = step.lower(layout.abstract, *given).compile()
    found = collectives(compiled)
    lines = {path: {one.source for one in found if one.path == path} for path in
             ("Model/up", "Model/head", "")}  # fmt: skip
    assert lines["Model/up"] == {line(Model.__call__, 'name="up"')}
    assert lines["Model/head"] == {line(Model.__call__, 'name="head"')}
    assert line(loss, "optax") in lines[""]
    assert all(one.source.startswith("test_origin.py:") for one in found)
