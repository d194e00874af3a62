"""Gradients on every mesh under every preset: those of one device.

XLA's CPU partitioner has computed wrong gradients, silently, for a weight whose contracted dim
lies over an axis of the batch (docs/layouts.md).  So each kind of weight is checked on its own, in
bare stacks, at sizes at which it happened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax.core.boxes import unbox
from shardflax.models import Decoder, DecoderConfig
from shardflax.partitioning import (
    AxisRules,
    abstract_layout,
    at_use,
    batch_sharding,
    default_names,
    init_sharded,
    logical_axis_rules,
    make_mesh,
    preset,
    use,
    with_weight,
)
from shardflax.partitioning.errors import IndivisibleDimError
from tests.core.harness import quick_key

RULES = ["tp_sp", "default"]  # every axis in use; the other presets are in test_train_states.py
CUBE = "data=2,fsdp=2,tensor=2"
ON = [
    ("fsdp=8", "fsdp_tp"),
    ("fsdp=4,tensor=2", "fsdp"),
    *[("data=4,tensor=2", rules) for rules in ("dp", "tp_sp")],
    *[(CUBE, rules) for rules in ("fsdp_tp", "default")],
]

X = jnp.asarray(np.random.RandomState(0).randn(8, 4, 8), jnp.float32)


def stack(*features: int) -> nn.Module:
    return nn.Sequential([f for n in features for f in (nn.Dense(n), nn.gelu)][:-1])


def general() -> nn.Module:
    split = nn.DenseGeneral((8, 2), kernel_axes=("embed", "heads", "head_dim"))
    return nn.Sequential([split, nn.gelu, nn.DenseGeneral(8, axis=(-2, -1)), nn.DenseGeneral(16)])


class Tied(nn.Module):
    """Looks up and attends with one table, with a layer between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = nn.Embed(16, 8, lookup="one_hot")
        return table.attend(nn.Dense(8)(table(jnp.argmax(x, axis=-1))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "two": lambda: stack(16, 8),
    "three": lambda: stack(16, 8, 16),
    "linear": lambda: nn.Sequential([nn.Dense(16, use_bias=False), nn.Dense(8)]),
    "general": general,
    "einsum": lambda: nn.Sequential([nn.Einsum((8, 16), "bld,dm->blm"), nn.gelu, nn.Dense(8)]),
    "tied": Tied,
}


def init_all(key: jax.Array) -> Any:
    return {name: make().init(key, X)["params"] for name, make in MODELS.items()}


def gradients(params: Any, x: jax.Array) -> Any:
    """Of every model, to parameters and input."""

    def loss(make: Callable[[], nn.Module], params: Any, x: jax.Array) -> jax.Array:
        y = make().apply({"params": params}, x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    return {
        name: jax.grad(functools.partial(loss, make), argnums=(0, 1))(params[name], x)
        for name, make in MODELS.items()
    }


@functools.cache
def expected() -> tuple[Any, Any]:
    """Parameters made on one device, and their gradients there."""
    params = jax.jit(lambda key: unbox(init_all(key)))(quick_key(0))
    return jax.device_get((params, jax.jit(gradients)(params, X)))


def placed(init: Any, params: Any, mesh: Any, rules: Any) -> Any:
    """Parameters that were made elsewhere, as an init would have them lie."""
    key = jax.eval_shape(lambda: quick_key(0))
    return jax.device_put(params, abstract_layout(init, key, mesh=mesh, rules=rules).shardings)


def close(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    """Equal up to the order of sums, on the scale of each array."""
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = tolerance * max(float(np.abs(y).max()), 1e-3)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=scale, err_msg=str(path))


@pytest.mark.parametrize(("mesh", "rules"), ON)
def test_gradients_are_those_of_one_device(mesh: str, rules: str) -> None:
    on, named = make_mesh(mesh), preset(rules)
    made, wanted = expected()
    params = placed(init_all, made, on, named)
    x = jax.device_put(X, batch_sharding(on, named, ("batch", "length", None)))
    with use(on, named):
        found = jax.jit(gradients)(params, x)
    close(jax.device_get(found), wanted)


TINY = DecoderConfig(
    vocab_size=16, num_layers=2, embed_dim=16, mlp_dim=32, head_dim=4, dtype="float32"
)
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 16, (8, 8)))


