"""The moment of the commit: what is said to be saved is there, and what is not said is not."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt import at_exit, faults, landing, reading

STATE = {"w": np.arange(5000), "n": 1}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run with step 1."""
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, STATE)
    yield tmp_path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def save(manager: ckpt.CheckpointManager, step: int) -> BaseException | None:
    """Saves a step; what its handle says."""
    handle = manager.save(step, STATE)
    assert handle is not None
    return handle.committed.exception(timeout=60)


@pytest.mark.parametrize("point", faults.POINTS)
@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_a_failure_at_any_point_is_told_as_it_is(root: Path, point: str, kind: Any) -> None:
    """Errors of the disk are another test's; some classes hardly anybody catches."""

    def fail(now: str) -> None:
        if now == point:
            raise kind("on purpose")

    manager = ckpt.CheckpointManager(root, keep=1)
    end = faults.listen(fail)
    failure = save(manager, 2)
    end()
    there = point in ("committed", "expired")
    with pytest.raises(ckpt.CheckpointError, match="on purpose") as caught:
        manager.wait()
    assert ("Step 2 is committed" in str(caught.value)) is there
    assert (failure is None) is there and (2 in manager.all_steps()) is there
    assert set(names(root)) <= {"1", "2"}
    assert save(manager, 3) is None
    manager.close()
    assert names(root) == ["3"]


def test_a_rename_that_says_it_failed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where the answer is lost and the question repeated."""
    rename = os.rename

    def twice(source: Any, target: Any) -> None:
        rename(source, target)
        raise OSError(errno.ENOENT, "No such file or directory")

    manager = ckpt.CheckpointManager(root)
    monkeypatch.setattr(landing.os, "rename", twice)
    assert save(manager, 2) is None
    monkeypatch.undo()
    manager.close()
    assert manager.all_steps() == [1, 2]


def test_a_name_that_cannot_be_forced_to_the_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = landing.sync_folder

    def fail(folder: Path) -> None:
        if folder == root and (root / "2").exists():
            raise OSError(errno.EIO, "Input/output error")
        sync(folder)

    manager = ckpt.CheckpointManager(root)
    monkeypatch.setattr(landing, "sync_folder", fail)
    assert "Input/output error" in str(save(manager, 2))
    monkeypatch.undo()
    assert names(root) == ["1"]
    with pytest.raises(ckpt.CheckpointSaveError):
        manager.save(2, STATE)
    manager.close()
    assert manager.all_steps() == [1, 2]


def test_threads_save_each_step_once(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with ckpt.CheckpointManager(tmp_path, keep=None) as manager:
        gate = threading.Barrier(4)

        def work() -> None:
            try:
                for step in range(6):
                    gate.wait(60)
                    manager.save(step, {"n": step})
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        manager.wait()
        assert manager.pending_step is None and manager not in at_exit.IN_FLIGHT
        assert not failures and manager.all_steps() == list(range(6))


def test_a_save_is_waited_for_at_exit_though_the_one_before_it_still_tells_of_its_end(
    tmp_path: Path,
) -> None:
    manager = ckpt.CheckpointManager(tmp_path)
    told, there, gate, second = (threading.Event() for _ in range(4))
    end = faults.listen(lambda point: point == "written" and told.wait(60))
    first = manager.save(1, STATE)
    assert first is not None

    def tell(_: Any) -> None:
        there.set()
        gate.wait(60)

    first.committed.add_done_callback(tell)
    told.set()
    assert there.wait(60)
    end()
    hold = threading.Event()
    end = faults.listen(lambda point: point == "staged" and (second.set() or hold.wait(60)))
    manager.save(2, STATE)
    gate.set()
    assert second.wait(60)  # on the same thread: the first one has ended for good
    assert manager in at_exit.IN_FLIGHT
    hold.set()
    manager.close()
    end()
    assert manager.all_steps() == [1, 2]


@pytest.mark.parametrize("asked", [None, 1])
def test_a_step_that_somebody_deletes_while_it_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None
) -> None:
    """The latest one is another one then; one that was asked for is not there."""
    trainer = ckpt.CheckpointManager(root, keep=1)
    restore = reading.restore_source

    def late(*args: Any) -> Any:
        monkeypatch.undo()
        save(trainer, 2)
        trainer.wait()
        return restore(*args)

    monkeypatch.setattr(reading, "restore_source", late)
    with ckpt.CheckpointManager(root, read_only=True) as looker:
        if asked is None:
            assert looker.restore(STATE).step == 2
        else:
            with pytest.raises(
                ckpt.CheckpointNotFoundError, match="no committed step 1; it has: 2"
            ):
                looker.restore(STATE, step=asked)
    trainer.close()
