"""The train step and the eval step: pure functions of (state, batch), ready for `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardflax.training.errors import BatchSplitError, MetricsError
from shardflax.training.train_state import TrainState, join, separate

__all__ = ["EvalStep", "LossFn", "TrainStep", "global_norm", "make_eval_step", "make_train_step"]

LossFn = Callable[[Any, Any, dict[str, jax.Array]], tuple[jax.Array, Mapping[str, Any]]]
"""`loss_fn(params, batch, rngs) -> (loss, aux)`."""

WEIGHT = "weight"
TAKEN = ("loss", "grad_norm", "learning_rate")


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`(state, batch) -> (state, metrics)`; see `make_train_step`.  Equal settings are equal.

    >>> TrainStep(max) == TrainStep(max), TrainStep(max) == TrainStep(max, accumulate=2)
    (True, False)
    """

    loss_fn: LossFn
    accumulate: int = 1
    schedule: optax.Schedule | None = None
    seed: int = 0
    streams: tuple[str, ...] = ("dropout",)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update, traced into one computation."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        grad = jax.value_and_grad(self._checked_loss, has_aux=True)
        if self.accumulate == 1:
            (loss, aux), grads = grad(state.params, batch, self._rngs(key, 0))
        else:
            (loss, aux), grads = self._accumulated(grad, state.params, batch, key)
        metrics = {**aux, "loss": loss, "grad_norm": global_norm(separate(grads)[0])}
        if self.schedule is not None:
            metrics["learning_rate"] = jnp.asarray(self.schedule(state.step), jnp.float32)
        return state.apply_gradients(grads=grads), metrics

    def _checked_loss(self, params: Any, batch: Any, rngs: Any) -> tuple[jax.Array, dict[str, Any]]:
        """The loss function's result, in float32 and checked."""
        result = self.loss_fn(params, batch, rngs)
        checked = _check_result(result)
        if not jnp.issubdtype(jnp.result_type(result[0]), jnp.floating):  # without a gradient
            raise MetricsError(f"the loss has dtype {jnp.result_type(result[0])}")
        return checked

    def _rngs(self, key: jax.Array, microbatch: Any) -> dict[str, jax.Array]:
        """One key for each stream: a function of seed, step, microbatch and the stream's place."""
        key = jax.random.fold_in(key, microbatch)
        return {name: jax.random.fold_in(key, i) for i, name in enumerate(self.streams)}

    def _accumulated(self, grad: Any, params: Any, batch: Any, key: jax.Array) -> Any:
        """Loss, metrics and gradient as of the whole batch, by a scan over microbatches."""

        def body(total: Any, item: Any) -> Any:
            index, part = item
            (loss, aux), grads = grad(params, part, self._rngs(key, index))
            weight = jnp.asarray(aux.get(WEIGHT, 1.0), jnp.float32)
            grads, overwritten = separate(grads)
            sums = jax.tree.map(lambda t, g: t + weight * g.astype(t.dtype), total[0], grads)
            # The next scales have to fit every microbatch: the largest values count.
            return (sums, jax.tree.map(jnp.maximum, total[1], overwritten)), (weight, loss, aux)

        trained, overwritten = separate(params)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, _accumulator(p)), trained)
        parts = _split(batch, self.accumulate)
        (total, largest), (weights, losses, aux) = jax.lax.scan(
            body,
            (zeros, jax.tree.map(jnp.zeros_like, overwritten)),
            (jnp.arange(self.accumulate), parts),
        )
        scale = 1.0 / jnp.where(jnp.sum(weights) == 0, 1.0, jnp.sum(weights))
        shares = weights * scale
        grads = jax.tree.map(lambda t, p: (t * scale).astype(p.dtype), total, trained)
        means = {name: jnp.sum(values * shares) for name, values in aux.items()}
        if WEIGHT in aux:
            means[WEIGHT] = jnp.sum(weights)
        return (jnp.sum(losses * shares), means), join(params, grads, largest)


