"""Where a scope says it is inside of a lift, and what its unnamed children are called: as Linen."""

from __future__ import annotations

from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import pytest

from shardflax import core
from shardflax.core import lift
from tests.core.harness import quick_key

KEY = quick_key(0)
STACKED: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


class Body:
    """The function that is lifted: it notes where its scope lies and makes two children."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def note(self, scope: Any) -> None:
        name = scope.name
        self.seen.append((scope.path, name, scope.root.path, scope.root is scope, scope.parent))

    def weight(self, scope: Any, x: Any) -> Any:
        self.seen.append((scope.path, scope.name, scope.root.path))
        return x * scope.param("w", jax.random.uniform, ())

    def __call__(self, scope: Any, x: Any) -> Any:
        self.note(scope)
        return scope.child(self.weight, "named")(scope.child(self.weight, prefix="p_")(x))

    def step(self, scope: Any, carry: Any, x: Any) -> Any:
        return self(scope, carry), x


LIFTS: dict[str, Any] = {
    "vmap": lambda c, body: c.lift.vmap(body.__call__, **STACKED),
    "remat": lambda c, body: c.lift.remat(body.__call__),
    "checkpoint": lambda c, body: c.lift.checkpoint(body.__call__),
    "map_variables": lambda c, body: c.lift.map_variables(body.__call__, "state"),
    "remat of vmap": lambda c, body: c.lift.remat(c.lift.vmap(body.__call__, **STACKED)),
    "custom_vjp": lambda c, body: c.lift.custom_vjp(
        body.__call__, lambda s, x: c.lift.vjp(body.__call__, s, x), lambda vjp, grad: vjp(grad)
    ),
}


@pytest.mark.parametrize("name", LIFTS)
def test_paths_and_names_in_a_lift(name: str) -> None:
    def run(c: Any) -> Any:
        body = Body()

        def model(scope: Any, x: Any) -> Any:
            lifted = LIFTS[name](c, body)
            x = lifted(scope.push("pushed"), x)
            for options in ({}, {"name": "block"}, {"prefix": "p_"}, {}):
                x = scope.child(lifted, **options)(x)
            return scope.child(lambda scope, x: lifted(scope, x), "deep")(x)

        _, variables = c.init(model)(KEY, jnp.ones(2))
        return body.seen, jax.tree.map(lambda w: w.tolist(), dict(variables["params"]))

    ours, theirs = run(core), run(flax.core)
    assert ours == theirs


def test_paths_and_names_in_a_scan() -> None:
    def run(c: Any) -> Any:
        body = Body()

        def model(scope: Any, x: Any) -> Any:
            scan = c.lift.scan(body.step, check_constancy_invariants=False, **STACKED)
            carry, _ = scope.child(scan)(x, jnp.ones(2))
            return scope.child(scan, "block")(carry, jnp.ones(2))

        _, variables = c.init(model)(KEY, jnp.ones(()))
        return body.seen, jax.tree.map(lambda w: w.tolist(), dict(variables["params"]))

    assert run(core) == run(flax.core)


def test_paths_in_lifted_control_flow() -> None:
    def run(c: Any) -> Any:
        body = Body()

        def model(scope: Any, x: Any) -> Any:
            scope = scope.push("block")
            x = c.lift.cond(x > 0, body, body, scope.push("cond"), x)
            x = c.lift.switch(0, [body, body], scope.push("switch"), x)
            x, vjp = c.lift.vjp(body, scope.push("vjp"), x)
            return vjp(x)

        _, variables = c.init(model)(KEY, jnp.ones(()))
        seen = [note for note in body.seen if len(note) > 3]
        return sorted(set(seen)), sorted(variables["params"]["block"])

    assert run(core) == run(flax.core)


def double(tree: Any) -> Any:
    return jax.tree.map(lambda w: 2 * w, tree)


def halve(tree: Any) -> Any:
    return jax.tree.map(lambda w: w / 2, tree)


def test_map_variables_takes_the_names_of_the_functional_core() -> None:
    def run(c: Any) -> Any:
        def weight(scope: Any) -> Any:
            return scope.param("w", lambda key: jnp.ones(()))

        options = {"map_in_fn": double, "map_out_fn": halve, "init": True}
        mapped = c.lift.map_variables(weight, "params", **options)
        y, variables = c.init(lambda scope: scope.child(mapped)())(KEY)
        return float(y), jax.tree.map(float, dict(variables["params"]))

    assert run(core) == run(flax.core) == (1.0, {"wrapper_0": {"w": 0.5}})


def test_names_that_can_be_seen_without_a_run() -> None:
    def body(scope: Any, x: Any) -> Any:
        return x

    def child_names(c: Any, make: Any) -> Any:
        return getattr(make(c), "child_name", None) or make(c).__name__

    for make in (
        lambda c: c.lift.jit(body),
        lambda c: c.lift.remat_scan(body, (2,)),
        lambda c: c.lift.fold_rngs(body),
        lambda c: c.lift.pack(body, [True], [True], [True]),
        lambda c: c.lift.pack(body, [True], [True], [True], name="given"),
    ):
        assert child_names(core, make) == child_names(flax.core, make)
    assert lift.vmap(body).__name__ == "body"
