"""Trains a decoder on text: `python -m launch.train --help`.

In acts: what is asked for is checked (`launch.plan`); the state is made, or restored, in its
layout; steps are taken; what came of it is shown.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import multihost_utils

from launch.distributed import initialize_from_env, leave_together
from launch.history import History
from launch.options import TrainOptions
from launch.plan import Plan, plan_run
from shardflax import partitioning
from shardflax.ckpt import CheckpointManager
from shardflax.core.errors import FlaxError
from shardflax.models import generate
from shardflax.training import Progress, TrainState, make_eval_step, mfu, model_flops
from shardflax.training import data as text

__all__ = ["main", "printable"]

_TERMINATED = 128 + signal.SIGTERM
_HELP = """Trains a decoder language model on text, sharded over a mesh of devices. Killed at any \
moment, the same command goes on from the last complete checkpoint, and computes the very numbers \
that it would have computed without."""


# --- act 1: the state, made or restored


@dataclasses.dataclass
class _Run:
    """What changes while a run goes on."""

    plan: Plan
    manager: CheckpointManager
    loader: text.Loader
    state: TrainState
    step: int


def _start(plan: Plan, manager: CheckpointManager, loader: text.Loader) -> _Run:
    """The run at its latest checkpoint, or at step 0.

    Raises `CheckpointMismatchError` for the checkpoint of another model, `DataStateError` for one
    of another text, before anything is allocated.
    """
    if idle := ", ".join(plan.layout.unused_axes):
        _say(f"nothing lies over {idle}, whose devices do the same work: another --preset?")
    if manager.latest_step() is None:
        _say(f"{len(plan.layout.leaves)} leaves, {plan.layout.bytes_per_device:,} bytes a device")
        state, _ = partitioning.init_sharded(
            plan.program.init, _key(plan), mesh=plan.mesh, rules=plan.rules
        )
        return _Run(plan, manager, loader, state, 0)
    restored = manager.restore(plan.layout.abstract)
    loader.set_state(restored.extras["data"])
    _say(f"going on after step {restored.step}, from {manager.directory}")
    for change in _changes(restored.extras["options"], plan.options.identity()):
        _say(f"  changed since: {change}")
    return _Run(plan, manager, loader, restored.state, restored.step)


def _key(plan: Plan) -> jax.Array:
    return jax.random.key(plan.options.run.seed)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for group in new:
        for name, value in new[group].items():
            before = old.get(group, {}).get(name)
            if before != value:
                yield f"{name} from {before} to {value}"


# --- act 2: steps


def _train(run: _Run) -> None:
    """Takes the steps that are left, and saves on the way; stops early where it is asked to."""
    plan, steps = run.plan, run.plan.options.run.steps
    if run.step >= steps:
        _say(f"all {steps} steps are done; --steps for more, --run for another run")
        return
    _say("compiling the train step")
    began = time.monotonic()
    step_fn = plan.train_step.lower().compile()
    _say(f"compiled in {time.monotonic() - began:.1f} s")
    if run.manager.reached_preemption():  # which was not heard of while the compiler ran
        return
    path = Path(plan.options.run.run, "losses.jsonl")
    with ExitStack() as stack:
        history = stack.enter_context(History(path, step=run.step, write=_first()))
        progress = stack.enter_context(_progress(run))
        # Metrics are read one step late, so that the devices never wait for the display.
        late: collections.deque[tuple[int, Any]] = collections.deque()
        while run.step < steps:
            run.state, metrics = step_fn(run.state, next(run.loader))
            run.step += 1
            late.append((run.step, metrics))
            stop = run.manager.reached_preemption(run.step)
            last = stop or run.step == steps
            saves = last or run.manager.is_due(run.step)
            # What is saved is on record: a run that is killed and goes on from there lacks no step.
            while len(late) > (not saves):
                _report(*late.popleft(), history, progress)
            if saves:
                _save(run, last)
            if stop:
                break
    _say(_speed(plan, progress.tokens_per_second))
    run.manager.wait()


def _save(run: _Run, last: bool) -> None:
    extras = {"data": run.loader.get_state(), "options": run.plan.options.identity()}
    run.manager.save(run.step, run.state, extras=extras, force=last)


def _report(step: int, metrics: Any, history: History, progress: Any) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    history.add(step, values)
    progress.update(step, values["cross_entropy"])


def _progress(run: _Run) -> Any:
    shape = run.plan.batches.shape
    return Progress(
        run.plan.options.run.steps,
        start=run.step,
        tokens_per_step=shape[0] * shape[1],
    )


def _speed(plan: Plan, tokens_per_second: float | None) -> str:
    """Tokens and model FLOPs a second, and their share of the chips' peak where that is known."""
    if tokens_per_second is None:
        return "too few steps to tell the speed"
    config = plan.model.config
    flops = model_flops(
        n_params=sum(math.prod(x.shape) for x in jax.tree.leaves(plan.layout.abstract.params)),
        n_layers=config.num_layers,
        n_heads=config.num_heads,
        head_dim=config.head_dim,
        seq_len=plan.options.data.seq_len,
    )
    share = mfu(tokens_per_second, flops, [*plan.mesh.devices.flat])
    said = f"{tokens_per_second:,.0f} tokens/s, {tokens_per_second * flops:.3g} model FLOP/s"
    return said if share is None else f"{said}, {share:.1%} of the chips' peak"


