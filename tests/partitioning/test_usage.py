"""The table of what a layout made of its rules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shardflax.partitioning import (
    AxisRules,
    Layout,
    abstract_layout,
    constrain,
    make_mesh,
    named,
    rule_usage,
)

MESH = make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4])
RULES = AxisRules(
    {"batch": "data fsdp", "embed": "fsdp", "mlp": "fsdp? tensor?", "heads": "tensor", "old": None}
).with_min_size(32)


def init(key: jax.Array) -> Any:
    ones = jax.nn.initializers.ones
    kernel = named(ones, ("embed", "mlp"))
    constrain(jnp.ones((1, 4)), ("batch", None))
    return {
        "a": kernel(key, (8, 16)),
        "b": kernel(key, (8, 15)),
        "small": kernel(key, (2, 4)),
        "c": named(ones, ("heads", None))(key, (4, 8)),
    }


def test_every_rule_is_in_the_table() -> None:
    usage = rule_usage(abstract_layout(init, jax.random.key(0), mesh=MESH, rules=RULES))
    assert str(usage).splitlines() == [
        "rule   axes           leaves       taken     given up",
        "batch  data fsdp      constraints  -         -",
        "embed  fsdp           3            fsdp 2    fsdp 1: below the threshold of 32 elements",
        "mlp    fsdp? tensor?  3            tensor 1  fsdp 2: taken by another dim, tensor 1: "
        "does not divide, fsdp 1: below the threshold of 32 elements, tensor 1: below the "
        "threshold of 32 elements",
        "heads  tensor         1            tensor 1  -",
        "rules that nothing used: old",
    ]
    assert [rule.name for rule in usage.rules if not rule.is_used] == ["old"]


def test_of_plain_pairs_nothing_is_known() -> None:
    layout = Layout({"w": jnp.ones(4)}, MESH, [("embed", "fsdp")])
    assert rule_usage(layout).rules == ()
    assert rule_usage(layout).unused_axes == ("fsdp", "tensor")
