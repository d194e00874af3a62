"""The row about the train loop: `launch.train` over its bare jitted step."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.report import Row
from benchmarks.timing import in_turn
from launch import train
from launch.options import DataOptions, LayoutOptions, ModelOptions, RunOptions, TrainOptions
from launch.plan import plan_run
from shardflax import partitioning
from shardflax.ckpt import CheckpointManager
from shardflax.training import data as text

__all__ = ["rows"]

STEPS = 25


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """Stands for the traced step of a plan: compiled once, not once a round."""

    step: Any

    def lower(self) -> _Compiled:
        return self

    def compile(self) -> Any:
        return self.step


def rows(rounds: int) -> list[Row]:
    """The row of the table about the train loop."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        taken = _measure(Path(folder), rounds)
    text = f"train loop (data, metrics, an async save every {STEPS} steps), over the bare step"
    return [Row.of_ratio(text, 1.03, taken, over="raw")]


def _measure(folder: Path, rounds: int) -> Any:
    options = TrainOptions(
        layout=LayoutOptions(mesh="data=2,fsdp=2,tensor=2"),
        model=ModelOptions(model="tiny"),
        data=DataOptions(batch=32, seq_len=128),
        run=RunOptions(run=folder, save_every=STEPS, steps=STEPS),
    )
    plan = plan_run(options)
    with (
        partitioning.use(plan.mesh, plan.rules),
        CheckpointManager(
            folder / "checkpoints", keep=2, save_every=STEPS, preemptible=True
        ) as manager,
        contextlib.closing(text.Loader(plan.windows, plan.batches, seed=0)) as loader,
    ):
        run = train._start(plan, manager, loader)
        step = plan.train_step.lower().compile()
        contenders = {"ours": _whole(run, step), "raw": _bare(run, step)}
        return in_turn(contenders, rounds, _wall_clock)


def _whole(run: Any, step: Any) -> Callable[[], object]:
    """The loop of `launch.train`, some steps further at each call."""

    def go() -> None:
        options = run.plan.options
        longer = dataclasses.replace(options.run, steps=run.step + STEPS)
        run.plan = dataclasses.replace(run.plan, options=dataclasses.replace(options, run=longer))
        run.plan.__dict__["train_step"] = _Compiled(step)
        train._train(run)
        jax.block_until_ready(run.state)

    return go


def _bare(run: Any, step: Any) -> Callable[[], object]:
    """As many steps on one batch."""
    batch = next(run.loader)

    def go() -> None:
        for _ in range(STEPS):
            run.state, _ = step(run.state, batch)
        jax.block_until_ready(run.state)

    return go


def _wall_clock(fn: Callable[[], object]) -> float:
    """Seconds that one call takes: here waiting is what is measured."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start
