"""The command line of `launch.train`, as typed dataclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from shardflax.mesh_options import MeshOptions
from shardflax.training import OptimizerConfig

__all__ = [
    "DataOptions",
    "LayoutOptions",
    "ModelOptions",
    "OptimizerOptions",
    "RunOptions",
    "TrainOptions",
]


@dataclasses.dataclass(frozen=True)
class LayoutOptions:
    """How the run lies on its devices.

    >>> LayoutOptions(mesh="data=2,fsdp=4").preset
    'fsdp_tp'
    """

    mesh: str = "data=-1"
    """Axes and sizes of the mesh, such as data=2,fsdp=2,tensor=2; one -1 takes what is left."""

    preset: str = "fsdp_tp"
    """Rules from names to mesh axes: a preset, or several added up, such as "fsdp + tp_sp"."""

    across_dcn: tuple[str, ...] = ()
    """Of tensor and context, those that may be across slices: every layer sends along them."""

    other_axes: tuple[str, ...] = ()
    """Axes that look like a slip for one that the presets know, and are none."""

    def placed(self) -> Any:
        """The mesh, on all devices.

        Raises `MeshSpecError` or `UnknownAxisError`, with options for a cure.

        >>> dict(LayoutOptions(mesh="data=-1,tensor=2").placed().shape)
        {'data': 4, 'tensor': 2}
        """
        said = MeshOptions(across_dcn=self.across_dcn, other_axes=self.other_axes)
        return said.place(self.mesh)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The decoder.

    >>> ModelOptions(model="base").dtype
    'auto'
    """

    model: str = "small"
    """Its size: tiny, small, base, llama3-1b, llama3-8b or llama3-70b."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation; auto is float32 on CPUs, else bfloat16. Parameters are float32."""

    layers: int | None = None
    """Number of blocks, if not that of the size."""

    remat: str | None = "auto"
    """What is kept for the backward pass: a policy of jax.checkpoint_policies, or None for all."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The text, as bytes.

    >>> DataOptions().batch * DataOptions().seq_len
    4096
    """

    data: Path | None = None
    """A text, JSONL or Parquet file, or a folder of them; None is Python's standard library."""

    text_field: str = "text"
    """Where the text is in JSONL and Parquet files."""

    batch: int = 32
    """Windows of text per step, over all devices."""

    seq_len: int = 128
    """Tokens (bytes) per window."""


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW, or another, and its learning rate.

    >>> OptimizerOptions().config(steps=100).total_steps
    100
    """

    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    """Which one."""

    learning_rate: float = 3e-3
    """The highest that the schedule reaches."""

    warmup_steps: int = 20
    """Steps in which it rises to that, from 0."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it goes on, down to a tenth at the last step."""

    weight_decay: float = 0.1
    """Decoupled; of matrices only."""

    clip_norm: float | None = 1.0
    """Bound on the global norm of the gradient."""

    def config(self, steps: int) -> OptimizerConfig:
        """The library's config, for a run of so many steps."""
        said = dataclasses.asdict(self)
        return OptimizerConfig(name=said.pop("optimizer"), total_steps=steps, **said)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How long, and where it is kept.

    >>> RunOptions().run.name
    'small'
    """

    steps: int = 150
    """Steps in all: a run that goes on counts those that it has done."""

    accumulate: int = 1
    """Microbatches per step whose gradients are added up."""

    z_loss: float = 1e-4
    """Weight of the squared log of the softmax's denominator in the loss."""

    seed: int = 0
    """Of the initial parameters and of the order of the text."""

    run: Path = Path("runs/small")
    """Folder of the run: checkpoints and losses. The same folder again: it goes on."""

    save_every: int = 25
    """Steps between checkpoints."""

    save_minutes: float | None = None
    """At the latest after so many minutes there is another checkpoint; it goes with the next."""

    keep: int = 3
    """How many checkpoints are kept."""

    eval_batches: int = 8
    """Batches of held-out text for the loss at the end; 0 for none."""

    sample: int = 240
    """Bytes of text to write at the end; 0 for none."""

    prompt: str = "def "
    """What the written text begins with."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Trains a decoder language model on text, sharded over a mesh of devices.

    Killed at any moment, the same command goes on from the last complete checkpoint, and computes
    the very numbers that it would have computed without.

    >>> TrainOptions().identity()["run"]["seed"]
    0
    """

    layout: LayoutOptions = LayoutOptions()
    """How the run lies on its devices."""

    model: ModelOptions = ModelOptions()
    """The decoder."""

    data: DataOptions = DataOptions()
    """The text, as bytes."""

    optimizer: OptimizerOptions = OptimizerOptions()
    """The optimizer and its learning rate."""

    run: RunOptions = RunOptions()
    """How long the run is, and where it is kept."""

    def identity(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON."""
        said = dataclasses.asdict(self)
        for group, name in (
            ("layout", "across_dcn"),
            ("layout", "other_axes"),
            ("run", "run"),
            ("run", "save_every"),
            ("run", "save_minutes"),
            ("run", "keep"),
        ):
            del said[group][name]
        return {group: {k: _plain(v) for k, v in part.items()} for group, part in said.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
