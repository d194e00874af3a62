"""Larger programs over images, the same source in both namespaces, equal bit for bit.

A ResNet whose train step changes its batch statistics, and a convolutional VAE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

import shardflax.nn
from shardflax.partitioning import init_sharded, make_mesh, preset, use
from tests.core.harness import quick_key, same_arrays
from tests.nn.matrix import close
from tests.nn.row import floats

IMAGES, LABELS = floats(4, 8, 8, 3), jnp.array([0, 2, 1, 2])
uniform = jax.nn.initializers.uniform(0.5)


def same(program: Callable[[Any], Any]) -> None:
    """Runs a program of `nn` alone in both namespaces."""
    same_arrays(program, shardflax.nn, flax.linen)


# --- a ResNet: residual blocks, batch statistics


def resnet(nn: Any, **options: Any) -> Any:
    class Block(nn.Module):
        filters: int
        strides: int
        conv: Any
        norm: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
            y = self.norm(scale_init=nn.initializers.ones)(self.conv(self.filters, (3, 3))(y))
            if x.shape != y.shape:
                x = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
                x = self.norm(name="norm_proj")(x)
            return nn.relu(x + y)

    class ResNet(nn.Module):
        stages: tuple[int, ...] = (1, 1)
        filters: int = 8
        dtype: Any = None

        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            conv = partial(nn.Conv, use_bias=False, kernel_init=uniform, dtype=self.dtype)
            norm = partial(
                nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
            )
            x = conv(self.filters, (3, 3), padding=((1, 1), (1, 1)), name="stem")(x)
            x = nn.max_pool(nn.relu(norm(name="stem_norm")(x)), (2, 2), (2, 2), "SAME")
            for stage, blocks in enumerate(self.stages):
                for block in range(blocks):
                    strides = 2 if stage and not block else 1
                    x = Block(self.filters * 2**stage, strides, conv, norm)(x)
            x = nn.avg_pool(x, x.shape[1:3])[:, 0, 0]
            return nn.Dense(3, kernel_init=uniform, dtype=jnp.float32)(x)

    return ResNet(**options)


def train_step(model: Any, variables: Any, images: Any, labels: Any) -> tuple[Any, Any]:
    """One step of gradient descent: the loss, and the variables after it."""

    def loss_of(params: Any) -> Any:
        given = {**variables, "params": params}
        logits, updates = model.apply(given, images, train=True, mutable=["batch_stats"])
        scores = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1)), updates

    (loss, updates), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
    return loss, {"params": params, **updates}


def test_resnet() -> None:
    """Trained twice, then evaluated; a step in half precision too."""

    def program(nn: Any) -> Any:
        model = resnet(nn)
        variables = model.init(quick_key(0), IMAGES, train=False)
        steps = [variables]
        for images in (IMAGES, -IMAGES):
            loss, variables = train_step(model, variables, images, LABELS)
            steps += [loss, variables]
        small = resnet(nn, stages=(1,), dtype=jnp.bfloat16)
        narrow = small.init(quick_key(0), IMAGES, train=False)
        narrow = small.apply(narrow, IMAGES, train=True, mutable=["batch_stats"])
        return steps, model.apply(variables, IMAGES, train=False), narrow

    same(program)


def test_resnet_on_a_mesh() -> None:
    """The same step with the batch over all devices: statistics are the whole batch's."""
    model = resnet(shardflax.nn, stages=(1,))
    mesh, rules = make_mesh("data=2,fsdp=4"), preset("fsdp")
    images, labels = floats(8, 4, 4, 3), jnp.arange(8) % 3
    init = partial(model.init, quick_key(0), images, train=False)
    step = partial(train_step, model)
    expected = jax.jit(lambda: step(init(), images, labels))()
    state, _ = init_sharded(init, mesh=mesh, rules=rules)
    kernel = state["params"]["Block_0"]["Conv_0"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, None, "fsdp")
    with use(mesh, rules):
        batch = jax.device_put((images, labels), jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        close(jax.jit(step)(state, *batch), expected, tolerance=2e-4)


# --- a VAE: an encoder, noise, a decoder with transposed convolutions


def vae(nn: Any) -> Any:
    class Encoder(nn.Module):
        latents: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for features in (6, 8):
                x = nn.Conv(features, (3, 3), strides=2, kernel_init=uniform)(x)
                x = nn.gelu(nn.GroupNorm(num_groups=2)(x))
            x = jnp.reshape(x, (x.shape[0], -1))
            mean = nn.Dense(self.latents, name="mean", kernel_init=uniform)(x)
            return mean, nn.Dense(self.latents, name="log_variance", kernel_init=uniform)(x)

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, z: Any) -> Any:
            x = nn.PReLU()(nn.Dense(2 * 2 * 8, kernel_init=uniform)(z))
            x = jnp.reshape(x, (-1, 2, 2, 8))
            x = nn.ConvTranspose(6, (3, 3), (2, 2), kernel_init=uniform)(x)
            x = nn.silu(nn.InstanceNorm()(x))
            return nn.ConvTranspose(3, (4, 4), (2, 2), kernel_init=uniform)(x)

    class VAE(nn.Module):
        latents: int = 5

        def setup(self) -> None:
            self.encoder = Encoder(self.latents)
            self.decoder = Decoder()

        def __call__(self, x: Any) -> Any:
            mean, log_variance = self.encoder(x)
            noise = jax.random.normal(self.make_rng("noise"), mean.shape)
            self.sow("intermediates", "latents", mean)
            return self.decoder(mean + noise * jnp.exp(0.5 * log_variance)), mean, log_variance

        def generate(self, z: Any) -> Any:
            return nn.sigmoid(self.decoder(z))

    return VAE()


def negative_elbo(x: Any, y: Any, mean: Any, log_variance: Any) -> Any:
    divergence = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), axis=-1)
    return jnp.mean(jnp.sum((x - y) ** 2, axis=(1, 2, 3)) + divergence)


def test_vae() -> None:
    def program(nn: Any) -> Any:
        model, rngs = vae(nn), {"params": quick_key(0), "noise": quick_key(1)}
        variables = model.init(rngs, IMAGES)
        params = {"params": variables["params"]}

        def loss_of(params: Any) -> Any:
            noise = {"noise": quick_key(2)}
            outputs, sown = model.apply(params, IMAGES, rngs=noise, mutable=["intermediates"])
            return negative_elbo(IMAGES, *outputs), (outputs, sown)

        made = model.apply(params, floats(2, 5), method="generate")
        return variables, made, jax.value_and_grad(loss_of, has_aux=True)(params)

    same(program)
