"""Errors of our own, or stricter than Linen's: what they say, and when they are raised."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardflax import errors
from tests.core.harness import OURS as nn
from tests.core.harness import quick_key

KEY = quick_key(0)
X = jnp.ones((2, 3))


def calling(body: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return body(self, x)

    return M()


def test_used_after_its_run() -> None:
    kept: list[Any] = []
    calling(lambda self, x: kept.append(self)).init(KEY, X)
    with pytest.raises(errors.InvalidScopeError, match=r"at /: .* ended"):
        kept[0].put_variable("params", "a", X)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.checkpoint, lambda f: lambda x: jax.lax.map(f, x)]
)
def test_state_made_inside_of_a_jax_transform(transform: Any) -> None:
    """It would leak out of the trace."""

    def body(self: Any, x: Any) -> Any:
        layer = nn.Lin()
        return transform(lambda x: layer(x))(x)

    with pytest.raises(errors.JaxTransformError, match=r"Use the lifted transform .* \(nn.jit"):
        calling(body).init(KEY, X)


def test_parameters_are_read_inside_of_a_jax_transform() -> None:
    model = calling(lambda self, x: jax.vmap(nn.Lin())(x))
    variables = {"params": {"Lin_0": nn.Lin().init(KEY, X)["params"]}}
    assert model.apply(variables, X).shape == (2, 3)


def test_two_compact_methods() -> None:
    with pytest.raises(errors.MultipleMethodsCompactError, match="M has the compact methods a, b"):

        class M(nn.Module):  # pyright: ignore[reportUnusedClass]
            @nn.compact
            def a(self) -> Any:
                pass

            @nn.compact
            def b(self) -> Any:
                pass


@pytest.mark.parametrize("variables", [[1], 3, None, X])
def test_variables_of_wrong_type(variables: Any) -> None:
    with pytest.raises(errors.ApplyScopeInvalidVariablesTypeError, match="got "):
        nn.Lin().apply(variables, X)


def test_seed_in_a_dict() -> None:
    with pytest.raises(errors.InvalidRngError, match="'params' is seeded with 3; expected a key"):
        nn.Lin().init({"params": 3}, X)


def test_declaration_outside_of_compact() -> None:
    class M(nn.Module):
        def __call__(self, x: Any) -> Any:
            return self.param("w", nn.uniform, (3,))

    with pytest.raises(errors.DeclareOutsideOfCompactError, match=r"at /: 'w' is declared"):
        M().init(KEY, X)


def test_unknown_policy() -> None:
    with pytest.raises(errors.RematPolicyError, match="did you mean 'dots_saveable'"):
        nn.remat(nn.Lin, policy="dots_savable")


def test_policy_by_name() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return jnp.sin(nn.Lin()(jnp.sin(nn.Lin()(x))))

    def saved(policy: Any) -> str:
        model = nn.remat(Block, policy=policy)()
        variables = model.init(KEY, X)
        return str(jax.make_jaxpr(jax.grad(lambda v: model.apply(v, X).sum()))(variables))

    by_name = saved("everything_saveable"), saved("nothing_saveable")
    named = jax.checkpoint_policies
    assert by_name[0] != by_name[1]
    assert by_name == (saved(named.everything_saveable), saved(named.nothing_saveable))


@pytest.mark.parametrize("kind", ["vmap", "scan"])
def test_sizes_that_differ(kind: str) -> None:
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: Any, y: Any) -> Any:
            return x, y

    model = getattr(nn, kind)(Step, **({"length": 3} if kind == "scan" else {"axis_size": 3}))()
    with pytest.raises(errors.TransformAxisError, match=rf"{kind}: .* found \[2, 3\]"):
        model.apply({}, X, X)


def test_no_size() -> None:
    with pytest.raises(errors.TransformAxisError, match=r"vmap: .* there is none.* axis_size="):
        nn.vmap(nn.Lin, in_axes=None)().apply({}, X)


def test_axis_that_does_not_exist() -> None:
    text = r"at /: vmap: axis 2 of an argument \(in_axes\) of shape \(2, 3\)"
    with pytest.raises(errors.TransformAxisError, match=text):
        nn.vmap(nn.Lin, in_axes=2)().apply({}, X)


class Holder(nn.Module):
    """Calls another module, which so has a path."""

    layer: Any

    @nn.compact
    def __call__(self, *xs: Any) -> Any:
        return self.layer(*xs)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.Lin()(x), None


@pytest.mark.parametrize("kind", ["vmap", "scan"])
def test_an_axis_of_variables_that_does_not_exist_names_the_module(kind: str) -> None:
    def model(axis: int) -> Any:
        size = {"length": 2} if kind == "scan" else {"axis_size": 2, "in_axes": None}
        lifted = getattr(nn, kind)(Pair, {"params": axis}, split_rngs={"params": True}, **size)
        return Holder(lifted())

    new = rf"at /layer: {kind}: axis 5 for the new dim of a variable of 'params'.*-2 to 1"
    with pytest.raises(errors.TransformAxisError, match=new):
        model(5).init(KEY, X, None)
    variables = model(0).init(KEY, X, None)
    there = rf"at /layer: {kind}: axis 5 of a variable of 'params' \(variable_axes\) of shape"
    with pytest.raises(errors.TransformAxisError, match=there):
        model(5).apply(variables, X, None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"variable_axes": 5}, r"variable_axes: expected a dict such as \{'params': 0\}.*got 5"),
        ({"variable_axes": {"params": "0"}}, r"variable_axes: expected an axis \(int\), got '0'"),
        ({"split_rngs": "params"}, r"split_rngs: expected a dict .*got 'params'"),
        ({"metadata_params": "layers"}, r"metadata_params: expected .*got 'layers'"),
    ],
)
@pytest.mark.parametrize("kind", ["vmap", "scan"])
def test_options_of_a_wrong_type(kind: str, options: Any, text: str) -> None:
    with pytest.raises(errors.TransformAxisError, match=text):
        getattr(nn, kind)(nn.Lin, **options)


def test_scanned_variables_need_an_axis() -> None:
    with pytest.raises(errors.TransformAxisError, match="belongs in variable_broadcast"):
        nn.scan(Pair, {"params": None})


def test_metadata_of_another_number_of_levels() -> None:
    with pytest.raises(errors.TransformAxisError, match=r"lengths=\(2, 3\) are 2 levels"):
        nn.remat_scan(nn.Lin, (2, 3), metadata_params=[{"partition_name": "layers"}])


def test_broadcast_that_varies() -> None:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, c: Any, x: Any) -> Any:
            self.put_variable("consts", "c", c)
            return c + 1, x

    model = nn.scan(Body, variable_broadcast="consts", length=2)()
    with pytest.raises(errors.LoopVariantBroadcastError, match=r": consts/c\. .*variable_carry"):
        model.apply({}, X, X, mutable=["consts"])


def test_lift_of_what_is_no_target() -> None:
    with pytest.raises(errors.TransformTargetError, match="no method"):
        nn.vmap(nn.Lin, methods=["no_such"])
    with pytest.raises(errors.TransformTargetError, match="without a module"):
        nn.jit(lambda m: m)()
    with pytest.raises(errors.TransformTargetError, match="not a module"):
        nn.remat(lambda m, x: x)(X, X)
