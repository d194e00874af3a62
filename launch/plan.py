"""What a run is asked for, checked against the devices and the text, on abstract shapes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from launch.errors import TrainOptionError
from launch.options import ModelOptions, RunOptions, TrainOptions
from shardflax import partitioning
from shardflax.mesh_options import options_for_a_cure
from shardflax.models import Decoder, DecoderConfig, decoder_config
from shardflax.partitioning import AxisRules, Layout
from shardflax.programs import DecoderProgram, layout_of, traced_step
from shardflax.training import data as text

__all__ = ["Plan", "plan_run"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that fits: its mesh, rules, program, text, and the layout of its state.

    Nothing in it is allocated on a device.

    >>> [field.name for field in dataclasses.fields(Plan)][:4]
    ['options', 'mesh', 'rules', 'program']
    """

    options: TrainOptions
    mesh: jax.sharding.Mesh
    rules: AxisRules
    program: DecoderProgram
    windows: text.Windows
    batches: text.BatchLayout
    layout: Layout

    @property
    def model(self) -> Decoder:
        """The model."""
        return self.program.model

    @functools.cached_property
    def train_step(self) -> Any:
        """`(state, batch) -> (state, metrics)`, traced, not yet compiled; the state is donated."""
        return traced_step(self.program, self.layout, self.rules)


def plan_run(options: TrainOptions) -> Plan:
    """Checks options against the devices and the text, on abstract shapes alone.

    Raises an error that says what does not fit, and what to write, for any option that is wrong.

    >>> from launch.options import LayoutOptions
    >>> plan = plan_run(TrainOptions(layout=LayoutOptions(mesh="data=2,fsdp=2,tensor=2")))
    >>> plan.layout.specs.params["head"]["kernel"]
    P('fsdp', 'tensor')
    """
    _check_numbers(options.run)
    with options_for_a_cure("Choose another --mesh, --preset or --model."):
        return _plan(options)


def _plan(options: TrainOptions) -> Plan:
    mesh = options.layout.placed()
    rules = partitioning.preset(options.layout.preset)
    config = _model_config(options.model)
    _check_sample(options.run, config)
    shape = (options.data.batch, options.data.seq_len)
    batches = text.BatchLayout(*shape, partitioning.batch_sharding(mesh, rules))
    corpus = text.open_corpus(options.data.data, field=options.data.text_field)
    windows = text.Windows(corpus, options.data.seq_len)
    program = DecoderProgram(
        config,
        options.optimizer.config(options.run.steps),
        shape,
        z_loss=options.run.z_loss,
        accumulate=options.run.accumulate,
        seed=options.run.seed,
    )
    layout = layout_of(program, mesh, rules)
    layout.check()
    plan = Plan(options, mesh, rules, program, windows, batches, layout)
    plan.train_step  # noqa: B018  tracing it finds the names and sizes that do not fit
    text.held_out_batches(windows, batches, options.run.eval_batches)  # raises if there is none
    return plan


def _check_numbers(options: RunOptions) -> None:
    """Raises for numbers that no run can have."""
    for least, *names in ((1, "accumulate", "save_every", "keep"), (0, "eval_batches", "sample")):
        for name in names:
            value = getattr(options, name)
            if value < least:
                raise TrainOptionError(name, value, f"a number from {least}")
    if options.save_minutes is not None and options.save_minutes <= 0:
        raise TrainOptionError("save_minutes", options.save_minutes, "a number above 0, or None")


def _check_sample(options: RunOptions, config: DecoderConfig) -> None:
    """Raises unless the model can write a text as long as that, after a prompt."""
    prompt = len(text.encode(options.prompt))
    if options.sample and not prompt:
        raise TrainOptionError("prompt", "''", "a text that the sample begins with, or --sample 0")
    if options.sample and prompt + options.sample > config.max_length:
        longest = max(0, config.max_length - prompt)
        expected = f"at most {longest} bytes, after a prompt of {prompt}"
        raise TrainOptionError("sample", options.sample, expected)


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
