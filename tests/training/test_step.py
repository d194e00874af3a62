"""The train step: accumulation, keys, metrics, donation, and where the rows go."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax.training.errors import BatchSplitError, MetricsError
from shardflax.training.losses import cross_entropy
from shardflax.training.step import global_norm, make_eval_step, make_train_step
from shardflax.training.train_state import TrainState


def loss_fn(params: Any, batch: Any, rngs: Any) -> Any:
    """A linear classifier with weighted targets."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    return cross_entropy(logits, batch["y"], weights=batch["w"], z_loss=1e-3)


TX = optax.adam(1e-2)


def new_state(dtype: Any = np.float32) -> TrainState:
    """Parameters of 6 x 5."""
    kernel = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    params = {"kernel": kernel.astype(dtype), "bias": np.zeros(5, dtype)}
    return TrainState.create(apply_fn=None, params=params, tx=TX)


def new_batch(rows: int = 48) -> Any:
    """Rows whose weights differ from microbatch to microbatch."""
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(rows, 6)).astype(np.float32),
        "y": rng.integers(5, size=rows).astype(np.int32),
        "w": rng.integers(4, size=rows).astype(np.float32),
    }


@functools.cache
def jitted(loss: Any = loss_fn, **options: Any) -> Any:
    """The train step, compiled once for all tests."""
    return jax.jit(make_train_step(loss, **options))


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_accumulation_is_the_whole_batch(accumulate: int) -> None:
    batch = new_batch()
    want_state, want = jitted()(new_state(), batch)
    state, metrics = jitted(accumulate=accumulate)(new_state(), batch)
    assert metrics.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(metrics[name], want[name], rtol=2e-6, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (state, want_state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_microbatches_without_a_weight_count_alike_and_one_of_weight_zero_not_at_all() -> None:
    def plain(params: Any, batch: Any, rngs: Any) -> Any:
        loss, metrics = cross_entropy(batch["x"] @ params["kernel"], batch["y"])
        return loss, {"accuracy": metrics["accuracy"]}

    batch = new_batch()
    want = jitted(plain)(new_state(), batch)[1]
    got = jitted(plain, accumulate=4)(new_state(), batch)[1]
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)

    batch["w"][::2] = 0.0  # the rows of microbatch 0 of 2
    want = jitted()(new_state(), batch)[1]
    got = jitted(accumulate=2)(new_state(), batch)[1]
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-6, err_msg=name)


def test_what_is_overwritten_is_the_largest_of_all_microbatches_and_no_gradient() -> None:
    def loss(params: Any, batch: Any, rngs: Any) -> Any:
        peak = params["_overwrite_with_gradient"]["peak"]  # whose gradient is the largest value
        return jnp.mean(batch) * params["params"]["w"] + peak * jnp.max(batch), {}

    params = {"params": {"w": jnp.ones(())}, "_overwrite_with_gradient": {"peak": jnp.ones(())}}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0))
    state, metrics = jitted(loss, accumulate=2)(state, jnp.array([1.0, 3.0, 2.0, 2.0]))
    assert jax.tree.map(float, state.params) == {
        "params": {"w": -1.0},
        "_overwrite_with_gradient": {"peak": 3.0},
    }
    assert float(metrics["grad_norm"]) == 2.0


def test_the_norm_of_complex_gradients() -> None:
    assert float(global_norm({"a": jnp.array([3 + 4j]), "b": jnp.array([12.0])})) == 13.0


def test_bf16_gradients_are_summed_in_f32() -> None:
    batch = new_batch(256)
    exact = jitted()(new_state(), batch)[0].opt_state[0].mu["kernel"]
    state, _ = jitted(accumulate=64)(new_state(jnp.bfloat16), batch)
    got = state.opt_state[0].mu["kernel"]
    assert state.params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, rtol=0.05, atol=2e-4)


def test_every_microbatch_lies_on_all_devices_and_no_row_moves() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    batch, state = jax.device_put(new_batch(), rows), jax.device_put(new_state(), everywhere)
    step = jax.jit(make_train_step(loss_fn, accumulate=3), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute", str(compiled.as_text()))
    want = jitted()(new_state(), new_batch())[1]["loss"]
    np.testing.assert_allclose(compiled(state, batch)[1]["loss"], want, rtol=2e-6)


def test_explicit_axes() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        batch = jax.device_put(new_batch(), PartitionSpec("data"))
        state = jax.device_put(new_state(), PartitionSpec())
        got = jax.jit(make_train_step(loss_fn, accumulate=3))(state, batch)[1]
    want = jitted()(new_state(), new_batch())[1]
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-6)