def decoder_step(params: Any, tokens: jax.Array) -> Any:
    """Loss and gradients of the decoder."""

    def loss(params: Any) -> jax.Array:
        scores = jax.nn.log_softmax(Decoder(TINY).apply({"params": params}, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    return jax.value_and_grad(loss)(params)


def init_decoder(key: jax.Array) -> Any:
    return Decoder(TINY).init(key, TOKENS)["params"]


@functools.cache
def decoder_alone() -> tuple[Any, Any]:
    params = jax.jit(lambda key: unbox(init_decoder(key)))(quick_key(0))
    return jax.device_get((params, jax.jit(decoder_step)(params, TOKENS)))


@pytest.mark.parametrize("rules", RULES)
def test_the_decoder_is_the_same_under_every_preset(rules: str) -> None:
    # A sequence of 7 is not divided by the axes of `norm_length`, which yield.
    on, named = make_mesh(CUBE), preset(rules)
    made, wanted = decoder_alone()
    params = placed(init_decoder, made, on, named)
    tokens = jax.device_put(TOKENS, batch_sharding(on, named))
    with use(on, named):
        found = jax.jit(decoder_step)(params, tokens)
    close(jax.device_get(found), wanted)


class Layer(nn.Module):
    """A body for `scan`: up and down."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.gelu(nn.Dense(self.width, use_bias=False)(x))
        down = nn.Dense(self.width, use_bias=False, kernel_axes=("mlp", "embed"))
        return x + down(h), None


def test_a_stack_never_holds_its_weights_or_gradients_whole() -> None:
    """Of 5 layers of (64, 64) over fsdp=4, tensor=2, no array of all layers is cut by less."""
    mesh, rules = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
    options: dict[str, Any] = {"metadata_params": {"partition_name": "layers"}}
    model = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=5, **options
    )(64)
    x = jnp.ones((8, 64))
    layout = abstract_layout(
        lambda key: model.init(key, x, None)["params"], quick_key(0), mesh=mesh, rules=rules
    )

    def loss(params: Any) -> jax.Array:
        return jnp.sum(model.apply({"params": params}, x, None)[0] ** 2)

    with use(mesh, rules):
        step = (
            jax.jit(jax.grad(loss), out_shardings=layout.shardings).lower(layout.abstract).compile()
        )
    text = step.as_text() or ""
    assert "f32[5,16,32]" in text and "f32[64,32]" in text
    for whole in ("f32[5,64,32]", "f32[5,32,64]", "f32[5,64,64]"):
        assert whole not in text


def kernel_and_x() -> tuple[jax.Array, jax.Array]:
    return X[0].T @ X[0], X


def test_without_strict_rules_nothing_is_traced() -> None:
    kernel, x = kernel_and_x()
    names = ("embed", "mlp")
    plain = str(jax.make_jaxpr(lambda x, k: jnp.dot(x, k))(x, kernel))

    def traced() -> str:
        return str(jax.make_jaxpr(lambda x, k: with_weight(jnp.dot, x, k, names))(x, kernel))

    assert traced() == plain
    with use(make_mesh(CUBE), [("embed", "fsdp"), ("mlp", "tensor")]):
        assert traced() == plain
    with logical_axis_rules(preset("fsdp_tp")):
        assert traced() == plain
    for rules in ("dp", "tp_sp"):  # no axis of the batch is on a weight
        with use(make_mesh(CUBE), preset(rules)):
            assert traced() == plain
    with use(make_mesh(CUBE), preset("fsdp_tp")):
        assert "sharding_constraint" in traced()


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_layouts_of_a_weight_at_use_and_of_its_gradient(types: Any) -> None:
    mesh, rules = make_mesh(CUBE, axis_types=types), preset("fsdp_tp")
    kernel, _ = kernel_and_x()
    with use(mesh, rules):
        kernel = jax.device_put(kernel, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
        used = jax.jit(lambda k: at_use(k, ("embed", "mlp")))(kernel)
        eager = at_use(kernel, default_names("embed", "mlp"))
        back = jax.jit(jax.grad(lambda k: jnp.sum(at_use(k, ("embed", "mlp")) ** 2)))(kernel)
    assert used.sharding.spec == eager.sharding.spec == jax.P(None, "tensor")
    assert back.sharding.spec == jax.P("fsdp", "tensor")
    close(back, 2 * np.asarray(kernel))


def test_every_transform_goes_through() -> None:
    """Forward and reverse mode, their composition, vmap, scan and remat."""
    kernel, x = kernel_and_x()

    def f(k: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(with_weight(jnp.dot, x, k, ("embed", "mlp"))))

    def scanned(k: jax.Array) -> Any:
        return jax.lax.scan(lambda c, _: (c + jax.checkpoint(f)(k * c), None), 1.0, None, 2)[0]

    def everything(k: jax.Array) -> Any:
        hessian = jax.jvp(jax.grad(f), (k,), (k,))[1]
        mapped = jax.vmap(jax.grad(f))(jnp.stack([k, 2 * k]))
        return jax.jvp(f, (k,), (k,)), hessian, mapped, jax.grad(scanned)(k)

    wanted = jax.device_get(jax.jit(everything)(kernel))
    with use(make_mesh(CUBE), preset("fsdp_tp")):
        found = jax.jit(everything)(kernel)
    close(jax.device_get(found), wanted, 1e-3)


def test_what_stands_beside_the_weight_is_said() -> None:
    rules = AxisRules({"batch": "data expert", "moe_batch": "data", "expert": "expert"})
    weight = jnp.ones((8, 2))
    with use(make_mesh("data=2,expert=4"), rules):
        assert at_use(weight, ("expert", None)).sharding.is_fully_replicated
        assert at_use(weight, ("expert", None), ("moe_batch",)) is weight


def test_inside_shard_map_manual_axes_are_left_alone() -> None:
    mesh, rules = make_mesh("fsdp=8"), preset("fsdp_tp")
    with use(mesh, rules):
        kernel = jnp.ones((8, 4))
        inside = jax.shard_map(
            lambda k: at_use(k, ("embed", None)), in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp")
        )
        assert "sharding_constraint" not in str(jax.make_jaxpr(inside)(kernel))


def test_names_that_do_not_fit() -> None:
    """Written names are held to; a layer's own are advice for a weight that has no layout."""
    odd = jnp.ones((3, 4))
    with use(make_mesh("fsdp=8"), preset("fsdp_tp")):
        with pytest.raises(IndivisibleDimError, match=r"size 3 .* not divisible by 8"):
            at_use(odd, ("embed", None))
        assert at_use(odd, default_names("embed", None)) is odd


def test_an_initializer_s_names_win() -> None:
    """The weight is stored by them, so it is used by them."""
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", "embed"))
    layer = nn.Dense(8, kernel_init=init)
    mesh, rules = make_mesh(CUBE), preset("fsdp_tp")
    with use(mesh, rules):
        params = {"params": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
        text = str(jax.make_jaxpr(lambda p: layer.apply(p, X))(params))
    assert "PartitionSpec('tensor', None)" in text or "P('tensor',)" in text


def test_layers_run_on_explicit_axes() -> None:
    """There an axis claimed twice is an error of types: of kernels, and of biases too."""
    mesh, rules = make_mesh("data=2,fsdp=4", axis_types="explicit"), preset("fsdp")
    model = nn.Sequential([nn.Dense(16), nn.gelu, nn.Dense(8, kernel_axes=("mlp", "embed"))])

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(model.apply({"params": params}, x) ** 2)

    def init(key: jax.Array) -> Any:
        return model.init(key, X)["params"]

    wanted = jax.jit(jax.grad(loss))(jax.jit(init)(quick_key(0)), X)
    params, _ = init_sharded(init, quick_key(0), mesh=mesh, rules=rules)
    with use(mesh, rules):
        x = jax.device_put(X, batch_sharding(mesh, rules, ("batch", "length", None)))
        found = jax.jit(jax.grad(loss))(params, x)
    assert found["layers_2"]["bias"].sharding.spec == jax.P("fsdp")
    assert found["layers_2"]["kernel"].sharding.spec == jax.P(None, "fsdp")
    close(jax.device_get(found), jax.device_get(wanted))
