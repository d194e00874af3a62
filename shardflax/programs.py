"""Training programs: how a state is made, the step that changes it, and the batch of a step.

`launch.train` runs one; `shardflax explain` and `shardflax lock` look at one.  Nothing here
allocates: states and batches are described, and steps compiled, by shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardflax import partitioning
from shardflax.models import Decoder, DecoderConfig
from shardflax.partitioning import AxisRules, Layout
from shardflax.training import (
    OptimizerConfig,
    TrainState,
    TrainStep,
    cross_entropy,
    make_optimizer,
    make_schedule,
    make_train_step,
)

__all__ = ["DecoderProgram", "Program", "abstract_batch", "layout_of", "traced_step"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A training program of your own, for `shardflax explain` and `shardflax lock`.

    `init(key)` returns the state, any tree of (boxed) arrays; `step(state, batch)` returns a tuple
    with the new state first.  `batch` is a tree of `jax.ShapeDtypeStruct`s, whose first dims have
    `batch_names`.  Without a step only the layout is known, and no collectives.

    >>> Program(lambda key: {"w": jnp.ones(4)}).batch_names
    ('batch', 'length')
    """

    init: Callable[[jax.Array], Any]
    step: Callable[[Any, Any], Any] | None = None
    batch: Any = None
    batch_names: tuple[str | None, ...] = ("batch", "length")


@dataclasses.dataclass(frozen=True)
class DecoderProgram:
    """A decoder that learns to predict the next token; `shape` is that of a batch of tokens.

    >>> program = DecoderProgram(DecoderConfig(num_layers=1), OptimizerConfig(), (8, 32))
    >>> state = jax.eval_shape(program.init, jax.random.key(0))
    >>> state.params["embed"]["embedding"].shape
    (256, 128)
    """

    config: DecoderConfig
    optimizer: OptimizerConfig
    shape: tuple[int, int]
    z_loss: float = 1e-4
    accumulate: int = 1
    seed: int = 0

    @functools.cached_property
    def model(self) -> Decoder:
        """The model."""
        return Decoder(self.config)

    @functools.cached_property
    def tx(self) -> Any:
        """The optax transformation."""
        return make_optimizer(self.optimizer)

    def init(self, key: jax.Array) -> TrainState:
        """The state at step 0, with boxed parameters."""
        params = self.model.init(key, jnp.zeros(self.shape, jnp.int32))["params"]
        return TrainState.create(apply_fn=self.model.apply, params=params, tx=self.tx)

    def loss(self, params: Any, batch: Any, rngs: Any) -> Any:
        """The loss of a batch, and metrics."""
        logits = self.model.apply({"params": params}, batch["inputs"], rngs=rngs)
        return cross_entropy(logits, batch["targets"], z_loss=self.z_loss)

    @functools.cached_property
    def step(self) -> TrainStep:
        """`(state, batch) -> (state, metrics)`."""
        return make_train_step(
            self.loss,
            accumulate=self.accumulate,
            schedule=make_schedule(self.optimizer),
            seed=self.seed,
        )

    @property
    def batch(self) -> Any:
        """The shapes of a batch: token ids, and the ids one place later."""
        tokens = jax.ShapeDtypeStruct(self.shape, jnp.int32)
        return {"inputs": tokens, "targets": tokens}

    @property
    def batch_names(self) -> tuple[str, str]:
        """The names of the dims of a batch."""
        return ("batch", "length")


def layout_of(program: Program | DecoderProgram, mesh: Any, rules: AxisRules) -> Layout:
    """The layout of a program's state, problems included; allocates and raises nothing.

    >>> program = DecoderProgram(DecoderConfig(num_layers=1), OptimizerConfig(), (8, 32))
    >>> mesh = partitioning.make_abstract_mesh("fsdp=64,tensor=2")
    >>> layout_of(program, mesh, partitioning.preset("fsdp_tp")).specs.params["head"]["kernel"]
    P('fsdp', 'tensor')
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    return partitioning.abstract_layout(program.init, key, mesh=mesh, rules=rules)


def abstract_batch(program: Program | DecoderProgram, mesh: Any, rules: AxisRules) -> Any:
    """The shapes of a program's batch, laid out.

    Raises a `LayoutError` for a dim that the mesh does not divide.

    >>> program = DecoderProgram(DecoderConfig(), OptimizerConfig(), (8, 32))
    >>> mesh, rules = partitioning.make_mesh("data=8"), partitioning.preset("dp")
    >>> abstract_batch(program, mesh, rules)["inputs"].sharding.spec
    P('data',)
    """

    def laid_out(x: Any) -> Any:
        names = program.batch_names[: len(x.shape)]
        names += (None,) * (len(x.shape) - len(names))
        sharding = partitioning.batch_sharding(mesh, rules, names, tuple(x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(laid_out, program.batch)


def traced_step(program: Program | DecoderProgram, layout: Layout, rules: AxisRules) -> Any:
    """The step of a program, traced for a layout on real (or emulated) devices, not yet compiled.

    The state is donated, and comes back in its layout.  Raises ValueError for a program without a
    step.

    >>> program = DecoderProgram(DecoderConfig(num_layers=1), OptimizerConfig(), (8, 32))
    >>> mesh, rules = partitioning.make_mesh("data=8"), partitioning.preset("dp")
    >>> traced = traced_step(program, layout_of(program, mesh, rules), rules)
    >>> "all-reduce" in traced.lower().as_text()  # XLA's partitioner adds it
    False
    """
    mesh: Any = layout.mesh
    if program.step is None:
        raise ValueError("traced_step: the program has no step.")
    jitted = jax.jit(program.step, donate_argnums=0, out_shardings=(layout.shardings, None))
    with partitioning.use(mesh, rules):
        return jitted.trace(layout.abstract, abstract_batch(program, mesh, rules))
