"""TrainState against flax.training.train_state, and what ours adds: boxes."""

import dataclasses
import functools
from typing import Any

import flax.linen
import flax.training.train_state as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from shardflax.core.boxes import AxisMetadata, unbox
from shardflax.core.errors import FlaxError
from shardflax.core.frozen_dict import freeze
from shardflax.partitioning import Partitioned, get_partition_spec
from shardflax.training import train_state as ours


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named(AxisMetadata):
    """A box with names, made here so that the test needs no partitioning."""

    value: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Named":
        return Named(val, self.names)

    def add_axis(self, index: int, params: Any) -> "Named":
        return self

    def remove_axis(self, index: int, params: Any) -> "Named":
        return self


def params_of() -> dict[str, Any]:
    """Two leaves of different rank."""
    return {"kernel": jnp.linspace(-1, 1, 12).reshape(4, 3), "bias": jnp.ones(3)}


def assert_same(a: Any, b: Any) -> None:
    """Equal values, leaf by leaf, by path."""
    left, right = (jax.tree_util.tree_leaves_with_path(t) for t in (a, b))
    assert [p for p, _ in left] == [p for p, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-2), optax.adafactor(1e-2)],
    ids=["sgd", "adamw", "adafactor"],
)
def test_same_updates_as_linen(tx: Any) -> None:
    states = [m.TrainState.create(apply_fn=None, params=params_of(), tx=tx) for m in (oracle, ours)]
    assert [s.step for s in states] == [0, 0]
    for scale in (1.0, -0.5):
        grads = jax.tree.map(lambda p, s=scale: s * jnp.cos(p), params_of())
        states = [s.apply_gradients(grads=grads) for s in states]
        assert_same(*states)
    assert [f.name for f in dataclasses.fields(states[0])] == [
        f.name for f in dataclasses.fields(states[1])
    ]


def test_values_to_overwrite_like_linen() -> None:
    key = ours.OVERWRITE_WITH_GRADIENT
    params = {"params": params_of(), key: {"scale": jnp.ones(2)}}
    grads = {"params": params_of(), key: {"scale": jnp.full(2, 9.0)}}
    states = [
        m.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).apply_gradients(
            grads=grads
        )
        for m in (oracle, ours)
    ]
    assert_same(*states)
    assert states[1].params[key]["scale"].tolist() == [9.0, 9.0]
    frozen = ours.TrainState.create(apply_fn=None, params=freeze(params), tx=optax.sgd(0.1))
    assert frozen.apply_gradients(grads=freeze(grads)).params[key] == freeze(grads)[key]


@pytest.mark.parametrize("module", [oracle, ours], ids=["flax", "shardflax"])
def test_subclasses_hold_more(module: Any) -> None:
    class State(module.TrainState):
        stats: Any

    state = State.create(apply_fn=len, params=params_of(), tx=optax.sgd(0.1), stats=jnp.zeros(2))
    state = state.apply_gradients(grads=params_of(), stats=jnp.ones(2))
    assert type(state) is State and state.stats.tolist() == [1.0, 1.0] and state.apply_fn is len


def test_boxes_stay_on_parameters_and_moments() -> None:
    plain = params_of()
    boxed = {
        "kernel": Named(plain["kernel"], ("embed", "mlp")),
        "bias": Named(plain["bias"], ("mlp",)),
    }
    tx = optax.adamw(1e-2)
    state = ours.TrainState.create(apply_fn=None, params=boxed, tx=tx)
    assert state.opt_state[0].mu["kernel"].names == ("embed", "mlp")
    want = ours.TrainState.create(apply_fn=None, params=plain, tx=tx)
    unboxed = state.replace(opt_state=want.opt_state)  # made from plain parameters
    want = want.apply_gradients(grads=plain)
    for before in (state, unboxed):
        for grads in (plain, boxed):
            got = before.apply_gradients(grads=grads)
            assert jax.tree.structure(got) == jax.tree.structure(before)
            assert got.params["kernel"].names == ("embed", "mlp")
            assert_same(unbox(got.params), want.params)
            assert_same(unbox(got.opt_state), want.opt_state)


def test_linen_reads_the_specs_of_moments() -> None:
    """The guide on pjit: `get_partition_spec` of a whole train state, boxes from both libraries."""
    specs = []
    for box, module, spec in (
        (flax.linen.Partitioned, oracle, flax.linen.get_partition_spec),
        (Partitioned, ours, get_partition_spec),
    ):
        params = {"kernel": box(params_of()["kernel"], (None, "model"))}
        make = functools.partial(module.TrainState.create, apply_fn=None, tx=optax.adam(1e-3))
        specs.append(spec(jax.eval_shape(lambda p, make=make: make(params=p), params)))
    assert specs[1].opt_state[0].mu["kernel"] == PartitionSpec(None, "model")
    assert specs[1].opt_state == specs[0].opt_state


def test_under_jit_with_donation_it_is_traced_once() -> None:
    traces = []

    def update(state: Any, grads: Any) -> Any:
        traces.append(1)
        return state.apply_gradients(grads=grads)

    step = jax.jit(update, donate_argnums=0)
    state = jax.jit(
        lambda: ours.TrainState.create(apply_fn=None, params=params_of(), tx=optax.adamw(1e-2))
    )()
    for _ in range(3):
        state = step(state, params_of())
    assert int(state.step) == 3 and len(traces) == 1


def test_gradients_of_another_shape_are_refused() -> None:
    """Optimizers broadcast: the parameter would have had replicas from then on."""
    state = ours.TrainState.create(apply_fn=None, params=params_of(), tx=optax.sgd(0.1))
    mapped = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), state.params)
    with pytest.raises(FlaxError, match=r"'bias' would make its shape \(3,\) into \(2, 3\)"):
        jax.eval_shape(lambda s: s.apply_gradients(grads=mapped), state)
