"""Weights laid out for their use, inside of what a program rematerialises itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import shardflax.nn as nn
from shardflax.core.boxes import unbox
from shardflax.partitioning import Layout, collectives, make_mesh, preset, use
from tests.core.harness import quick_key

LAYERS, WEIGHTS = 3, 2
X = jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)


class Block(nn.Module):
    """Its first product has to run again for the gradient of the second; a scan's body, too."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        h = nn.Dense(16, use_bias=False, kernel_axes=("embed", "mlp"), name="up")(x)
        h = checkpoint_name(nn.tanh(h), "hidden")
        down = nn.Dense(8, use_bias=False, kernel_axes=("mlp", "embed"), name="down")
        return x + jnp.sin(down(h)), None


class Stack(nn.Module):
    """Blocks one after the other, or as a scan."""

    block: Any = Block
    scanned: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if not self.scanned:
            for i in range(LAYERS):
                x, _ = self.block(name=f"block_{i}")(x)
            return x
        options: dict[str, Any] = {"metadata_params": {nn.PARTITION_NAME: "layers"}}
        loop = nn.scan(
            self.block, {"params": 0}, split_rngs={"params": True}, length=LAYERS, **options
        )
        return loop(name="blocks")(x, None)[0]


def again(policy: Any = None, **options: Any) -> Any:
    return nn.remat(Block, policy=policy, **options)


class ByJax(nn.Module):
    """A stack below JAX's own transform."""

    policy: Any = None
    scanned: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        stack = Stack(scanned=self.scanned, name="stack")
        if self.is_initializing():
            return stack(x)
        alone = Stack(scanned=self.scanned, parent=None)
        return jax.checkpoint(alone.apply, policy=self.policy)(stack.variables, x)


POLICIES = jax.checkpoint_policies
NAMES = "save_only_these_names(hidden)"
EVERYTHING = POLICIES.everything_saveable
ONLY = POLICIES.save_only_these_names("hidden")


def step_of(model: Any) -> Callable[[Any, Any], Any]:
    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(model.apply({"params": params}, x) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize(
    ("model", "gathers"),
    [
        (Stack(), 2),
        (Stack(again()), 2),
        (Stack(again(NAMES)), 2),
        (Stack(again("everything_saveable")), 1),
        (Stack(again(prevent_cse=False), scanned=True), 2),
        (nn.remat(Stack)(again(prevent_cse=False), scanned=True), 3),
        (nn.remat(Stack, policy=NAMES)(scanned=True), 3),
        (ByJax(ONLY), 2),
    ],
    ids=["plain", "none", "names", "everything", "loop", "both", "loop-inside", "by-jax"],
)
def test_a_step_gathers_each_weight_as_often_as_it_uses_it(model: Any, gathers: int) -> None:
    """Forward, and once more for recomputation and backward pass together."""
    mesh, rules = make_mesh("fsdp=8"), preset("fsdp")
    boxed = jax.jit(model.init)(quick_key(0), X)["params"]
    params = unbox(boxed)
    wanted = jax.jit(step_of(model))(params, X)
    layout = Layout({"params": boxed}, mesh, rules)
    with use(mesh, rules):
        placed = jax.device_put({"params": params}, layout.shardings)["params"]
        step = jax.jit(step_of(model)).lower(placed, X).compile()
        found = step(placed, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, wanted)
    sent = sum(one.count for one in collectives(step) if one.kind == "all-gather")
    assert sent == gathers * WEIGHTS * LAYERS


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(
    "policy",
    [EVERYTHING, POLICIES.dots_saveable, ONLY, POLICIES.save_any_names_but_these("hidden")],
    ids=["everything", "dots", "names", "but"],
)
def test_every_policy_goes_around_it(policy: Any, scanned: bool) -> None:
    """JAX trips over what is rematerialised in parts, inside of what saves something."""
    params = jax.eval_shape(Stack(scanned=scanned).init, quick_key(0), X)["params"]
    wrapped = Stack(again(policy, prevent_cse=not scanned), scanned)
    for model, tree in (
        (wrapped, params),
        (nn.remat(Stack, policy=policy)(scanned=scanned), params),
        (ByJax(policy, scanned), {"stack": params}),
    ):
        with use(make_mesh("fsdp=8"), preset("fsdp")):
            traced = str(jax.make_jaxpr(step_of(model))(tree, X))
        assert traced.count("sharding_constraint") >= 6
