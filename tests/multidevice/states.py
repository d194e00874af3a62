"""The train state of a 12-layer decoder under every preset, on meshes of one, two and three axes.

Presets that say the same of this decoder, on meshes that differ in the names of their axes alone,
are one layout and one program: they are found here, and executed once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardflax.core.boxes import unbox
from shardflax.models import Decoder, DecoderConfig
from shardflax.partitioning import (
    AxisRules,
    Layout,
    batch_axes,
    logical_axis_rules,
    make_mesh,
    preset,
    use,
)
from shardflax.partitioning.at_use import used_spec
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.scope import InitTrace, init_tracing
from shardflax.partitioning.spec_check import spec_axes
from shardflax.training import TrainState, TrainStep, cross_entropy, make_train_step
from tests.core.harness import quick_key

CONFIG = DecoderConfig(
    vocab_size=32,
    num_layers=12,
    embed_dim=16,
    mlp_dim=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    max_length=16,
    remat=None,
    dtype="float32",
)
MODEL = Decoder(CONFIG)
TX = optax.sgd(0.5, momentum=0.9)
TOKENS = np.arange(8 * 16, dtype="int32").reshape(8, 16) * 7 % 32
BATCH = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, axis=1)}

# The axes of each preset, the first for a mesh of 8, two for 4 x 2, all for 2 x 2 x 2.  A preset
# of two axes has one on the mesh of 8: the other is of size 1 there.
AXES = {
    "dp": "data tensor fsdp",
    "zero1": "data tensor fsdp",
    "fsdp": "fsdp data tensor",
    "hsdp": "fsdp data tensor",
    "fsdp2d": "fsdp fsdp2 data",
    "tp_sp": "tensor data fsdp",
    "tp_embed": "tensor data fsdp",
    "fsdp_tp": "fsdp tensor data",
    "cp": "context data tensor",
    "ep": "expert data tensor",
    "ep_as_cp": "expert data tensor",
    "cp_as_ep": "context data tensor",
    "ep_as_dp": "expert data tensor",
    "pp": "stage data tensor",
    "decode": "tensor expert data",
}
SIZES = ((8,), (4, 2), (2, 2, 2))

# What the decoder constrains, with the shapes of this batch.
ACTIVATIONS = {
    ("batch", "length"): (8, 16),
    ("batch", "length", "act_embed"): (8, 16, 16),
    ("batch", "norm_length", "act_embed"): (8, 16, 16),
    ("batch", "length", "act_mlp"): (8, 16, 32),
    ("batch", "length", "act_heads", "act_head_dim"): (8, 16, 8, 4),
    ("batch", "kv_length", "act_kv_heads", "act_head_dim"): (8, 16, 2, 4),
    ("vocab_batch", "length", "act_vocab"): (8, 16, 32),
}


def init(key: jax.Array) -> TrainState:
    params = MODEL.init(key, jnp.asarray(TOKENS))["params"]
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=TX)


def loss_fn(params: Any, batch: Any, _: Any) -> Any:
    logits: Any = MODEL.apply({"params": params}, batch["tokens"])
    return cross_entropy(logits, batch["targets"])


STEP: TrainStep = make_train_step(loss_fn)


@functools.cache
def alone() -> tuple[TrainState, list[float]]:
    """The state on one device, on the host, and the losses of two steps from there."""
    with logical_axis_rules(()):
        made = jax.device_get(jax.jit(lambda key: unbox(init(key)))(quick_key(0)))
        state, step, found = made, jax.jit(STEP), []
        for _ in range(2):
            state, metrics = step(state, BATCH)
            found.append(float(metrics["loss"]))
    return made, found


@functools.cache
def abstract_state() -> tuple[Any, set[str]]:
    """The boxed shapes of the state, traced once, and the names of its constraints."""
    with use(make_mesh("data=8"), preset("dp")), init_tracing(InitTrace()) as trace:
        return jax.eval_shape(init, quick_key(0)), trace.names


@dataclass(frozen=True)
class Case:
    """A preset on a mesh of `sizes`.

    `str(case)` is `fsdp_tp 4x2`.
    """

    name: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.sizes))}"

    @property
    def rules(self) -> AxisRules:
        return preset(self.name)

    def mesh(self, types: Any = "auto") -> Any:
        axes = AXES[self.name].split()[: len(self.sizes)]
        spec = ",".join(f"{axis}={size}" for axis, size in zip(axes, self.sizes, strict=True))
        return make_mesh(spec, axis_types=types)

    def layout(self, types: Any = "auto") -> Layout:
        return Layout(abstract_state()[0], self.mesh(types), self.rules)

    @functools.cached_property
    def meaning(self) -> Any:
        """The specs of all that the decoder has names for, with the axes numbered.

        Of each leaf as it is stored, and as it is used; of each activation; of the batch.
        """
        layout, mesh = self.layout(), self.mesh()
        axes = tuple(mesh.shape.items())
        found = [*zip((leaf.spec for leaf in layout.leaves), self.used(layout), strict=True)]
        activations = [
            resolve(names, self.rules.compute, shape, axes).spec
            for names, shape in ACTIVATIONS.items()
        ]
        return (
            tuple(mesh.shape.values()),
            tuple(tuple(numbered(spec, mesh) for spec in pair) for pair in found),
            tuple(numbered(spec, mesh) for spec in activations),
            numbered([batch_axes(mesh, self.rules)], mesh),
        )

    def used(self, layout: Layout) -> list[Any]:
        """The spec of each leaf where it is used."""
        found: list[Any] = []
        with use(layout.mesh, self.rules):
            for leaf in layout.leaves:
                spec = used_spec(np.zeros(leaf.shape, leaf.dtype), leaf.names)
                found.append(leaf.spec if spec is None else spec)
        return found


def numbered(spec: Any, mesh: Any) -> tuple[tuple[int, ...], ...]:
    """A spec with the places of the axes in the mesh instead of their names."""
    return tuple(tuple(mesh.axis_names.index(axis) for axis in spec_axes(part)) for part in spec)


CASES = [Case(name, sizes) for sizes in SIZES for name in AXES]


@functools.cache
def alike() -> tuple[tuple[Case, ...], ...]:
    """All cases, those of one meaning together."""
    found: dict[Any, list[Case]] = {}
    for case in CASES:
        found.setdefault(case.meaning, []).append(case)
    return tuple(map(tuple, found.values()))


def stored_alike() -> list[Case]:
    """The first case of each way in which the state lies, however it is used."""
    found: dict[Any, Case] = {}
    for case in CASES:
        layout, mesh = case.layout(), case.mesh()
        specs = tuple(numbered(leaf.spec, mesh) for leaf in layout.leaves)
        found.setdefault((case.sizes, specs), case)
    return [*found.values()]
