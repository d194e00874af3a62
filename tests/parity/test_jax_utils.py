"""Utilities over devices, training helpers and schedules, against Flax's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import flax.jax_utils
import flax.training.common_utils
import flax.training.early_stopping
import flax.training.lr_schedule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardflax import jax_utils
from shardflax.training import common_utils, early_stopping, lr_schedule
from tests.core.harness import assert_equal, plain, quick_key, registry

program, PROGRAMS = registry()


def namespace(*modules: Any) -> SimpleNamespace:
    return SimpleNamespace(**{k: v for module in modules for k, v in vars(module).items()})


OURS = namespace(jax_utils, common_utils, early_stopping, lr_schedule)
_theirs = flax.training
THEIRS = namespace(
    flax.jax_utils, _theirs.common_utils, _theirs.early_stopping, _theirs.lr_schedule
)


@pytest.mark.filterwarnings("ignore:use jax.lax.pmean:DeprecationWarning")
@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_flax(run: Any) -> None:
    assert_equal(plain(run(OURS)), plain(run(THEIRS)))


@program
def replicas(u: Any) -> Any:
    tree = {"a": np.arange(3.0), "s": 2.0, "b": jnp.ones(2, jnp.bfloat16)}
    copies = u.replicate(tree)
    some = u.replicate(tree, jax.devices()[2:4])
    placed = [
        [sorted(d.id for d in x.sharding.device_set), x.addressable_shards[0].data.shape]
        for x in jax.tree.leaves([copies, some])
    ]
    return copies, some, placed, u.unreplicate(copies), u.unreplicate(some)


@program
def prefetched(u: Any) -> Any:
    taken: list[int] = []

    def batches() -> Any:
        for i in range(4):
            taken.append(i)
            yield {"x": np.full((8, 2), i)}

    stream = u.prefetch_to_device(batches(), 2)
    first = next(stream)
    shards = [shard.data.shape for shard in first["x"].addressable_shards]
    return first, shards, list(taken), list(stream), list(u.prefetch_to_device(iter([]), 2))


@program
def by_shape(u: Any) -> Any:
    def fn(x: Any, y: Any = 0) -> Any:
        return x + y, jnp.zeros(x.shape[::-1]) + y, {"n": jnp.arange(2)}

    return [
        u.partial_eval_by_shape(fn, [(2, 3)]),
        u.partial_eval_by_shape(fn, [((2, 3), jnp.int32)], 4),
        u.partial_eval_by_shape(fn, [(4,)], y=3),
        u.partial_eval_by_shape(jax.jit(fn), [((2,), jnp.bfloat16)]),
    ]  # fmt: skip


@program
def scans(u: Any) -> Any:
    x = jnp.arange(24.0).reshape(2, 3, 4)

    def body(carry: Any, x: Any) -> Any:
        return 0.5 * carry + x.sum(), {"y": 2 * x + carry, "n": carry}

    def doubled(carry: Any, x: Any) -> Any:
        return 0.5 * carry + x.sum(), 2 * x + carry

    return [
        u.scan_in_dim(body, 0.0, x), u.scan_in_dim(doubled, 0.0, x, axis=1, unroll=2),
        u.scan_in_dim(doubled, 0.0, x, axis=(0, 1)), u.scan_in_dim(doubled, 0.0, x, axis=(-1, 0)),
        u.scan_in_dim(doubled, 0.0, x, axis=(1,), keepdims=True),
        u.scan_in_dim(doubled, 0.0, {"x": x}["x"], axis=(2, 0), unroll=(2, 1), keepdims=True),
    ]  # fmt: skip


@program
def padded(u: Any) -> Any:
    shapes: list[Any] = []

    def fn(params: Any, x: Any, k: Any = 1) -> Any:
        shapes.append(jax.tree.map(np.shape, (x, k)))
        return {"y": jax.tree.map(lambda x: x * params, x)}

    both = {"a": np.arange(3.0), "b": np.ones((3, 2))}
    wrapped = u.pad_shard_unpad(fn)
    static = u.pad_shard_unpad(fn, static_argnames=("k",), static_return=True)
    last = u.pad_shard_unpad(lambda x, params: x, static_argnums=(1,))
    return [
        wrapped(2, np.arange(10.0)), wrapped(2, np.arange(8)), wrapped(2, both),
        wrapped(2, np.arange(3.0), min_device_batch=2), static(2, np.arange(16.0), k=4),
        wrapped(2, np.arange(9.0), k=np.arange(9.0)), last(np.arange(2), 5), shapes,
    ]  # fmt: skip


def test_batches_of_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"got \[3, 4\]"):
        jax_utils.pad_shard_unpad(lambda p, x, y: x)(2, np.arange(3), np.arange(4))


@program
def helpers(u: Any) -> Any:
    metrics = [u.replicate({"loss": 1.0}), u.replicate({"loss": 2.0})]
    labels = jnp.array([[0, 2], [1, 5]])
    return [
        u.shard({"x": np.arange(16.0)}), u.shard(np.ones((8, 3))).shape,
        u.shard_prng_key(quick_key(0)), u.stack_forest([{"a": np.ones(2)}, {"a": np.zeros(2)}]),
        u.get_metrics(metrics)["loss"], u.onehot(labels, 3), u.onehot(labels, 4, 0.9, 0.1),
        jax.vmap(lambda x: u.pmean({"x": x}, "i"), axis_name="i")(jnp.arange(4.0)),
    ]  # fmt: skip


@program
def early_stops(u: Any) -> Any:
    state = u.EarlyStopping(min_delta=0.1, patience=2)
    seen = []
    for metric in [1.0, 0.95, 0.91, 0.89, 0.88, 0.87, 0.86, 0.5]:
        state = state.update(metric)
        seen.append(
            [state.best_metric, state.patience_count, state.should_stop, state.has_improved]
        )
    back = state.reset()
    return seen, [back.best_metric, back.patience_count, back.should_stop, back.has_improved]


def test_early_stopping_unpacks() -> None:
    improved, state = early_stopping.EarlyStopping().update(3.0)
    assert improved and state.best_metric == 3.0


@program
def schedules(u: Any) -> Any:
    made = [
        u.create_constant_learning_rate_schedule(0.1, 10),
        u.create_constant_learning_rate_schedule(0.1, 10, 2.0),
        u.create_stepped_learning_rate_schedule(0.1, 10, [[1, 0.1], [3, 0.01]]),
        u.create_stepped_learning_rate_schedule(0.1, 10, [[1, 0.1], [3, 0.01]], 0.5),
        u.create_cosine_learning_rate_schedule(0.1, 10, 3),
        u.create_cosine_learning_rate_schedule(0.1, 10, 3, 1.0),
    ]
    steps = [0, 1, 5, 9, 10, 11, 20, 29, 30, 31, 45]
    return [[np.float32(fn(step)).round(6) for step in steps] for fn in made]
