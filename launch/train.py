"""Trains a decoder on text: `python -m launch.train --help`.

In acts: what is asked for is checked against the devices, the text and the last checkpoint, all on
abstract shapes; the state is made, or restored, in its layout; steps are taken; what came of it is
shown.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import multihost_utils

from launch.distributed import initialize_from_env, leaving_on_failure, progress_mode
from launch.history import History
from launch.options import ModelOptions, TrainOptions
from shardflax import partitioning
from shardflax.ckpt import CheckpointManager
from shardflax.core.errors import FlaxError
from shardflax.models import Decoder, DecoderConfig, decoder_config, generate
from shardflax.partitioning import AxisRules, Layout
from shardflax.training import TrainState, cross_entropy, make_optimizer, make_train_step
from shardflax.training import data as text

__all__ = ["Plan", "main", "plan_run", "train"]


# --- act 1: what is asked for


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that fits: its mesh, rules, model, text, and the layout of its state.

    Nothing in it is allocated on a device.
    """

    options: TrainOptions
    mesh: jax.sharding.Mesh
    rules: AxisRules
    config: DecoderConfig
    tx: Any
    windows: text.Windows
    batches: text.BatchLayout
    layout: Layout

    @property
    def model(self) -> Decoder:
        """The decoder."""
        return Decoder(self.config)

    def init_state(self, key: jax.Array) -> TrainState:
        """A state at step 0, with boxed parameters."""
        return _init_state(self.model, self.tx, self.batches, key)

    def loss(self, params: Any, batch: Any, rngs: Any = None) -> Any:
        """The loss of a batch, and metrics."""
        logits = self.model.apply({"params": params}, batch["inputs"])
        return cross_entropy(logits, batch["targets"], z_loss=self.options.run.z_loss)

    @property
    def step(self) -> Any:
        """The train step, compiled at its first call."""
        step = make_train_step(self.loss, accumulate=self.options.run.accumulate)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.layout.shardings, None))


def plan_run(options: TrainOptions) -> Plan:
    """Checks options against the devices and the text, on abstract shapes alone.

    Raises an error that says what does not fit, and what to write, for any option that is wrong.
    """
    mesh = partitioning.make_mesh(options.layout.mesh)
    rules = partitioning.preset(options.layout.preset)
    config = _model_config(options.model)
    shape = (options.data.batch, options.data.seq_len)
    batches = text.BatchLayout(*shape, partitioning.batch_sharding(mesh, rules))
    corpus = text.open_corpus(options.data.data, field=options.data.text_field)
    windows = text.Windows(corpus, options.data.seq_len)
    tx = make_optimizer(options.optimizer, options.run.steps)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key: jax.Array) -> TrainState:
        return _init_state(Decoder(config), tx, batches, key)

    layout = partitioning.abstract_layout(init, key, mesh=mesh, rules=rules)
    layout.check()
    plan = Plan(options, mesh, rules, config, tx, windows, batches, layout)
    with partitioning.use(mesh, rules):
        jax.eval_shape(plan.step, layout.abstract, _abstract_batch(batches))
    return plan


def _model_config(options: ModelOptions) -> DecoderConfig:
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    updates: dict[str, Any] = {"dtype": dtype}
    if options.layers is not None:
        updates["num_layers"] = options.layers
    if options.remat != "auto":
        updates["remat"] = options.remat
    return decoder_config(options.model, **updates)


def _init_state(model: Decoder, tx: Any, batches: text.BatchLayout, key: jax.Array) -> TrainState:
    params = model.init(key, jnp.zeros(batches.shape, jnp.int32))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def _abstract_batch(batches: text.BatchLayout) -> Any:
    tokens = jax.ShapeDtypeStruct(batches.shape, jnp.int32, sharding=batches.sharding)
    return {"inputs": tokens, "targets": tokens}