def draws(params: Any, batch: Any, rngs: Any) -> Any:
    """Metrics that show the keys."""
    return jnp.sum(params["bias"]), {name: jax.random.uniform(key) for name, key in rngs.items()}


def test_keys_follow_seed_step_and_stream_alone() -> None:
    options: Any = {"streams": ("dropout", "noise"), "seed": 3}
    state, seen, step = new_state(), [], jitted(draws, **options)
    for _ in range(3):
        state, metrics = step(state, new_batch())
        seen.append((float(metrics["dropout"]), float(metrics["noise"])))
    assert len({x for pair in seen for x in pair}) == 6
    resumed = new_state().replace(step=jnp.int32(2))
    metrics = step(resumed, new_batch())[1]
    assert (float(metrics["dropout"]), float(metrics["noise"])) == seen[2]
    other = jitted(draws, seed=4)(new_state(), new_batch())[1]
    assert float(other["dropout"]) != seen[0][0]


def test_microbatches_draw_differently() -> None:
    one = jitted(draws, seed=4)(new_state(), new_batch())[1]["dropout"]
    two = jitted(draws, seed=4, accumulate=2)(new_state(), new_batch())[1]["dropout"]
    assert float(one) != float(two)


def test_metrics_and_learning_rate() -> None:
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    step = jax.jit(make_train_step(loss_fn, schedule=schedule), donate_argnums=0)
    state = new_state()
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, new_batch(), {})[0]))(state.params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(jax.device_get(grads))))
    state, first = step(state, new_batch())
    _, second = step(state, new_batch())
    np.testing.assert_allclose(first["grad_norm"], norm, rtol=1e-6)
    assert [float(m["learning_rate"]) for m in (first, second)] == pytest.approx([0.0, 0.1])
    assert all(v.dtype == jnp.float32 and v.shape == () for v in first.values())


def test_it_is_traced_once_and_donates() -> None:
    traces = []

    def counted(params: Any, batch: Any, rngs: Any) -> Any:
        traces.append(1)
        return loss_fn(params, batch, rngs)

    step = jax.jit(make_train_step(counted, accumulate=4), donate_argnums=0)
    state = jax.device_put(new_state())
    for _ in range(3):
        before, (state, _) = state, step(state, new_batch())
    assert len(traces) == 1 and before.params["kernel"].is_deleted()


def test_a_batch_that_does_not_divide_names_both() -> None:
    with pytest.raises(BatchSplitError, match=r"accumulate=5 .* 48 rows .*'w'"):
        make_train_step(loss_fn, accumulate=5)(new_state(), new_batch())
    for accumulate in (0, 2.5):
        with pytest.raises(ValueError, match="accumulate"):
            make_train_step(loss_fn, accumulate=accumulate)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"streams=\('dropout',\)"):
        make_train_step(loss_fn, streams="dropout")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda: jnp.ones(()), "returned a"),
        (lambda: (jnp.ones(3), {}), r"loss has shape \(3,\)"),
        (lambda: (jnp.ones((), int), {}), "loss has dtype int32"),
        (lambda: (jnp.ones(()), {"per_row": jnp.ones(3)}), r"aux\['per_row'\]"),
        (lambda: (jnp.ones(()), {"loss": 1.0}), "'loss'"),
    ],
)
def test_results_of_another_form_are_refused(result: Any, message: str) -> None:
    with pytest.raises(MetricsError, match=message):
        make_train_step(lambda p, b, r: result())(new_state(), new_batch())


def test_eval_step_draws_nothing_and_changes_nothing() -> None:
    seen = []

    def f(params: Any, batch: Any, rngs: Any) -> Any:
        seen.append(rngs)
        return loss_fn(params, batch, rngs)

    metrics = jax.jit(make_eval_step(f))(new_state(), new_batch())
    want = jitted()(new_state(), new_batch())[1]
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-6)
    assert seen == [{}] and "grad_norm" not in metrics


def test_global_norm_of_nothing_is_zero() -> None:
    assert float(global_norm({})) == 0.0
