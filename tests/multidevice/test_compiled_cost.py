"""What the library adds to a compiled program: nothing; and to tracing: no second trace."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import shardflax.nn as nn
from benchmarks import raw, sharded
from benchmarks.compiled import Cost, collectives, cost_of, differences
from benchmarks.models import Sizes, count_body_traces, linen_models
from tests.core.harness import quick_key

SMALL = Sizes(blocks=2, width=16, heads=2, mlp=32, batch=2, length=4)


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """The two train steps of `benchmarks/sharded.py` with states of equal parameters."""
    mesh, random = sharded.make_mesh(), np.random.default_rng(0)
    ours = sharded.lowered_with_names(mesh).compile()
    layout, _ = ours.input_shardings[0]

    def started(arg: Any, sharding: Any) -> Any:
        """Parameters of any values, and moments of zero."""
        drawn = random.normal(scale=0.1, size=arg.shape) if arg.shape else 0
        return jax.device_put(np.asarray(drawn, arg.dtype), sharding)

    state = jax.tree.map(started, ours.args_info[0][0], layout)
    state = state.replace(opt_state=jax.tree.map(lambda x: x * 0, state.opt_state))
    hand, hand_state = sharded.by_hand(mesh, jax.tree.map(lambda x: x.copy(), state.params))
    ids = sharded.tokens(mesh)
    return {
        "ours": (ours, state),
        "by hand": (hand.lower(hand_state, ids).compile(), hand_state),
        "ids": ids,
    }


def test_the_compiled_step_costs_what_hand_written_jax_costs(steps: dict[str, Any]) -> None:
    ours, hand = cost_of(steps["ours"][0]), cost_of(steps["by hand"][0])
    assert differences(ours, hand) == {}
    assert ours.flops > 1e6 and ours.temporary_bytes > 0 and ours.alias_bytes > 0
    assert {name.split()[0] for name in ours.collectives} >= {"all-gather", "all-reduce"}


def test_both_steps_give_the_same_numbers(steps: dict[str, Any]) -> None:
    (ours, state), (hand, other) = steps["ours"], steps["by hand"]
    state, other = jax.tree.map(lambda x: x.copy(), (state, other))  # the steps donate them
    for _ in range(2):
        state, loss = ours(state, steps["ids"])
        other, expected = hand(other, steps["ids"])
        assert float(loss) == float(expected)
    jax.tree.map(np.testing.assert_array_equal, state.params, other[1])


def test_another_layout_would_be_seen(steps: dict[str, Any]) -> None:
    """The comparison is sharp: the residual stream laid out otherwise changes the figures."""
    other = sharded.step_by_hand(sharded.make_mesh(), sharded.P(("data", "fsdp")))
    other = other.lower(steps["by hand"][1], steps["ids"]).compile()
    assert "collectives" in differences(cost_of(other), cost_of(steps["by hand"][0]))


def test_collectives_are_read_from_hlo() -> None:
    text = """
      %ar = (f32[2]{0}, f32[]) all-reduce(f32[2]{0} %a, f32[] %b), channel_id=1
      %st = (f32[4,2]{1,0}, f32[8,2]{1,0}) all-gather-start(f32[4,2]{1,0} %c), dimensions={0}
      %dn = f32[8,2]{1,0} all-gather-done((f32[4,2]{1,0}, f32[8,2]{1,0}) %st)
      %no = f32[2]{0} add(f32[2]{0} %all-reduce.1, f32[2]{0} %a)
    """
    assert collectives(text) == {
        "all-reduce (f32[2], f32[])": 1,
        "all-gather (f32[4,2], f32[8,2])": 1,
    }


def test_differences_are_named() -> None:
    a = Cost(1.0, 2.0, collectives(""), 3, 4, 5, 6)
    assert differences(a, a) == {}
    assert differences(a, Cost(1.0, 2.0, collectives(""), 3, 4, 7, 6)) == {
        "temporary_bytes": (5, 7)
    }


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_scanned_body_is_traced_once_at_any_depth(depth: int) -> None:
    assert count_body_traces(nn, depth) == (1, 1)


@pytest.mark.parametrize("scanned", [False, True])
def test_the_raw_models_of_the_benchmarks_compute_the_same(scanned: bool) -> None:
    """The ratios compare like with like: equal outputs, equal operations, equal parameters."""
    models = linen_models(nn)
    model = (models.Scanned if scanned else models.Unrolled)(SMALL)
    x = jax.random.normal(jax.random.key(1), (SMALL.batch, SMALL.length, SMALL.width))
    y, variables = jax.jit(model.init_with_output)(quick_key(0), x)

    def by_hand(params: Any, x: jax.Array) -> jax.Array:
        return raw.scanned(params, x) if scanned else raw.unrolled(params, x, SMALL)

    params = variables["params"]
    np.testing.assert_allclose(jax.jit(by_hand)(params, x), y, atol=1e-6)
    ours = jax.make_jaxpr(lambda p, x: model.apply({"params": p}, x))(params, x)
    assert _operations(ours) == _operations(jax.make_jaxpr(by_hand)(params, x))
    make = raw.init_scanned if scanned else raw.init_unrolled
    made = jax.eval_shape(lambda k, x: make(k, x, SMALL), jax.random.key(0), x)[1]
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)


def _operations(jaxpr: Any) -> list[str]:
    """The names of all primitives, those of inner programs included, in order."""
    names: list[str] = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                names.extend(_operations(inner))
    return names
