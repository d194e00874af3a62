"""What names and rules add to a program for TPUs: nothing.  The compiler is that of TPUs itself."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from benchmarks import sharded, topology
from benchmarks.compiled import cost_of, differences
from shardflax.partitioning import collectives

pytestmark = pytest.mark.tpu


@pytest.fixture(scope="module")
def steps() -> tuple[Any, Any, Any]:
    """The mesh, and the train step of a decoder with names and with PartitionSpecs by hand."""
    return topology.compile_both()


def sent(compiled: Any, mesh: Any) -> Counter[Any]:
    """How often a program sends what: kind, axes, shape and bytes."""
    counts: Counter[Any] = Counter()
    for one in collectives(compiled, mesh):
        counts[one.kind, one.axes, one.shape, one.bytes] += one.count
    return counts


def test_the_step_costs_what_hand_written_jax_costs(steps: tuple[Any, Any, Any]) -> None:
    mesh, ours, hand = steps
    assert differences(cost_of(ours), cost_of(hand)) == {}
    found = sent(ours, mesh)
    assert found == sent(hand, mesh)
    assert {"all-gather", "all-reduce"} <= {kind for kind, *_ in found}
    assert {("fsdp",), ("tensor",)} <= {axes for _, axes, *_ in found}
    figures = json.loads(json.dumps(topology.compare(ours, hand)))  # as `make bench` passes them
    assert figures["differences"] == {} and figures["compiler"].startswith("libtpu 0")
    assert figures["flops"] > 1e6 and figures["temporary_bytes"] > 0 and figures["alias_bytes"] > 0


def test_another_layout_would_be_seen(steps: tuple[Any, Any, Any]) -> None:
    """The comparison is sharp: the residual stream laid out otherwise changes the figures."""
    mesh, _, hand = steps
    other = sharded.lowered_by_hand(mesh, sharded.P(("data", "fsdp"))).compile()
    assert "collectives" in differences(cost_of(other), cost_of(hand))
    assert sent(other, mesh) != sent(hand, mesh)