def make_train_step(
    loss_fn: LossFn,
    *,
    accumulate: int = 1,
    schedule: optax.Schedule | None = None,
    seed: int = 0,
    streams: tuple[str, ...] = ("dropout",),
) -> TrainStep:
    """A function `(state, batch) -> (state, metrics)` for `jax.jit(..., donate_argnums=0)`.

    `loss_fn(params, batch, rngs)` returns a scalar loss and a dict of scalar metrics; `rngs` has
    one key for each of `streams`, which depends on `seed` and `state.step` alone, so a resumed run
    draws what an uninterrupted one does.

    With `accumulate` > 1 the rows of the batch are dealt to that many microbatches in turn (row i
    goes to microbatch i mod accumulate: each one lies on all devices that the batch lies on), and
    one gradient is in memory beside their sum.  If the metrics have a "weight" (what the loss is a
    mean over, as `cross_entropy` has), loss, metrics and gradient are the means by that weight,
    which are those of the whole batch; otherwise microbatches count alike.

    `metrics` are the loss function's, averaged, with `loss`, `grad_norm` (before any clipping, of
    what is optimized) and, with a `schedule`, `learning_rate`: float32 scalars.

    Raises ValueError for `accumulate` < 1 and for `streams` that are no tuple; when called,
    BatchSplitError for a batch that `accumulate` does not divide and MetricsError for metrics that
    are not scalars, or a loss that is no real number.

    >>> state = TrainState.create(apply_fn=None, params=jnp.ones(3), tx=optax.sgd(0.1))
    >>> step = make_train_step(lambda w, x, rngs: (jnp.mean(x @ w), {}), accumulate=2)
    >>> state, metrics = jax.jit(step, donate_argnums=0)(state, jnp.ones((4, 3)))
    >>> float(metrics["loss"]), int(state.step)
    (3.0, 1)
    """
    if not isinstance(accumulate, int | np.integer) or accumulate < 1:
        raise ValueError(f"make_train_step: accumulate must be a number from 1, not {accumulate}.")
    if isinstance(streams, str):
        raise ValueError(f"make_train_step: streams must be a tuple: streams=({streams!r},).")
    return TrainStep(loss_fn, accumulate, schedule, seed, tuple(streams))


@dataclasses.dataclass(frozen=True)
class EvalStep:
    """`(state, batch) -> metrics`; see `make_eval_step`.

    >>> EvalStep(max) == EvalStep(max)
    True
    """

    loss_fn: LossFn

    def __call__(self, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        """The metrics of one batch."""
        loss, aux = _check_result(self.loss_fn(state.params, batch, {}))
        return {**aux, "loss": loss}


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """A function `(state, batch) -> metrics` for `jax.jit`; `loss_fn` gets no rngs.

    >>> state = TrainState.create(apply_fn=None, params=jnp.ones(3), tx=optax.sgd(0.1))
    >>> step = make_eval_step(lambda w, x, rngs: (jnp.mean(x @ w), {}))
    >>> float(jax.jit(step)(state, jnp.ones((4, 3)))["loss"])
    3.0
    """
    return EvalStep(loss_fn)


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, in float32.

    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0], jnp.bfloat16)}))
    5.0
    """
    sizes = [jnp.abs(x) if jnp.iscomplexobj(x) else x for x in jax.tree.leaves(tree)]
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in sizes]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _accumulator(param: Any) -> Any:
    """The dtype to sum gradients in: at least float32."""
    return jnp.promote_types(param.dtype, jnp.float32)


def _split(batch: Any, parts: int) -> Any:
    """The batch as (parts, rows / parts, ...): the rows dealt in turn.

    Dim 0 becomes (rows / parts, parts), so that the major dim keeps the sharding of the rows and
    nothing moves between devices.
    """

    def split(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = jnp.shape(x)
        if not shape or shape[0] % parts:
            raise BatchSplitError(name, shape[0] if shape else 0, parts)
        return jnp.swapaxes(jnp.reshape(x, (shape[0] // parts, parts, *shape[1:])), 0, 1)

    return jax.tree_util.tree_map_with_path(split, batch)


def _check_result(result: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and metrics in float32; raises MetricsError."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise MetricsError(f"the loss function returned a {type(result).__name__}")
    loss, aux = result
    for name, value in {"loss": loss, **{f"aux[{k!r}]": v for k, v in aux.items()}}.items():
        if jnp.shape(value):
            raise MetricsError(f"{name} has shape {jnp.shape(value)}")
    if taken := sorted(set(aux) & set(TAKEN)):
        raise MetricsError(f"aux has the key {taken[0]!r}")
    scalars = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}
    return jnp.asarray(loss, jnp.float32), scalars
