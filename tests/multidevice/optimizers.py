"""Every optimizer and transformation that optax ships: how to make it, and what a step gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
from optax.experimental import aggregating

from tests.core.harness import quick_key

MODULES = (optax, contrib, aggregating)
RATE = 0.1

# Public functions that make no transformation, and do not say what they return.
OTHERS = {
    "average_per_element_updates",
    "bias_correction",
    "get_batch_size_from_per_elt_updates",
    "get_per_element_mean_and_sum_sq_diff_grads",
    "get_unbiased_mean_and_variance_ema",
    "matrix_inverse_pth_root",
    "schedule_free_eval_params",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}


def shipped() -> set[str]:
    """The names of the public functions of optax that make a transformation."""
    return {
        name
        for module in MODULES
        for name, function in vars(module).items()
        if name[0].islower() and callable(function) and _makes(function)
    } - OTHERS


def _makes(function: Any) -> bool:
    said = inspect.signature(function).return_annotation
    return said is inspect.Signature.empty or "GradientTransformation" in str(said)


def always(*_: Any, **__: Any) -> Any:
    return jnp.bool_(True)


def total(tree: Any, *_: Any, **__: Any) -> jax.Array:
    return sum(map(jnp.sum, jax.tree.leaves(tree)), jnp.float32(0))


def squares(tree: Any, *_: Any, **__: Any) -> Any:
    return jax.tree.map(jnp.square, tree)


def loss(params: Any, *_: Any, **__: Any) -> jax.Array:
    """Of any parameters: they should be a half."""
    return total(jax.tree.map(lambda x: (x - 0.5) ** 2, params))


def step(name: str, tx: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """One update of parameters and state, with gradients and arguments as the case wants them."""
    trained = params.fast if isinstance(params, optax.LookaheadParams) else params
    value, grads = jax.value_and_grad(loss)(trained)
    extra: dict[str, Any] = {"value": value, "grad": grads, "value_fn": loss}
    if name in PER_EXAMPLE:
        grads = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), grads)
    if name in PER_EXAMPLE or name == "sam":
        extra = {}
    elif name in ("hutchinson_estimator_diag_hessian", "sophia"):
        extra = {"obj_fn": loss}
    elif name == "track_per_element_mean_and_variance_with_ema":
        extra = {"sum_sq_diff_grads": grads, "sample_size": 2}
    update = optax.with_extra_args_support(tx).update
    updates, state = update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


PER_EXAMPLE = {
    "add_mean_variance_to_opt",
    "average_incrementally_updates",
    "differentially_private_aggregate",
    "dpsgd",
    "process",
}

# Those that need no argument but a learning rate, if that.
PLAIN = (
    "adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad centralize fromage identity "
    "keep_params_nonnegative lamb lars lion nadam nadamw normalize_by_update_norm novograd "
    "optimistic_adam optimistic_adam_v2 optimistic_gradient_descent polyak_sgd radam rmsprop rprop "
    "scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad "
    "scale_by_belief scale_by_distance_over_gradients scale_by_learning_rate scale_by_lion "
    "scale_by_novograd scale_by_optimistic_gradient scale_by_param_block_norm "
    "scale_by_param_block_rms scale_by_polyak scale_by_radam scale_by_rms scale_by_rprop "
    "scale_by_rss scale_by_sign scale_by_sm3 scale_by_stddev scale_by_trust_ratio scale_by_yogi "
    "set_to_zero sgd sign_sgd signum sm3 yogi zero_nans "
    "acprop ademamix adopt cocob dadapt_adamw dog dowg madgrad momo momo_adam normalize "
    "prodigy reduce_on_plateau scale_by_acprop scale_by_ademamix scale_by_adopt scale_by_cocob "
    "scale_by_madgrad scale_by_simplified_ademamix schedule_free_adamw schedule_free_sgd "
    "simplified_ademamix track_per_element_mean_and_variance_with_ema"
)


def _plain(name: str) -> Callable[[], Any]:
    function = next(vars(module)[name] for module in MODULES if name in vars(module))
    needs = "learning_rate" in inspect.signature(function).parameters
    return lambda: function(learning_rate=RATE) if needs else function()


def _adam() -> Any:
    return optax.adam(RATE)


def _momentum() -> Any:
    return optax.sgd(RATE, momentum=0.9)


def _key() -> jax.Array:
    return quick_key(0)


def _sum(update: Any, param: Any) -> Any:
    return update + param


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)


KERNELS = {"layer": {"kernel": True}, "table": False}
LABELS = {"layer": {"kernel": "a"}, "table": "b"}

CASES: dict[str, Callable[[], Any]] = {name: _plain(name) for name in PLAIN.split()}
CASES |= {
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=4, momentum=0.9),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1, mask=KERNELS),
    "add_noise": lambda: optax.add_noise(0.01, 0.5, key=_key()),
    "apply_every": lambda: optax.apply_every(2),
    "apply_if_finite": lambda: optax.apply_if_finite(_adam(), 3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), _adam()),
    "clip": lambda: optax.clip(0.1),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "conditionally_mask": lambda: optax.conditionally_mask(_momentum(), always),
    "conditionally_transform": lambda: optax.conditionally_transform(_momentum(), always),
    "ema": lambda: optax.ema(0.9),
    "flatten": lambda: optax.flatten(_momentum()),
    "freeze": lambda: optax.freeze(KERNELS),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(RATE),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adamw)(RATE),
    "lbfgs": lambda: optax.lbfgs(
        memory_size=3, linesearch=optax.scale_by_backtracking_linesearch(2)
    ),
    "lookahead": lambda: optax.lookahead(_momentum(), 2, 0.5),
    "masked": lambda: optax.masked(_adam(), KERNELS),
    "measure_with_ema": lambda: optax.measure_with_ema(squares, 0.9),
    "monitor": lambda: optax.monitor({"mean": optax.measure_with_ema(total, 0.9)}),
    "multi_transform": lambda: optax.multi_transform({"a": _adam(), "b": _momentum()}, LABELS),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", _adam())),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=_key()),
    "partition": lambda: optax.partition({"a": _adam(), "b": _momentum()}, LABELS),
    "scale": lambda: optax.scale(0.1),
    "scale_by_backtracking_linesearch": lambda: optax.scale_by_backtracking_linesearch(2),
    "scale_by_factored_rms": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=4),
    "scale_by_lbfgs": lambda: optax.scale_by_lbfgs(3),
    "scale_by_schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(0.1, 0.0, 9)),
    "scale_by_zoom_linesearch": lambda: optax.scale_by_zoom_linesearch(2),
    "selective_transform": lambda: optax.selective_transform(_adam(), freeze_mask=KERNELS),
    "snapshot": lambda: optax.snapshot("sum", total),
    "stateless": lambda: optax.stateless(lambda updates, params: updates),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(_sum),
    "trace": lambda: optax.trace(0.9, nesterov=True),
    "with_extra_args_support": lambda: optax.with_extra_args_support(_adam()),
    # contrib
    "differentially_private_aggregate": lambda: contrib.differentially_private_aggregate(
        1.0, 0.1, key=_key()
    ),
    "dpsgd": lambda: contrib.dpsgd(RATE, 1.0, 0.1, 0, momentum=0.9),
    "galore": lambda: contrib.galore(RATE, rank=4),
    "hutchinson_estimator_diag_hessian": lambda: contrib.hutchinson_estimator_diag_hessian(_key()),
    "mechanize": lambda: contrib.mechanize(_adam()),
    "sam": lambda: contrib.sam(_momentum(), optax.sgd(0.1)),
    "scale_by_galore": lambda: contrib.scale_by_galore(rank=4),
    "muon": lambda: contrib.muon(RATE, ns_steps=1),
    "scale_by_muon": lambda: contrib.scale_by_muon(ns_steps=1, weight_dimension_numbers=_matrices),
    "schedule_free": lambda: contrib.schedule_free(_momentum(), RATE),
    "sophia": lambda: contrib.sophia(
        RATE, hessian_diagonal_fn=contrib.hutchinson_estimator_diag_hessian(_key())
    ),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(_adam()),
    # experimental
    "accumulate_avg_updates": lambda: aggregating.accumulate_avg_updates(2),
    "add_mean_variance_to_opt": lambda: aggregating.add_mean_variance_to_opt(_adam()),
    "average_incrementally_updates": lambda: aggregating.average_incrementally_updates(0, 2),
    "process": lambda: aggregating.process(
        optax.identity(), aggregating.average_per_element_updates(), _adam()
    ),
    # A class, and options that add a kind of state.
    "MultiSteps": lambda: optax.MultiSteps(_adam(), 2).gradient_transformation(),
    "adamw, masked decay": lambda: optax.adamw(RATE, mask=KERNELS),
    "sgd, momentum": _momentum,
    "rmsprop, centered": lambda: optax.rmsprop(RATE, centered=True, momentum=0.9),
}


def started(name: str, params: Any) -> Any:
    """The parameters as the case wants them, its transformation, and that one's first state."""
    tx = CASES[name]()
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    state = tx.init(params)
    if name == "monitor":  # its state has measurements only after an update
        state = step(name, tx, params, state)[1]
    return params, tx, state


def groups(size: int) -> list[tuple[str, ...]]:
    """All cases, some at a time: what cases have in common is compiled once."""
    names = tuple(CASES)
    return [names[start : start + size] for start in range(0, len(names), size)]


def plain(x: Any) -> np.ndarray:
    """An array of numbers, of a key as well."""
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if key else x)
