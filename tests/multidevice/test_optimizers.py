"""Every optimizer that optax ships, sharded over eight devices, against one device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import Layout, Leaf, LogicallyPartitioned, make_mesh, preset
from tests.multidevice.optimizers import CASES, groups, plain, shipped, started, step

MESH = make_mesh("fsdp=4,tensor=2")
RULES = preset("fsdp_tp") | {"flat": "fsdp tensor", "rank": None}
SPECS = {"layer/kernel": P("fsdp", "tensor"), "table": P("tensor", "fsdp")}
FACTORED = {
    "v_row/layer/kernel": P("fsdp"),  # of (8, 16): the larger dim is left out
    "v_col/layer/kernel": P("tensor"),
    "v_row/table": P("tensor"),
    "v_col/table": P("fsdp"),
    "layer/kernel/0": P("fsdp"),  # SM3's vectors, one a dim
    "layer/kernel/1": P("tensor"),
    "table/0": P("tensor"),
    "table/1": P("fsdp"),
}

# What does not follow from a parameter is listed as unnamed; names by path are the cure.
SAID: dict[str, dict[str, tuple[Any, ...]]] = {
    "flatten": {"opt_state/.*/trace": ("flat",)},
    "galore": {
        "opt_state/.*/(mu|nu)/.*": ("mlp", "rank"),
        "opt_state/.*/projector/.*": ("embed", "rank"),
    },
    "scale_by_galore": {
        "opt_state/.*/(mu|nu)/.*": ("mlp", "rank"),
        "opt_state/projector/.*": ("embed", "rank"),
    },
}


def parameters() -> tuple[Any, Any]:
    """Two kernels of one shape, and the same in boxes."""
    values = np.random.default_rng(0).normal(size=(2, 8, 16)).astype("float32")
    names = ("embed", "mlp"), ("vocab", "embed")
    one, two = (LogicallyPartitioned(v, n) for v, n in zip(values, names, strict=True))
    return {"layer": {"kernel": values[0]}, "table": values[1]}, {
        "layer": {"kernel": one},
        "table": two,
    }


def expected(leaf: Leaf, specs: dict[str, P]) -> P:
    return next(spec for end, spec in specs.items() if leaf.where.endswith(end))


def layout_of(name: str, boxed: Any, opt_state: Any) -> Layout:
    """The layout of a train state, checked: every leaf as its parameter says."""
    if name == "lookahead":
        boxed = optax.LookaheadParams.init_synced(boxed)
    state = {"params": boxed, "opt_state": opt_state}
    if name in SAID:
        assert Layout(state, MESH, RULES).unnamed, name
    layout = Layout(state, MESH, RULES, names=SAID.get(name))
    assert layout.problems == () and layout.unnamed == (), name
    for leaf in layout.leaves:
        if leaf.origin == "its parameter, factored":
            assert leaf.spec == expected(leaf, FACTORED), (name, leaf.where)
        elif leaf.shape == (8, 16):
            assert leaf.spec == expected(leaf, SPECS), (name, leaf.where)
        elif leaf.origin in ("a single number", "a few numbers"):
            assert leaf.spec == P() and np.prod(leaf.shape) <= 10, (name, leaf.where)
    return layout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what optax still ships
@pytest.mark.parametrize("names", groups(12), ids=lambda names: names[0])
def test_updates_and_layouts(names: tuple[str, ...]) -> None:
    values, boxed = parameters()
    made = {name: started(name, values) for name in names}
    layouts = {name: layout_of(name, boxed, state) for name, (_, _, state) in made.items()}
    shardings = {name: layout.shardings for name, layout in layouts.items()}

    def update(states: Any) -> Any:
        new = {}
        for name, (_, tx, _) in made.items():
            params, state = states[name]["params"], states[name]["opt_state"]
            new_params, state = step(name, tx, params, state)
            new[name] = {"params": new_params, "opt_state": state}
        return new

    states = {name: {"params": p, "opt_state": s} for name, (p, _, s) in made.items()}
    one, many = jax.device_put(states), jax.device_put(states, shardings)
    # Compiled ahead: for a number that was weakly typed at first there is no second program.
    update_one = jax.jit(update).lower(one).compile()
    update_many = jax.jit(update, out_shardings=shardings).lower(many).compile()
    for _ in range(2):
        one, many = update_one(one), update_many(many)
    for name in names:
        assert jax.tree.structure(one[name]) == jax.tree.structure(many[name]), name
        for (path, a), b in zip(
            jax.tree.leaves_with_path(one[name]), jax.tree.leaves(many[name]), strict=True
        ):
            where = f"{name}: {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(plain(a), plain(b), 1e-4, 1e-5, err_msg=where)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_moments_by_rules_of_their_own() -> None:
    """Of all of them, under ZeRO-1 upon `fsdp_tp`: over one axis more than the parameters."""
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    rules = preset("zero1 + fsdp_tp") | {"flat": "fsdp tensor", "rank": None}
    wider = {"layer/kernel": P(("fsdp", "data"), "tensor"), "table": P("tensor", ("fsdp", "data"))}
    values, boxed = parameters()
    like_parameters = 0
    for name in CASES:
        wrapped = optax.LookaheadParams.init_synced(boxed) if name == "lookahead" else boxed
        state = {"params": wrapped, "opt_state": _abstract(name, values)}
        layout = Layout(state, mesh, rules, names=SAID.get(name))
        assert layout.problems == () and layout.unnamed == (), name
        for leaf in layout.leaves:
            if leaf.shape == (8, 16):
                specs = SPECS if leaf.path[0] == "params" else wider
                assert leaf.spec == expected(leaf, specs), (name, leaf.where)
                like_parameters += leaf.path[0] != "params"
    assert like_parameters > 2 * 100


def _abstract(name: str, values: Any) -> Any:
    """The shapes of a first state."""
    return jax.eval_shape(lambda: started(name, values)[2])


def test_none_is_left_out() -> None:
    """A new transformation of optax needs a case."""
    assert shipped() <= set(CASES)
    assert len(shipped()) > 100
