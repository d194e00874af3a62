"""What is left of a run that is over: no arrays, no names of a setup that failed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn


class Kept(nn.Module):
    """Arrays in variables, in attributes that setup makes, and in closures of initializers."""

    outside: Any

    def setup(self) -> None:
        self.inner = Shifted()
        self.again = [self.outside]
        self.copied = jnp.ones(3)

    def __call__(self, x: Any) -> Any:
        return self.inner(x) + self.again[0](x) + self.copied


class Shifted(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        seen = self.variable("cache", "seen", lambda: jnp.zeros_like(x))
        seen.value = x + 1
        return x + self.param("shift", lambda key: jnp.ones(x.shape))


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_run_that_is_over_keeps_no_array_alive() -> None:
    model, x = Kept(Shifted()), jnp.arange(3.0)
    variables = model.init(jax.random.key(0), x)
    given = x + 2
    _, changed = model.apply(variables, given, mutable=["cache"])
    arrays = [weakref.ref(a) for a in (given, *jax.tree.leaves((variables, changed)))]
    assert len(arrays) == 7
    del variables, given, changed
    assert [array() for array in arrays if array() is not None] == []


@pytest.mark.usefixtures("no_collector")
def test_a_lift_that_is_over_keeps_no_array_alive() -> None:
    model, x = nn.add_metadata_axis(Kept)(Shifted()), jnp.arange(3.0)
    variables = model.init(jax.random.key(0), x)
    arrays = [weakref.ref(a) for a in jax.tree.leaves(variables)]
    del variables
    assert [array() for array in arrays if array() is not None] == []


def test_parents_are_known_while_they_live() -> None:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self) -> bool:
            return nn.Dense(2).parent is self

    assert Outer().apply({})
    assert nn.Dense(2, parent=None).parent is None
    bound = Kept(Shifted()).bind({"params": {"inner": {"shift": jnp.ones(3)}}})
    inner = bound.inner
    assert inner.parent is bound
    del bound
    assert inner.variables["params"]["shift"].shape == (3,)


def test_setup_that_fails_fails_in_the_same_way_again() -> None:
    class Fails(nn.Module):
        def setup(self) -> None:
            self.first = nn.Dense(2)
            self.weight = self.param("weight", nn.initializers.ones, (2,))
            raise ValueError("of the user")

        def __call__(self) -> None: ...

    bound = Fails().bind({"params": {"weight": jnp.ones(2)}})
    for _ in range(2):
        with pytest.raises(ValueError, match="of the user"):
            bound()