# --- act 3: what came of it


def _conclude(run: _Run) -> None:
    """Prints the loss on held-out text beside a unigram model's, a sample, and where it is kept."""
    plan = run.plan
    if plan.options.run.eval_batches > 0:
        loss, unigram = _evaluate(run), text.unigram_loss(plan.windows.corpus.tokens)
        _say(
            f"held-out loss {loss:.3f} nats a byte; a unigram model of the same text: {unigram:.3f}"
        )
    if plan.options.run.sample > 0:
        _stop_if_told(run, "the sample")
        prompt = plan.options.run.prompt
        _say(f"a sample, after {prompt!r}:")
        for line in (prompt + _sample(run)).split("\n"):
            _say(f"  | {printable(line)}")
    _say(f"checkpoint: {run.manager.directory / str(run.manager.latest_step())}")


def printable(line: str) -> str:
    """A line without what a terminal would obey; a model that has learnt little writes any byte.

    >>> printable("x = 1\\t# \\x1b[2J")
    'x = 1   # \ufffd[2J'
    """
    kept = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line.expandtabs())
    return "".join(kept)


def _evaluate(run: _Run) -> float:
    """The mean loss of some batches of held-out text."""
    plan = run.plan
    step = jax.jit(make_eval_step(plan.program.loss))
    limit = plan.options.run.eval_batches
    batches = text.held_out_batches(plan.windows, plan.batches, limit)
    with partitioning.use(plan.mesh, plan.rules, "eval"):
        losses: list[float] = []
        for batch in batches:
            _stop_if_told(run, "the evaluation")
            losses.append(float(step(run.state, batch)["cross_entropy"]))
    return sum(losses) / len(losses)


def _sample(run: _Run) -> str:
    """Text that the model writes after the prompt."""
    plan, options = run.plan, run.plan.options.run
    # A row for each device along the batch, so that the mesh divides it; the first is shown.
    axes = partitioning.batch_axes(plan.mesh, plan.rules)
    rows = math.prod(plan.mesh.shape[axis] for axis in axes)
    prompt = jnp.tile(jnp.asarray(text.encode(options.prompt), jnp.int32), (rows, 1))
    made = generate(
        plan.model.config, run.state.params, prompt, options.sample, _key(plan), temperature=0.7
    )
    return text.decode(multihost_utils.process_allgather(made, tiled=True)[0])


# --- the stage


def _say(line: str) -> None:
    """Prints a line, on the first process alone."""
    if _first():
        print(line, flush=True)


def _first() -> bool:
    return jax.process_index() == 0


def _stop_if_told(run: _Run, left: str) -> None:
    """Between parts of what is `left` to do after the steps, equally often in all processes."""
    if run.manager.reached_preemption():
        _stop(run, left)


def _stop(run: _Run, left: str = "") -> NoReturn:
    """Ends a run that was asked to stop."""
    if left:
        steps = run.plan.options.run.steps
        _say(f"stopped: all {steps} steps are done and saved; the same command goes on with {left}")
    elif run.step:
        _say(f"stopped after step {run.step}, which is saved: the same command goes on")
    else:
        _say("stopped before the first step")
    sys.exit(_TERMINATED)


def _execute(options: TrainOptions) -> None:
    plan = plan_run(options)
    _say(f"{plan.windows.corpus.name}: {len(plan.windows.corpus.tokens):,} bytes")
    directory = Path(options.run.run, "checkpoints")
    with ExitStack() as stack:
        stack.enter_context(partitioning.use(plan.mesh, plan.rules))
        manager = stack.enter_context(
            CheckpointManager(
                directory,
                keep=options.run.keep,
                save_every=options.run.save_every,
                temporary_every=options.run.save_minutes and 60 * options.run.save_minutes,
                preemptible=True,
            )
        )
        loader = text.Loader(plan.windows, plan.batches, seed=options.run.seed)
        stack.callback(loader.close)
        run = _start(plan, manager, loader)
        _train(run)
        if run.step < options.run.steps:
            _stop(run)
        _conclude(run)


def main(argv: list[str] | None = None) -> None:
    """The command line; errors of the library are printed without a traceback, status 2.

    >>> main(["--preset", "fsdp_pt"])
    Traceback (most recent call last):
    SystemExit: 2
    """
    options = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainOptions],
        args=argv,
        prog="python -m launch.train",
        description=_HELP,
    )
    initialize_from_env()
    try:
        _execute(options)
    except FlaxError as error:
        first = _first()
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not leave_together() and not first:
            print(f"error: {error}", file=sys.stderr, flush=True)  # no other process met it
        sys.exit(2)


if __name__ == "__main__":
    main()
