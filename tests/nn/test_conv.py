"""Convolutions beyond the matrix: paddings, ranks, injection, names, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import shardflax.nn as nn
from shardflax.core.boxes import is_box
from shardflax.core.errors import FlaxError
from shardflax.partitioning import collectives, make_mesh, preset, use
from tests.core.harness import quick_key
from tests.nn.matrix import close, same
from tests.nn.row import floats

X1, X2, X3 = floats(2, 6, 8), floats(2, 6, 5, 8), floats(2, 3, 4, 5, 8)
MASK = np.random.RandomState(0).rand(3, 8, 4) > 0.5


def twice(*args: Any, **kwargs: Any) -> Any:
    """What is convolved with instead: it is linear, and of the same shape."""
    return 2 * lax.conv_general_dilated(*args, **kwargs)


def conv(x: Any, *args: Any, layer: str = "Conv", **options: Any) -> Callable[[Any], Any]:
    return lambda nn: getattr(nn, layer)(4, *args, **options).init_with_output(quick_key(0), x)


def local(x: Any, *args: Any, **options: Any) -> Callable[[Any], Any]:
    return conv(x, *args, layer="ConvLocal", **options)


def back(x: Any, *args: Any, **options: Any) -> Callable[[Any], Any]:
    return conv(x, *args, layer="ConvTranspose", **options)


CASES: dict[str, list[Callable[[Any], Any]]] = {
    "paddings": [
        *[conv(X1, 3, strides=2, padding=p) for p in ("SAME", "VALID", "SAME_LOWER", "same", 1)],
        *[conv(X1, (4,), padding=p, kernel_dilation=2) for p in ("CAUSAL", "CIRCULAR", "REFLECT")],
        *[conv(X2, (3, 2), 2, p) for p in (((1, 2), 0), "CIRCULAR", "REFLECT")],
    ],
    "ranks": [
        conv(X3, (2, 2, 3), strides=(1, 2, 1)),
        conv(floats(1, 2, 3, 2, 3, 8), (2, 1, 2, 2)),
        conv(X1[0], 3),
        conv(X2, 3),
        local(X2, 3),
        back(X3, (3, 4, 2), strides=(2, 1, 3)),
        back(X1[0], 3, strides=2),
        back(X2, 3, strides=2),
    ],
    "dilation, groups, masks": [
        conv(X2, (2, 2), padding=((1, 0), 1), input_dilation=(2, 1), kernel_dilation=(1, 2)),
        conv(X1, 3, feature_group_count=4, use_bias=False),
        conv(X1, 3, mask=MASK),
        conv(X1, 3, mask=floats(3, 8, 4)),
        local(X1, 2, 2, "VALID", mask=floats(3, 16, 4)),
        local(X1, 3, padding="CIRCULAR", kernel_dilation=2),
        local(X1, 3, padding="CAUSAL", kernel_dilation=2),
        local(X2, (3, 2), padding="REFLECT", use_bias=False),
        local(X1, 3, padding=((2, 1),), input_dilation=2, mask=floats(12, 24, 4)),
        local(X1, 3, conv_general_dilated=twice),
        conv(X1 * (1 + 2j), 3, None),
    ],
    "transposed": [
        back(X1, (k,), s, p, d, transpose_kernel=t)
        for k, s, p, d, t in (
            (3, 2, "VALID", None, False),
            (3, (2,), ((1, 2),), (2,), True),
            (2, 3, 1, None, False),
            (4, 1, "CIRCULAR", 2, False),
            (4, 2, "CIRCULAR", None, True),
            (7, None, "CIRCULAR", None, False),
        )
    ]
    + [
        back(X2, (3, 4), (2, 1), "CIRCULAR"),
        back(X1, 4, padding="SAME_LOWER", kernel_dilation=2),
        back(X1, 3, mask=MASK, dtype=jnp.bfloat16, preferred_element_type=jnp.float32),
    ],
}


@pytest.mark.parametrize("group", CASES)
def test_parity_with_flax(group: str) -> None:
    def all_of(namespace: Any) -> Any:
        return jax.jit(lambda: [case(namespace) for case in CASES[group]])()

    same(all_of(nn), all_of(flax.linen))


def test_more_than_flax_takes() -> None:
    """Four spatial dims transposed, and paddings in lower case, mean what they say."""
    x = floats(1, 2, 2, 3, 2, 3)
    y = nn.ConvTranspose(2, (2, 1, 2, 2)).init_with_output(quick_key(0), x)[0]
    assert y.shape == (1, 2, 2, 3, 2, 2)
    upper, lower = (back(X1, 3, padding=p)(nn)[0] for p in ("CIRCULAR", "circular"))
    np.testing.assert_array_equal(upper, lower)


def test_what_convolves_can_be_passed_in() -> None:
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls = self.variable("state", "calls", lambda: 0)
            calls.value += 1
            return 2 * lax.conv_general_dilated(*args, **kwargs)

    plain = nn.Conv(4, 3, use_bias=False)
    variables = plain.init(quick_key(0), X1)
    expected = 2 * plain.apply(variables, X1)
    same(plain.clone(conv_general_dilated=twice).apply(variables, X1), expected)
    stateful = plain.clone(conv_general_dilated_cls=Counting)
    given = {**variables, "state": {"Counting_0": {"calls": 3}}}
    y, state = stateful.apply(given, X1, mutable=["state"])
    same(y, expected)
    assert state == {"state": {"Counting_0": {"calls": 4}}}


def primitives(fn: Callable[..., Any], *args: Any) -> list[str]:
    return [str(eqn.primitive) for eqn in jax.make_jaxpr(fn)(*args).eqns]


def test_nothing_is_computed_besides_the_convolution() -> None:
    layer = nn.Conv(4, (3, 3))
    variables = layer.init(quick_key(0), X2)

    def by_hand(variables: Any, x: Any) -> Any:
        kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return y + jnp.reshape(bias, (1, 1, 1, -1))

    assert primitives(layer.apply, variables, X2) == primitives(by_hand, variables, X2)


def kernel_names(layer: Any, channels: int) -> Any:
    with use(None, preset("fsdp_tp")):
        variables = jax.eval_shape(layer.init, quick_key(0), jnp.ones((2, 4, channels)))
    kernel = variables["params"]["kernel"]
    return kernel.names if is_box(kernel) else None


def test_default_names() -> None:
    """Features are named like those of `Dense`; channels of images and groups are not."""
    assert kernel_names(nn.Conv(16, 3), 8) == (None, "embed", "mlp")
    assert kernel_names(nn.Conv(16, 3), 3) == (None, None, "mlp")
    assert kernel_names(nn.Conv(3, 3), 8) == (None, "embed", None)
    assert kernel_names(nn.Conv(16, 3, feature_group_count=8), 8) == (None, None, "mlp")
    assert kernel_names(nn.Conv(16, 3, feature_group_count=2), 8) == (None, None, None)
    assert kernel_names(nn.ConvTranspose(16, 3, transpose_kernel=True), 8) == (None, "mlp", "embed")
    assert kernel_names(nn.Conv(16, 3, kernel_axes=(None, "mlp", "embed")), 8) == (
        None,
        "mlp",
        "embed",
    )


@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
def test_two_batch_dims_and_windows_over_a_sharded_dim(axis_types: Any) -> None:
    """Spatial dims stay as they come in where their size stays; batch dims are one meanwhile."""
    mesh = make_mesh("fsdp=2,context=2,tensor=2", axis_types=axis_types)
    layer = nn.Conv(16, 3, kernel_axes=(None, "embed", "mlp"))
    variables = layer.init(quick_key(0), X1)
    pairs = floats(4, 2, 4, 8)
    with use(mesh, preset("default")):
        one = jax.device_put(floats(4, 4, 8), jax.NamedSharding(mesh, jax.P("fsdp", "context")))
        two = jax.device_put(pairs, jax.NamedSharding(mesh, jax.P("fsdp")))
        y, z = jax.jit(lambda *xs: [layer.apply(variables, x) for x in xs])(one, two)
    close(y, layer.apply(variables, floats(4, 4, 8)))
    close(z, layer.apply(variables, pairs))
    assert y.sharding.spec == jax.P("fsdp", "context", "tensor")
    assert z.sharding.spec == jax.P("fsdp", None, None, "tensor")


@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
def test_groups_leave_the_batch_where_it_is(axis_types: Any) -> None:
    """XLA by itself gathers it; forward and backward, in several groups of several channels."""
    mesh, rules = make_mesh("data=4,tensor=2", axis_types=axis_types), preset("tp_sp")
    layer, x = nn.Conv(16, 3, feature_group_count=4), floats(8, 4, 8)
    variables = layer.init(quick_key(0), x)

    def loss(variables: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(layer.apply(variables, x)))

    step = jax.grad(loss, (0, 1))
    with use(mesh, rules):
        given = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        compiled = jax.jit(step).lower(jax.device_put(variables, jax.P()), given).compile()
        found = compiled(jax.device_put(variables, jax.P()), given)
    close(found, step(variables, x))
    assert {c.kind for c in collectives(compiled, mesh)} == {"all-reduce"}  # the gradient's sums
    assert found[1].sharding.is_equivalent_to(given.sharding, x.ndim)


def fails(make: Callable[..., Any], x: Any) -> Callable[[], Any]:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return make(name="inner")(x)

    return lambda: jax.eval_shape(Model().init, quick_key(0), x)


def layer(cls: Any, *args: Any, **options: Any) -> Callable[..., Any]:
    return lambda name: cls(*args, **options, name=name)


ERRORS: list[tuple[Callable[..., Any], Any, str]] = [
    (layer(nn.Conv, 4, (3, 3)), X1[0], r"Conv 'inner': inputs have shape \(6, 8\) \(2 dims\)"),
    (layer(nn.Conv, 4, (3, 3), 2, feature_group_count=3), X2, "size 8, .* feature_group_count=3"),
    (layer(nn.Conv, 6, 3, feature_group_count=4), X1, "features has size 6, .*=4 .remainder 2"),
    (layer(nn.Conv, 4, 3, (2, 2)), X1, r"strides=\(2, 2\) has 2 entries, kernel_size has 1"),
    (layer(nn.Conv, 4, 3, 0), X1, r"strides=\(0,\) must be positive"),
    (layer(nn.Conv, 4, 3, padding="SAMEE"), X1, "padding='SAMEE': did you mean 'SAME'"),
    (layer(nn.Conv, 4, (3, 3), padding="CAUSAL"), X2, "'CAUSAL' is for windows of one dim.* has 2"),
    (layer(nn.Conv, 4, (3, 3), padding=((1, 1),)), X2, "a sequence of 2 with an int or a pair"),
    (layer(nn.Conv, 4, 3, input_dilation=2), X1, r"input_dilation=\(2,\) with padding='SAME'"),
    (layer(nn.Conv, 4, 3, mask=MASK[:, :1]), X1, r"\(3, 1, 4\), the kernel \(3, 8, 4\).*dim 1: 1 "),
    (layer(nn.ConvLocal, 4, 3, feature_group_count=2), X1, "feature_group_count=2: only 1"),
    (layer(nn.ConvTranspose, 4, 3, padding="REFLECT"), X1, "'SAME', 'VALID', 'CIRCULAR'"),
]


@pytest.mark.parametrize(("make", "x", "message"), ERRORS)
def test_errors_name_the_layer_the_dim_and_the_sizes(make: Any, x: Any, message: str) -> None:
    with pytest.raises(FlaxError, match=message) as caught:
        fails(make, x)()
    assert "'inner'" in str(caught.value) and isinstance(caught.value, ValueError)
