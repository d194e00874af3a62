"""A model with names of one's own, rules of one's own, and what the mesh makes of them.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/own_rules.py
"""

import jax
import jax.numpy as jnp
import optax

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.training import TrainState, make_train_step


class Autoencoder(nn.Module):
    """Squeezes its input through a narrow layer."""

    width: int
    code: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(features: int, names: tuple[str, str]) -> nn.Dense:
            return nn.Dense(features, kernel_axes=names, out_axes=("batch", names[1]))

        x = nn.gelu(layer(self.width, ("pixels", "wide"))(x))
        x = layer(self.code, ("wide", "code"))(x)
        x = nn.gelu(layer(self.width, ("code", "wide"))(x))
        return layer(64, ("wide", "pixels"))(x)


RULES = partitioning.AxisRules(
    {"batch": "data", "wide": "tensor", "pixels": None, "code": None}, title="autoencoder"
)


def main() -> None:
    """Trains it for some steps, sharded over whatever devices there are."""
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    mesh = partitioning.make_mesh(f"data=-1,tensor={tensor}")
    model, images = Autoencoder(width=32, code=4), jax.random.normal(jax.random.key(1), (16, 64))

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, images)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))

    state, layout = partitioning.init_sharded(init, jax.random.key(0), mesh=mesh, rules=RULES)
    print(layout)

    def loss(params: object, batch: jax.Array, rngs: object) -> tuple[jax.Array, dict[str, object]]:
        return jnp.mean((model.apply({"params": params}, batch) - batch) ** 2), {}

    step = jax.jit(make_train_step(loss), donate_argnums=0)
    with partitioning.use(mesh, RULES):
        for i in range(101):
            state, metrics = step(state, images)
            if i % 50 == 0:
                print(f"step {i}: loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
