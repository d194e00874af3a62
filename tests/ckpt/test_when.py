"""When a step is saved, which steps stay, and what goes on while one is being saved."""

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt import faults
from shardflax.ckpt.keeping import Note, Rules
from shardflax.ckpt.rendezvous import Rendezvous
from shardflax.ckpt.timer import Timer
from shardflax.cli import main

STATE = {"w": np.arange(4.0)}


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def timed(folder: Path, clock: Clock, **options: Any) -> ckpt.CheckpointManager:
    """A manager that saves after 60 s at the latest, by a clock of ours."""
    manager = ckpt.CheckpointManager(folder, temporary_every=60, **options)
    manager._timer = Timer(60, manager._meeting, clock)
    return manager


# --- temporary checkpoints


def test_a_step_is_saved_when_the_last_save_is_long_ago_and_goes_with_the_next(
    tmp_path: Path, clock: Clock
) -> None:
    seen = []
    with timed(tmp_path, clock, keep=2, save_every=10) as manager:
        for step in range(1, 31):
            clock.now += 25
            due = manager.is_due(step)
            assert due is (manager.save(step, STATE) is not None)
            manager.wait()
            if due:
                seen.append(manager.all_steps())
    assert seen == [
        [3], [6], [9], [10],
        [10, 13], [10, 16], [10, 19], [10, 20],
        [10, 20, 23], [10, 20, 26], [10, 20, 29], [20, 30],
    ]  # fmt: skip


def test_a_temporary_step_is_known_as_one_to_the_next_run(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with timed(tmp_path, clock, save_every=10) as manager:
        manager.save(10, STATE)
        clock.now += 70
        assert manager.save(13, STATE)
    assert main(["ckpt", "ls", str(tmp_path)]) == 0
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "committed",
        "committed, temporary",
    ]
    with ckpt.CheckpointManager(tmp_path, save_every=10, keep=None) as manager:
        assert manager.latest_step() == 13 and manager.restore(STATE).step == 13
        manager.save(15, STATE, force=True)  # asked for by name: stays
        manager.wait()
        assert manager.all_steps() == [10, 15]
        manager.save(20, STATE)
    assert manager.all_steps() == [10, 15, 20]


def test_any_save_begins_the_interval_anew_and_a_failed_one_is_made_up_for(
    tmp_path: Path, clock: Clock
) -> None:
    with timed(tmp_path, clock, save_every=100) as manager:
        clock.now += 59
        manager.save(1, STATE, force=True)
        clock.now += 59
        assert not manager.is_due(2)
        clock.now += 2
        assert manager.is_due(3)
        assert manager.is_due(4), "nobody saved step 3"


def test_a_clock_that_goes_back_neither_stops_saves_nor_deletes_steps(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 5.0)  # 1970
    with timed(tmp_path, clock, save_every=100, keep=2) as manager:
        manager.save(100, STATE)
        clock.now -= 900
        assert not manager.is_due(101)
        clock.now += 61
        assert manager.save(102, STATE)
        manager.wait()
        assert manager.all_steps() == [100, 102]
        clock.now += 61
        assert manager.save(103, STATE)
        manager.wait()
        assert manager.all_steps() == [100, 103]


def test_temporary_steps_that_are_best_or_kept_for_good_stay(tmp_path: Path, clock: Clock) -> None:
    with timed(tmp_path, clock, save_every=10, keep_every=7, keep=1, best="loss") as manager:
        for step, loss in ((3, 0.1), (14, 0.5), (18, 0.4), (20, 0.3), (30, 0.2)):
            clock.now += 61
            assert manager.save(step, STATE, metrics={"loss": loss})
    assert manager.all_steps() == [3, 14, 30]


def test_the_processes_hear_the_same_and_seldom_talk() -> None:
    """Process 0's clock decides; the other one has none."""
    clock, said = Clock(), dict[str, str]()
    first = Timer(60, Rendezvous("", 5, 0, 1, None, said), clock)
    second = Timer(60, Rendezvous("", 5, 1, 1, None, said), lambda: 0.0)
    answers = []
    for step in range(1, 2000):
        clock.now += 0.1
        answers.append(first.due(step))
        assert second.due(step) is answers[-1] is first.due(step)
        if answers[-1]:
            first.saved()
            second.saved()
    due = [step for step, answer in enumerate(answers, 1) if answer]
    assert [b - a for a, b in zip([0, *due], due, strict=False)] == pytest.approx([600] * 3, abs=5)
    assert first._decisions < 60 and len(said) <= 65


@pytest.mark.parametrize("every", [0, -1.0, datetime.timedelta(0)])
def test_an_interval_that_is_none_is_refused(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match="temporary_every"):
        ckpt.CheckpointManager(tmp_path, temporary_every=every)


