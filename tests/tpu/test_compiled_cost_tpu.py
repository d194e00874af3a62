"""What names and rules add to a program for TPUs: nothing.  The compiler is that of TPUs itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks import sharded
from benchmarks.compiled import cost_of, differences
from shardflax.partitioning import collectives, make_mesh

pytestmark = pytest.mark.tpu


@pytest.fixture(scope="module")
def mesh(tpus: list[Any]) -> Any:
    return make_mesh(sharded.AXES, tpus)


@pytest.fixture(scope="module")
def hand(mesh: Any) -> Any:
    """The train step of a decoder, written with PartitionSpecs."""
    return sharded.lowered_by_hand(mesh).compile()


def sent(compiled: Any, mesh: Any) -> Counter[Any]:
    """How often a program sends what: kind, axes, shape and bytes."""
    counts: Counter[Any] = Counter()
    for one in collectives(compiled, mesh):
        counts[one.kind, one.axes, one.shape, one.bytes] += one.count
    return counts


def test_the_step_costs_what_hand_written_jax_costs(mesh: Any, hand: Any) -> None:
    ours = sharded.lowered_with_names(mesh).compile()
    cost = cost_of(ours)
    assert differences(cost, cost_of(hand)) == {}
    assert cost.flops > 1e6 and cost.temporary_bytes > 0 and cost.alias_bytes > 0
    found = sent(ours, mesh)
    assert found == sent(hand, mesh)
    assert {"all-gather", "all-reduce"} <= {kind for kind, *_ in found}
    assert {("fsdp",), ("tensor",)} <= {axes for _, axes, *_ in found}


def test_another_layout_would_be_seen(mesh: Any, hand: Any) -> None:
    """The comparison is sharp: the residual stream laid out otherwise changes the figures."""
    other = sharded.lowered_by_hand(mesh, sharded.P(("data", "fsdp"))).compile()
    assert "collectives" in differences(cost_of(other), cost_of(hand))
    assert sent(other, mesh) != sent(hand, mesh)
