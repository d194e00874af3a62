"""Asked to stop while it compiles or evaluates, a run does not go on first."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from launch import train
from shardflax import partitioning
from shardflax.training import data as text


class Manager:
    """Hears of the signal at a certain question."""

    def __init__(self, at: int) -> None:
        self.at, self.asked = at, 0

    def reached_preemption(self, step: int | None = None) -> bool:
        self.asked += 1
        return self.asked >= self.at


def run_of(manager: Manager, step: int, steps: int) -> Any:
    """A run of which nothing is real but the loop."""
    compiled = SimpleNamespace(lower=lambda: SimpleNamespace(compile=lambda: None))
    options = SimpleNamespace(run=SimpleNamespace(steps=steps, eval_batches=9, run="nowhere"))
    plan = SimpleNamespace(
        options=options,
        train_step=compiled,
        windows=None,
        batches=None,
        mesh=partitioning.make_mesh("data=8"),
        rules=partitioning.preset("dp"),
        program=SimpleNamespace(loss=None),
    )
    return SimpleNamespace(plan=plan, manager=manager, step=step, state={})


def test_after_compiling_no_step_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(Manager(at=1), step=3, steps=10)
    train._train(run)
    assert run.step == 3 and "compiled in" in capsys.readouterr().out


def test_in_an_evaluation_no_further_batch_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def batches(*_: object) -> Any:
        for i in range(9):
            seen.append(i)
            yield jnp.ones((2, 4)) * i

    monkeypatch.setattr(text, "held_out_batches", batches)
    monkeypatch.setattr(
        train, "make_eval_step", lambda loss: lambda s, b: {"cross_entropy": jnp.sum(b)}
    )
    run = run_of(Manager(at=2), step=10, steps=10)
    with pytest.raises(SystemExit) as stopped:
        train._evaluate(run)
    assert stopped.value.code == 143 and seen == [0, 1]
    said = "all 10 steps are done and saved; the same command goes on with the evaluation"
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train._stop(run_of(Manager(at=1), step=0, steps=10))
    assert "before the first step" in capsys.readouterr().out
