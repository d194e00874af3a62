"""What a run is asked for, checked against the devices and the text, on abstract shapes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from launch.options import ModelOptions, TrainOptions
from shardflax import partitioning
from shardflax.models import Decoder, DecoderConfig, decoder_config
from shardflax.partitioning import AxisRules, Layout
from shardflax.training import (
    OptimizerConfig,
    TrainState,
    cross_entropy,
    make_optimizer,
    make_schedule,
    make_train_step,
)
from shardflax.training import data as text

__all__ = ["Plan", "plan_run"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that fits: its mesh, rules, model, text, and the layout of its state.

    Nothing in it is allocated on a device.

    >>> [field.name for field in dataclasses.fields(Plan)][:4]
    ['options', 'mesh', 'rules', 'model']
    """

    options: TrainOptions
    mesh: jax.sharding.Mesh
    rules: AxisRules
    model: Decoder
    optimizer: OptimizerConfig
    tx: Any
    windows: text.Windows
    batches: text.BatchLayout
    layout: Layout

    def init_state(self, key: jax.Array) -> TrainState:
        """A state at step 0, with boxed parameters."""
        return _init_state(self.model, self.tx, self.batches, key)

    def loss(self, params: Any, batch: Any, rngs: Any) -> Any:
        """The loss of a batch, and metrics."""
        logits = self.model.apply({"params": params}, batch["inputs"], rngs=rngs)
        return cross_entropy(logits, batch["targets"], z_loss=self.options.run.z_loss)

    @functools.cached_property
    def train_step(self) -> Any:
        """`(state, batch) -> (state, metrics)`, traced, not yet compiled; the state is donated."""
        step = make_train_step(
            self.loss,
            accumulate=self.options.run.accumulate,
            schedule=make_schedule(self.optimizer),
            seed=self.options.run.seed,
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.layout.shardings, None))
        with partitioning.use(self.mesh, self.rules):
            return jitted.trace(self.layout.abstract, _abstract_batch(self.batches))


def plan_run(options: TrainOptions) -> Plan:
    """Checks options against the devices and the text, on abstract shapes alone.

    Raises an error that says what does not fit, and what to write, for any option that is wrong.

    >>> from launch.options import LayoutOptions
    >>> plan = plan_run(TrainOptions(layout=LayoutOptions(mesh="data=2,fsdp=2,tensor=2")))
    >>> plan.layout.specs.params["head"]["kernel"]
    P('fsdp', 'tensor')
    """
    mesh = partitioning.make_mesh(options.layout.mesh)
    rules = partitioning.preset(options.layout.preset)
    model = Decoder(_model_config(options.model))
    shape = (options.data.batch, options.data.seq_len)
    batches = text.BatchLayout(*shape, partitioning.batch_sharding(mesh, rules))
    corpus = text.open_corpus(options.data.data, field=options.data.text_field)
    windows = text.Windows(corpus, options.data.seq_len)
    optimizer = options.optimizer.config(options.run.steps)
    tx = make_optimizer(optimizer)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key: jax.Array) -> TrainState:
        return _init_state(model, tx, batches, key)

    layout = partitioning.abstract_layout(init, key, mesh=mesh, rules=rules)
    layout.check()
    plan = Plan(options, mesh, rules, model, optimizer, tx, windows, batches, layout)
    plan.train_step  # noqa: B018  tracing it finds the names and sizes that do not fit
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
