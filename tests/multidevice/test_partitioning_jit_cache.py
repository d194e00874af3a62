"""A function that is jitted once follows the rules and the mesh that it is called under."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from shardflax import partitioning
from shardflax.partitioning import logical_axis_rules, make_mesh, preset, use

SPECS = {
    "dp": ("data",),
    "fsdp": (("data", "fsdp"),),
    "fsdp_tp": (("data", "fsdp"), None, "tensor"),
}


def test_one_jitted_function_under_several_rules() -> None:
    traces: list[str] = []

    @jax.jit
    def hidden(x: jax.Array) -> jax.Array:
        traces.append("traced")
        return partitioning.constrain(x * 2, ("batch", "length", "act_mlp"))

    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    for _ in range(2):
        for name, spec in SPECS.items():
            with use(mesh, preset(name)):
                found = hidden(jnp.ones((8, 4, 16))).sharding
            expected = jax.NamedSharding(mesh, jax.P(*spec))
            assert found.is_equivalent_to(expected, 3), name
    assert len(traces) == len(SPECS)


@pytest.mark.parametrize("rules", [[("batch", "data")], [("batch", ["data", "fsdp"])], ()])
def test_plain_pairs_count_too(rules: list[tuple[str, object]]) -> None:
    traces: list[str] = []

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        traces.append("traced")
        return x * 2

    double(1.0)
    with logical_axis_rules(rules):
        double(1.0)
        double(1.0)
    double(1.0)
    assert len(traces) == 2
