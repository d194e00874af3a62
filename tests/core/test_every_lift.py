"""Properties of every lift: bodies are traced once, nothing leaks, one lift goes inside another.

Each *kind* turns a class whose call is `(x) -> x` of the same shape into another such class.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.harness import OURS as nn
from tests.core.harness import quick_key

KEY = quick_key(0)
X = jnp.ones((2, 2, 3)) / 4
TRACED: Counter[str] = Counter()
OVER = {
    "variable_axes": {"params": 0, "state": 0},
    "split_rngs": {"params": True, "dropout": True},
    "metadata_params": {"partition_name": None},
}


class Body(nn.Module):
    """Draws, counts, and has parameters."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        TRACED["body"] += 1
        n = self.variable("state", "n", lambda: jnp.zeros(()))
        n.value += 1
        y = jnp.sin(nn.Lin()(x)) + n.value
        return y + jax.random.uniform(self.make_rng("dropout"), x.shape)


def around(call: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Any]:
    """A kind that wraps a module by `call(wrapper, module, x)`."""

    def kind(target: Any) -> Any:
        class Wrapped(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return call(self, target(name="inner"), x)

        return Wrapped

    return kind


def scanned(target: Any) -> Any:
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return target(name="inner")(x), None

    return around(lambda m, _, x: nn.scan(Step, length=2, **OVER)(name="steps")(x, None)[0])(Body)


def run(m: Any, x: Any) -> Any:
    return m(x)


def looped(mdl: Any, inner: Any, x: Any) -> Any:
    if mdl.is_initializing():
        return inner(x)
    step = lambda m, c: (c[0] + 1, m(c[1]))  # noqa: E731
    options = {"carry_variables": "state", "split_rngs": {"dropout": True}}
    return nn.while_loop(lambda m, c: c[0] < 2, step, inner, (0, x), **options)[1]


def ruled(mdl: Any, inner: Any, x: Any) -> Any:
    forward = lambda m, x: nn.vjp(run, m, x)  # noqa: E731
    return nn.custom_vjp(run, forward, lambda pull, y_t: pull(y_t))(inner, x)


def pushed(mdl: Any, inner: Any, x: Any) -> Any:
    y, y_t = nn.jvp(run, inner, (x,), (jnp.ones_like(x),), {})
    return y + y_t


def pulled(mdl: Any, inner: Any, x: Any) -> Any:
    y, pull = nn.vjp(run, inner, x)
    return y + pull(y)[1]


KINDS: dict[str, Callable[[Any], Any]] = {
    "jit": nn.jit,
    "remat": nn.remat,
    "vmap": functools.partial(nn.vmap, **OVER),
    "scan": scanned,
    "remat_scan": lambda t: nn.remat_scan(t, (2,), metadata_params=[{"partition_name": None}]),
    "map_variables": lambda t: nn.map_variables(t, "params", mutable=True),
    "fold_rngs": nn.fold_rngs,
    "add_metadata_axis": lambda t: nn.add_metadata_axis(t),
    "cond": around(lambda m, inner, x: nn.cond(True, run, lambda m, x: run(m, x), inner, x)),
    "switch": around(lambda m, inner, x: nn.switch(0, [run], inner, x)),
    "while_loop": around(looped),
    "custom_vjp": around(ruled),
    "vjp": around(pulled),
    "jvp": around(pushed),
    "grad": around(lambda m, inner, x: nn.grad(lambda i, x: i(x).sum(), inner, x)[0]),
}
BODIES = {"cond": 2}  # two branches


def apply_both(model: Any, variables: Any, x: Any) -> Any:
    return model.apply(variables, x, rngs={"dropout": KEY}, mutable=["state"])


def init(model: Any, x: Any) -> Any:
    return model.init({"params": KEY, "dropout": KEY}, x)


def loss(model: Any, variables: Any, x: Any) -> Any:
    def of(params: Any) -> Any:
        return apply_both(model, {**variables, "params": params}, x)[0].sum()

    return jax.grad(of)(variables["params"])


def traces(fn: Callable[..., Any], *args: Any) -> int:
    TRACED.clear()
    jax.eval_shape(fn, *args)
    return TRACED["body"]


@pytest.mark.parametrize("kind", KINDS)
def test_bodies_are_traced_once(kind: str) -> None:
    model = KINDS[kind](Body)()
    variables = jax.eval_shape(functools.partial(init, model), X)
    # jit keeps its trace from init to apply where nothing changed, so a new one is made each time.
    assert traces(lambda: init(KINDS[kind](type("Body", (Body,), {}))(), X)) == BODIES.get(kind, 1)
    if kind == "jit":
        return
    assert traces(functools.partial(apply_both, model), variables, X) == BODIES.get(kind, 1)
    if kind != "while_loop":  # which has no reverse mode
        assert traces(functools.partial(loss, model), variables, X) == BODIES.get(kind, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("checking_leaks")
def test_no_tracer_leaks(kind: str) -> None:
    model = KINDS[kind](Body)()
    variables = jax.eval_shape(jax.jit(functools.partial(init, model)), X)
    jax.eval_shape(jax.jit(functools.partial(apply_both, model)), variables, X)
    if kind != "while_loop":
        jax.eval_shape(jax.jit(functools.partial(loss, model)), variables, X)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_is_compiled(kind: str) -> None:
    """The same numbers outside of jit, inside, and from shapes alone."""
    model = KINDS[kind](Body)()

    def run() -> Any:
        variables = init(model, X)
        return variables, apply_both(model, variables, X)

    eager = run()
    close(eager, jax.jit(run)())
    assert jax.tree.map(jnp.shape, jax.eval_shape(run)) == jax.tree.map(jnp.shape, eager)


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), a, b)


NESTED = [
    (a, b)
    for a, b in itertools.product(KINDS, KINDS)
    # Derivatives in reverse through a loop of unknown length do not exist.
    if not (b == "while_loop" and a in ("vjp", "grad", "custom_vjp"))
    if not (a == "while_loop" and b in ("scan", "remat_scan", "vmap"))
]


@pytest.mark.parametrize(("outer", "inner"), NESTED)
def test_any_lift_goes_inside_any_other(outer: str, inner: str) -> None:
    """The same tree and numbers of dims as the lifts one by one, and state that counts."""
    model = KINDS[outer](KINDS[inner](Body))()
    variables = jax.eval_shape(functools.partial(init, model), X)
    ranks = sorted(x.ndim for x in jax.tree.leaves(variables["params"]))
    stacked = sum(kind in ("vmap", "scan", "remat_scan") for kind in (outer, inner))
    assert ranks == [1 + stacked, 2 + stacked]
    y, state = jax.eval_shape(functools.partial(apply_both, model), variables, X)
    assert y.shape == X.shape
    assert jax.tree.map(jnp.shape, state["state"]) == jax.tree.map(jnp.shape, variables["state"])
