"""Policies of remat: by name, with names of values, and names that nothing carries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from shardflax.core.transform_errors import RematNameError, RematPolicyError
from tests.core.harness import OURS as nn
from tests.core.harness import quick_key

KEY = quick_key(0)
X = jnp.ones((2, 3))
POLICIES = jax.checkpoint_policies


class Block(nn.Module):
    """Names one value here, and one in a scan within a jit."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def step(c: Any, _: Any) -> Any:
            traces.append(1)
            return checkpoint_name(jnp.sin(c), "inner"), None

        x = checkpoint_name(jnp.sin(nn.Lin()(x)), "out")
        return jax.jit(lambda x: jax.lax.scan(step, x, None, length=2)[0])(x)


traces: list[int] = []


def gradient(policy: Any) -> str:
    """The program of the gradient, with all that the policy keeps."""
    model = nn.remat(Block, policy=policy)()
    variables = nn.Lin().init(KEY, X)
    params = {"params": {"Lin_0": variables["params"]}}
    return str(jax.make_jaxpr(jax.grad(lambda v: model.apply(v, X).sum()))(params))


def test_names_decide_what_is_kept() -> None:
    by_text = gradient("save_only_these_names(out, inner)")
    assert by_text == gradient(POLICIES.save_only_these_names("out", "inner"))
    assert by_text.count("sin") < gradient("nothing_saveable").count("sin")


def test_named_bodies_are_traced_once() -> None:
    traces.clear()
    gradient(POLICIES.save_only_these_names("out"))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "policy",
    [
        POLICIES.save_only_these_names("out", "iner"),
        POLICIES.save_any_names_but_these("iner"),
        POLICIES.save_and_offload_only_these_names(
            names_which_can_be_saved=["out"],
            names_which_can_be_offloaded=["iner"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        POLICIES.save_from_both_policies(
            POLICIES.dots_saveable, POLICIES.save_only_these_names("iner")
        ),
        "save_only_these_names(iner)",
    ],
    ids=["only", "but", "offload", "both", "text"],
)
def test_a_name_that_nothing_carries_is_an_error(policy: Any) -> None:
    with pytest.raises(RematNameError) as error:
        gradient(policy)
    assert "'iner'" in str(error.value) and "did you mean 'inner'?" in str(error.value)


def test_the_error_names_the_module() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.remat(nn.Lin, policy="save_only_these_names(qkv)")(name="attention")(x)

    with pytest.raises(RematNameError, match=r"at /attention: .*no value carries a name"):
        Model().init(KEY, X)


def test_a_policy_of_one_s_own_is_not_looked_into() -> None:
    named = POLICIES.save_only_these_names("iner")
    gradient(lambda *args, **params: named(*args, **params))


@pytest.mark.parametrize("policy", ["save_only_these_name(a)", "dots_savable", "dots_saveable(a)"])
def test_policies_that_jax_does_not_have(policy: str) -> None:
    with pytest.raises(RematPolicyError, match=r"did you mean|known"):
        nn.remat(Block, policy=policy)


def test_everything_else_goes_on_inside() -> None:
    """State, keys, and a second call of the same module."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            inner = nn.remat(Stateful, policy="save_only_these_names(h)")(name="inner")
            return inner(inner(x))

    class Stateful(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return checkpoint_name(nn.Count()(nn.Drop()(x)), "h")

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            inner = Stateful(name="inner")
            return inner(inner(x))

    found = [
        model.apply({}, X, rngs={"dropout": KEY}, mutable=["state"]) for model in (Model(), Plain())
    ]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *found))
