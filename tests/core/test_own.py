"""What users write of their own: a lift in ten lines, a box with metadata that is no sharding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as real
from shardflax.core.boundary import Group, Lift
from shardflax.core.names import ALL, Names
from tests.core.harness import OURS as nn
from tests.core.harness import THEIRS, quick_key

KEY = quick_key(0)
X = jnp.arange(6.0).reshape(2, 3)


# --- a lift


def transposed(col: str = "params") -> Lift:
    """Shows a module the transposes of its matrices; what it makes is transposed on its way out."""

    def run(pure: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        chosen, rest = state.groups
        y, (made, others) = pure(state._replace(groups=(flip(chosen), rest)), *args, **kwargs)
        return y, (flip(made), others)

    groups = (Group(Names.of(col)), Group(ALL))
    return Lift(run, groups, groups)


def flip(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.T if x.ndim == 2 else x, tree)


transpose = real.lifted(transposed, "Transposed")


class ByClass(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return transpose(nn.Lin)(5, name="lin")(x)


class ByMethod(nn.Module):
    @transpose
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Lin(5, name="lin")(x)


class ByFunction(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return transpose(lambda lin, x: lin(x))(nn.Lin(5, name="lin"), x)


@pytest.mark.parametrize("form", [ByClass, ByMethod, ByFunction])
def test_a_lift_is_one_for_classes_methods_and_functions(form: Callable[[], Any]) -> None:
    params = form().init(KEY, X)["params"]["lin"]
    kernel = np.asarray(params["kernel"])
    assert kernel.shape == (5, 3)
    np.testing.assert_allclose(form().apply({"params": {"lin": params}}, X), X @ kernel.T)


def test_it_goes_with_the_others() -> None:
    over: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.vmap(transpose(nn.remat(nn.Lin)), in_axes=None, axis_size=4, **over)(5)
    variables = model.init(KEY, X)
    assert variables["params"]["kernel"].shape == (4, 5, 3)
    grads = jax.grad(lambda v: model.apply(v, X).sum())(variables)
    np.testing.assert_allclose(grads["params"]["kernel"][1, 2], X.sum(0))
    assert type(transpose(nn.Lin)(5)).__name__ == "TransposedLin"


# --- a box


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Units(nn.AxisMetadata):
    """An array with the units of its dims."""

    value: Any
    units: tuple[str, ...]

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Units:
        return replace(self, value=val)

    def add_axis(self, index: int, params: Any) -> Units:
        return replace(self, units=(*self.units[:index], params["unit"], *self.units[index:]))

    def remove_axis(self, index: int, params: Any) -> Units:
        assert self.units[index] == params["unit"]
        return replace(self, units=self.units[:index] + self.units[index + 1 :])

    def tree_flatten(self) -> Any:
        return (self.value,), self.units

    @classmethod
    def tree_unflatten(cls, units: Any, children: Any) -> Units:
        return cls(*children, units)


class Measured(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        made = lambda key, shape: Units(nn.uniform(key, shape), ("m", "s"))  # noqa: E731
        return x @ self.param("w", made, (3, 3)), None


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_metadata_of_any_kind_follows_dims(axis: int) -> None:
    over: dict[str, Any] = {"split_rngs": {"params": True}, "metadata_params": {"unit": "layer"}}
    loop = nn.scan(Measured, {"params": axis}, length=2, **over)
    over["metadata_params"] = {"unit": "copy"}
    model = nn.vmap(loop, {"params": 0}, in_axes=None, axis_size=4, **over)()
    box = model.init(KEY, X, None)["params"]["w"]
    units = ["m", "s"]
    units.insert(axis if axis >= 0 else 3 + axis, "layer")
    assert box.units == ("copy", *units)
    assert box.value.shape == tuple({"copy": 4, "layer": 2}.get(u, 3) for u in box.units)
    grads = jax.grad(lambda v: model.apply(v, X, None)[0].sum())({"params": {"w": box}})
    assert grads["params"]["w"].units == box.units


# --- a label


@pytest.mark.parametrize("force", [True, False])
def test_named_call_labels_as_linen_does(force: bool) -> None:
    def labels(space: Any, named_call: Any) -> set[str]:
        class Square(space.Module):
            def __call__(self, x: Any) -> Any:
                return self.times(x)

            def times(self, x: Any) -> Any:
                return x @ x.T

        square = named_call(Square.times, force=force)
        with space.override_named_call(False):
            lowered = jax.jit(lambda x: space.apply(square, Square())({}, x)).lower(X)
        return set(
            re.findall(r'"jit\([^)]*\)/([^"]*)dot_general"', lowered.as_text(debug_info=True))
        )

    ours = labels(nn, real.transforms.named_call)
    assert ours == ({"Square.times/"} if force else {""})
    assert ours == labels(THEIRS, linen.transforms.named_call)
