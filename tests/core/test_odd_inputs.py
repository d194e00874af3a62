"""Programs that few write, and that are right all the same; options that make no sense."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax import errors
from shardflax.core import apply, lift
from tests.core.harness import quick_key

X = jnp.ones((1, 1))


class Noisy(nn.Module):
    """Prints what it is given, and what it makes; also inside of a call."""

    @nn.compact
    def __call__(self, carry: Any, _: Any = None) -> Any:
        w = self.param("w", lambda key: jnp.zeros(()))
        shown = jax.jit(lambda w, x: (jax.debug.print("{} {}", w, x), w + x + 1)[1])
        return shown(w, carry), None


def test_printing_in_a_loop_does_not_hinder_what_is_made_there(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The parameter does not depend on the carry, though it is printed beside it."""
    loop = nn.scan(Noisy, variable_broadcast="params", split_rngs={"params": False}, length=2)
    variables = loop().init(quick_key(0), jnp.zeros(()), None)
    jax.effects_barrier()
    assert capfd.readouterr().out.split("\n") == ["0.0 0.0", "0.0 1.0", ""]
    assert float(variables["params"]["w"]) == 0
    shape = jax.ShapeDtypeStruct((), "float32")
    assert loop().lazy_init(quick_key(0), shape, None) == variables


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    """An initializer without a `__dict__`."""

    value: float = 2.0

    def __call__(self, key: Any) -> Any:
        return jnp.full((1,), self.value)


def test_an_initializer_with_slots() -> None:
    class Weight(nn.Module):
        @nn.compact
        def __call__(self) -> Any:
            return self.param("w", Slotted())

    assert Weight().apply({"params": {"w": jnp.ones(1)}}).tolist() == [1]


class Scaled(nn.Module):
    scales: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x * self.scales[0]


def test_arrays_in_a_tuple_of_a_jitted_module() -> None:
    """They are compared by identity, and those of a trace that is over not at all."""
    jitted = nn.jit(Scaled)

    def run(scale: Any) -> Any:
        return jitted((scale,)).apply({}, jnp.float32(1))

    assert [float(jax.jit(lambda s, n=n: n * run(s))(n)) for n in (2.0, 3.0)] == [4, 9]
    assert [run(jnp.asarray(s)).dtype for s in (1, 1.0)] == [jnp.float32, jnp.float32]
    assert [jitted((s,)).apply({}, 3).dtype for s in (2, 2.0)] == [jnp.int32, jnp.float32]


def test_modules_under_a_key_that_is_none() -> None:
    class Parts(nn.Module):
        parts: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.parts[None](x)

    shapes = jax.eval_shape(Parts({None: nn.Dense(1)}).init, jax.random.key(0), X)
    assert list(shapes["params"]) == ["parts_None"]


def test_pack_packs_the_scopes_that_it_is_given() -> None:
    def twice(scopes: Any, repack: Any, variables: Any, rngs: Any) -> Any:
        first, second = scopes(variables, rngs), scopes(variables, rngs)
        first.put_variable("state", "x", 1)
        second.put_variable("state", "x", 2)
        return None, repack(first)

    packed = apply(lift.pack(twice, ["state"], ["state"], [True]), mutable="state")
    assert packed({"state": {"x": 0}})[1] == {"state": {"x": 1}}


@pytest.mark.parametrize("position", [0, -1, 2])
def test_arguments_without_gradients_are_there(position: int) -> None:
    def program(dense: Any) -> Any:
        call = nn.custom_vjp(lambda m, x: m(x), lambda m, x: m(x), print, "params", position)
        return call(dense, X)

    with pytest.raises(errors.NondiffArgnumsError, match="expected positions from 1 to 1"):
        nn.apply(program, nn.Dense(1))({})


@pytest.mark.parametrize("names", [[1], b"params"])
def test_filters_are_made_of_names(names: Any) -> None:
    with pytest.raises(errors.InvalidFilterError, match="a collection of names"):
        nn.Dense(1).apply({}, X, mutable=names)


def test_streams_have_names() -> None:
    with pytest.raises(errors.InvalidRngError, match="a stream is named 0"):
        nn.Dense(1).init({0: quick_key(0)}, X)


def test_a_module_with_a_list_says_why_it_has_no_hash() -> None:
    with pytest.raises(errors.UnhashableFieldError, match=r"Sequential .*'layers'.*tuples"):
        hash(nn.Sequential([nn.Sequential([])]))
    with pytest.raises(errors.HashBoundModuleError):
        hash(nn.Sequential((nn.Dense(1).bind({}),)))


def test_remat_has_no_concrete_arguments() -> None:
    with pytest.raises(ValueError, match="static_argnums"):
        nn.remat(nn.Dense, concrete=True)


def test_names_of_modules_are_texts() -> None:
    class Named(nn.Module):
        name_of_layer: Any

        @nn.compact
        def __call__(self) -> None:
            nn.Dense(2, name=self.name_of_layer)

    with pytest.raises(errors.InvalidNameError, match=r"Dense got name=3; expected a text"):
        Named(3).apply({})


def test_levels_of_remat_scan_are_asked_for() -> None:
    with pytest.raises(errors.TransformAxisError, match="lengths are missing"):
        nn.remat_scan(nn.Dense)
