"""Models as functions of a scope, and as modules: auto-encoders, tied weights, ResNets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.stories.teller import KEY, told

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def uniform(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
    return jax.random.uniform(key, shape, dtype, minval=-1.0)


def mlp(f: Any, scope: Any, x: Any, hidden: int, out: int) -> Any:
    x = scope.child(f.nn.dense, "hidden")(x, hidden, kernel_init=uniform)
    return scope.child(f.nn.dense, "out")(jax.nn.relu(x), out, kernel_init=uniform)


def test_an_auto_encoder_of_two_children() -> None:
    """The two halves have scopes of their own, so each can be run alone."""

    @dataclass(frozen=True)
    class AutoEncoder:
        f: Any
        latents: int = 2

        def __call__(self, scope: Any, x: Any) -> Any:
            return self.decode(scope, self.encode(scope, x), x.shape[-1])

        def encode(self, scope: Any, x: Any) -> Any:
            return scope.child(partial(mlp, self.f), "encoder")(x, 4, self.latents)

        def decode(self, scope: Any, z: Any, features: int) -> Any:
            return scope.child(partial(mlp, self.f), "decoder")(z, 4, features)

    def story(f: Any) -> Any:
        model = AutoEncoder(f)
        y, variables = f.init(model)(KEY, X)
        z = f.apply(model.encode)(variables, X)
        encoder_alone = {"params": {"encoder": variables["params"]["encoder"]}}
        return [
            y, variables, z, f.apply(model.decode)(variables, z, 3),
            f.apply(model.encode)(encoder_alone, X),
        ]  # fmt: skip

    y, variables, z, decoded, alone = told(story)
    assert sorted(variables["params"]) == ["decoder", "encoder"]
    assert jnp.array_equal(y, decoded) and jnp.array_equal(z, alone)


def test_an_auto_encoder_made_in_setup() -> None:
    """A module with `setup` has the same shape: methods that share submodules."""

    def story(f: Any) -> Any:
        nn = f.linen

        class AutoEncoder(nn.Module):
            latents: int = 2

            def setup(self) -> None:
                self.encoder = nn.Dense(self.latents, kernel_init=uniform)
                self.decoder = nn.Dense(3, kernel_init=uniform)

            def __call__(self, x: Any) -> Any:
                return self.decode(self.encode(x))

            def encode(self, x: Any) -> Any:
                return nn.relu(self.encoder(x))

            def decode(self, z: Any) -> Any:
                return self.decoder(z)

        model = AutoEncoder()
        variables = model.init(KEY, X)
        bound = model.bind(variables)
        return variables, model.apply(variables, X), bound.decode(bound.encode(X))

    _, y, again = told(story)
    assert jnp.array_equal(y, again)


def test_tied_weights_by_transposing_the_variables() -> None:
    """The decoder *is* the encoder, on variables that are transposed on their way in and out."""

    def transposed(variables: Any) -> Any:
        return jax.tree.map(jnp.transpose, variables)

    def story(f: Any) -> Any:
        def model(scope: Any, x: Any) -> Any:
            dense = partial(f.nn.dense, bias=False, kernel_init=uniform)
            z = scope.child(dense, "tied")(x, 2)
            back = f.lift.map_variables(dense, "params", transposed, transposed)
            return z, back(scope.push("tied", reuse=True), z, 3)

        return f.init(model)(KEY, X)

    (z, y), variables = told(story)
    kernel = variables["params"]["tied"]["kernel"]
    assert kernel.shape == (3, 2)
    assert jnp.allclose(y, z @ kernel.T)


def test_a_transform_of_ones_own() -> None:
    """`pack` lifts whatever is written: here, every matrix of a collection is transposed."""

    def story(f: Any) -> Any:
        def lift_transpose(fn: Any, target: Any = "params") -> Any:
            def inner(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, *args: Any) -> Any:
                picked, rest = variables
                scope = scope_fn((jax.tree.map(jnp.transpose, picked), rest), rngs)
                y = fn(scope, *args)
                return y, repack_fn(scope)

            return f.lift.pack(
                inner,
                in_variable_filters=(target, True),
                out_variable_filters=(False,),
                rng_filters=(True,),
            )

        def model(scope: Any, x: Any) -> Any:
            dense = partial(f.nn.dense, bias=False)
            z = scope.child(dense, "tied")(x, 2, kernel_init=uniform)
            return lift_transpose(dense)(scope.push("tied", reuse=True), z, 3)

        _, variables = f.init(model)(KEY, X)
        return variables, f.apply(model)(variables, X)

    variables, y = told(story)
    kernel = variables["params"]["tied"]["kernel"]
    assert jnp.allclose(y, X @ kernel @ kernel.T, atol=1e-6)


IMAGE = jnp.asarray(np.linspace(-1.0, 1.0, 2 * 4 * 4 * 2).reshape(2, 4, 4, 2), jnp.float32)


def block(f: Any, scope: Any, x: Any, features: int, train: bool = True) -> Any:
    """A residual block: convolution, batch norm, relu, twice, and the input added."""
    conv = partial(f.nn.conv, kernel_size=(3, 3), bias=False, kernel_init=uniform)
    norm = partial(f.nn.batch_norm, use_running_average=not train, momentum=0.9)
    y = scope.child(conv, "conv_1")(x, features)
    y = jax.nn.relu(scope.child(norm, "norm_1")(y))
    y = scope.child(norm, "norm_2")(scope.child(conv, "conv_2")(y, features))
    if x.shape != y.shape:
        x = scope.child(partial(f.nn.conv, kernel_size=(1, 1), bias=False), "project")(
            x, features, kernel_init=uniform
        )
    return jax.nn.relu(x + y)


def test_a_residual_network() -> None:
    """State and parameters live side by side; only the state changes in training."""

    def story(f: Any) -> Any:
        def resnet(scope: Any, x: Any, train: bool = True) -> Any:
            for features in (2, 3):
                x = scope.child(partial(block, f), prefix="block_")(x, features, train=train)
            return scope.child(f.nn.dense, "head")(x.mean((1, 2)), 2, kernel_init=uniform)

        _, shapes = jax.eval_shape(f.init(resnet), KEY, IMAGE)
        variables = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes)
        y, state = jax.jit(f.apply(resnet, mutable=["batch_stats"]))(variables, IMAGE)
        later = jax.eval_shape(f.apply(partial(resnet, train=False)), variables, IMAGE)
        return jax.tree.map(jnp.shape, variables), y.round(3), jax.tree.map(jnp.shape, state), later

    shapes, _, state, _ = told(story)
    assert sorted(shapes["params"]) == ["block_0", "block_1", "head"]
    assert "project" in shapes["params"]["block_1"] and "project" not in shapes["params"]["block_0"]
    assert sorted(state) == ["batch_stats"]


def test_a_residual_network_of_any_depth() -> None:
    """Levels of scans with rematerialisation: memory and compile time of 8 blocks as of 2."""

    def story(f: Any) -> Any:
        def one(scope: Any, x: Any) -> Any:
            y = scope.child(f.nn.dense, "dense")(x, x.shape[-1], kernel_init=uniform)
            return x + jax.nn.relu(y)

        def deep(scope: Any, x: Any) -> Any:
            stack = f.lift.remat_scan(one, lengths=(2, 2, 2))
            return stack(scope.push("blocks"), x)

        shapes = jax.eval_shape(f.init(deep), KEY, X)
        variables = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes[1])
        y = jax.jit(f.apply(deep))(variables, X)
        return jax.tree.map(jnp.shape, variables), y.round(4)

    shapes, _ = told(story)
    assert shapes["params"]["blocks"]["dense"]["kernel"] == (2, 2, 2, 3, 3)
