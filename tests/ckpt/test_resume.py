"""A run that is restored goes on bit for bit; in another layout, within tolerance."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardflax import partitioning
from shardflax.ckpt import CheckpointManager
from shardflax.partitioning import LogicallyPartitioned
from shardflax.training import (
    OptimizerConfig,
    TrainState,
    cross_entropy,
    make_optimizer,
    make_train_step,
)
from tests.core.harness import quick_key

TX = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=2, total_steps=20))
BATCH = np.arange(128, dtype=np.int32).reshape(8, 16) % 32


def init(key: jax.Array) -> TrainState:
    """Two layers with logical names, bf16 and f32."""
    one, two, three = jax.random.split(key, 3)
    params = {
        "embedding": LogicallyPartitioned(jax.random.normal(one, (32, 16)), ("vocab", "embed")),
        "up": LogicallyPartitioned(jax.random.normal(two, (16, 64)) / 4, ("embed", "mlp")),
        "down": LogicallyPartitioned(
            (jax.random.normal(three, (64, 16)) / 8).astype(jnp.bfloat16), ("mlp", "embed")
        ),
    }
    return TrainState.create(apply_fn=None, params=params, tx=TX)


def loss(params: Any, batch: Any, rngs: Any) -> Any:
    """Next token, with dropout."""
    x = params["embedding"][batch]
    h = jax.nn.relu(x @ params["up"])
    h = h * jax.random.bernoulli(rngs["dropout"], 0.9, h.shape)
    logits = (h @ params["down"].astype(jnp.float32) + x) @ params["embedding"].T
    return cross_entropy(logits, jnp.roll(batch, -1, -1), z_loss=1e-4)


def compiled(mesh: Any, rules: Any, layout: Any) -> Any:
    """The train step for a layout."""
    step = jax.jit(
        make_train_step(loss, accumulate=2, seed=1),
        donate_argnums=0,
        out_shardings=(layout.shardings, None),
    )
    with partitioning.use(mesh, rules):
        return step.lower(layout.abstract, jax.ShapeDtypeStruct(BATCH.shape, BATCH.dtype)).compile()


def steps(step: Any, state: Any, count: int) -> tuple[Any, list[float]]:
    """The state after some steps, and their losses."""
    losses = []
    for _ in range(count):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    return state, losses


def test_a_restored_run_repeats_the_losses(tmp_path: Path) -> None:
    mesh, rules = partitioning.make_mesh("data=2,fsdp=2,tensor=2"), partitioning.preset("fsdp_tp")
    state, layout = partitioning.init_sharded(init, quick_key(0), mesh=mesh, rules=rules)
    step = compiled(mesh, rules, layout)
    with CheckpointManager(tmp_path) as manager:
        state, _ = steps(step, state, 4)
        manager.save(4, state)
        _, want = steps(step, state, 4)  # donates what is being saved
        assert want == sorted(want, reverse=True) and want[0] > want[-1]

        restored = manager.restore(layout.abstract).state
        assert jax.tree.structure(restored) == jax.tree.structure(layout.abstract)
        assert steps(step, restored, 4)[1] == want

        mesh, rules = partitioning.make_mesh("fsdp=8"), partitioning.preset("fsdp")
        other = partitioning.abstract_layout(init, quick_key(0), mesh=mesh, rules=rules)
        restored = manager.restore(other.abstract).state
        assert restored.params["up"].sharding == other.shardings.params["up"]
        got = steps(compiled(mesh, rules, other), restored, 4)[1]
        np.testing.assert_allclose(got, want, rtol=2e-3)