def test_minutes_can_be_said_as_such(tmp_path: Path) -> None:
    with ckpt.CheckpointManager(
        tmp_path, save_every=9, temporary_every=datetime.timedelta(minutes=5)
    ) as manager:
        assert [step for step in range(1, 20) if manager.is_due(step)] == [9, 18]


def test_rules_look_only_at_the_notes_that_they_need() -> None:
    asked = []

    def note(step: int) -> Note:
        asked.append(step)
        return Note()

    assert Rules(keep=1, save_every=10).expired([10, 20, 25, 30], note) == [10, 20, 25]
    assert asked == [25]
    assert Rules().expired([], note) == []


# --- preemption


def test_a_signal_saves_the_step_and_stops_also_where_nothing_is_due(tmp_path: Path) -> None:
    with ckpt.CheckpointManager(tmp_path, save_every=100, preemptible=True) as manager:
        assert not manager.save(1, STATE) and not manager.reached_preemption(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not manager.reached_preemption(1), "the same question, the same answer"
        assert manager.reached_preemption(), "in an evaluation, say"
        assert manager.is_due(2) and manager.save(2, STATE)
        assert manager.reached_preemption(2)
    assert manager.all_steps() == [2]
    with ckpt.CheckpointManager(tmp_path, save_every=100) as manager:
        manager.restore(STATE)
        manager.save(100, STATE)
    assert manager.all_steps() == [100], "saved for a restart alone"


def test_the_signal_goes_back_to_whom_it_belonged(tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with ckpt.CheckpointManager(tmp_path, preemptible=True) as manager:
            os.kill(os.getpid(), signal.SIGTERM)
            assert manager.reached_preemption() and heard == [1]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nobody_listens_unless_asked(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ckpt.CheckpointManager(tmp_path) as manager:
        assert signal.getsignal(signal.SIGTERM) is before
        with pytest.raises(ckpt.CheckpointError, match="preemptible=True"):
            manager.reached_preemption(1)
    caught: list[Exception] = []

    def make() -> None:
        try:
            ckpt.CheckpointManager(tmp_path, preemptible=True)
        except ckpt.CheckpointError as error:
            caught.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


# --- reading while a step is saved


@pytest.fixture
def hold() -> Iterator[Callable[[str], tuple[threading.Event, threading.Event]]]:
    """Lets the next save wait at a point: what is set when it is there, and what lets it go on."""
    ends: list[Callable[[], None]] = []
    gates: list[threading.Event] = []

    def at(point: str) -> tuple[threading.Event, threading.Event]:
        there, gate = threading.Event(), threading.Event()

        def wait(now: str) -> None:
            if now == point and not gate.is_set():
                there.set()
                gate.wait(300)

        ends.append(faults.listen(wait))
        gates.append(gate)
        return there, gate

    yield at
    for end, gate in zip(ends, gates, strict=True):
        end()
        gate.set()


@pytest.mark.parametrize("point", ["written", "rename"])
def test_a_committed_step_is_read_while_the_next_one_is_saved(
    tmp_path: Path, point: str, hold: Callable[[str], tuple[threading.Event, threading.Event]]
) -> None:
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(4)})
        manager.wait()
        there, gate = hold(point)
        manager.save(2, {"w": jnp.zeros(4)})
        assert there.wait(300)
        assert manager.restore({"w": jnp.zeros(4)}, step=1).state["w"].tolist() == [1] * 4
        assert manager.pending_step == 2 and manager.all_steps() == [1]
        gate.set()
        assert manager.restore({"w": jnp.ones(4)}).step == 2, "the latest is waited for"


def test_a_step_that_is_being_read_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ckpt.CheckpointManager.restore.__globals__
    with ckpt.CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, STATE)
        manager.wait()
        restore_step = names["restore_step"]

        def slow(*args: Any) -> Any:
            manager.save(2, STATE).committed.result()  # type: ignore[union-attr]
            assert manager.all_steps() == [1, 2]
            return restore_step(*args)

        monkeypatch.setitem(names, "restore_step", slow)
        assert manager.restore(STATE, step=1).step == 1
        manager.save(3, STATE)
    assert manager.all_steps() == [3]


def test_a_step_that_is_about_to_be_deleted_is_not_read(
    tmp_path: Path, hold: Callable[[str], tuple[threading.Event, threading.Event]]
) -> None:
    with ckpt.CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, STATE)
        manager.wait()
        shelf, there, gate = manager._shelf, threading.Event(), threading.Event()
        expire = shelf.expire

        def held() -> None:
            there.set()
            gate.wait(300)
            expire()

        shelf.expire = held  # type: ignore[method-assign]
        manager.save(2, STATE)
        assert there.wait(300)
        with pytest.raises(ckpt.CheckpointNotFoundError, match="step 1; it has: 2"):
            manager.restore(STATE, step=1)
        gate.set()
    assert manager.all_steps() == [2]
