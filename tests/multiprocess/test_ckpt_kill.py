"""SIGKILL at any moment of a loop of saves: the last complete step is always there, and whole.

This file is also the script that is killed: `test_ckpt_kill.py FOLDER LOG HOW`; with "many", it
forks one child after the other, with "second" it is one of two processes.
"""

import importlib
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

if __name__ != "__main__":
    pytestmark = pytest.mark.multiprocess


def state_of(step: int) -> Any:
    """A sharded state whose every number tells its step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("a",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("a"))
    make = jax.jit(
        lambda s: {f"w{i}": jnp.full((128, 128 * (i + 1)), s) for i in range(4)},
        out_shardings=sharding,
    )
    return make(jnp.int32(step))


def check(manager: Any) -> int:
    """Restores the latest step, looks at every number, and returns the step (0 if none)."""
    import numpy as np

    if manager.latest_step() is None:
        return 0
    restored = manager.restore(state_of(0))
    assert restored.extras == {"step": restored.step}
    for name, array in restored.state.items():
        for shard in array.addressable_shards:
            assert (np.asarray(shard.data) == restored.step).all(), (name, restored.step)
    return restored.step


def save_until_killed(folder: Path, log: Path, seconds: float, sure: int) -> None:
    """Goes on from the latest step, and notes each step that was seen committed.

    It is killed some seconds after it has committed `sure` steps.
    """
    from shardflax.ckpt import CheckpointManager

    manager = CheckpointManager(folder, keep=2, timeout=300)
    first = step = check(manager)
    state_of(step)  # compiled before the clock starts
    while True:
        if step == first + sure:
            manager.wait()
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        step += 1
        manager.save(step, state_of(step), extras={"step": step})
        if step % 3 == 0:
            manager.wait()
        with log.open("a") as file:
            print(manager.latest_step() or 0, file=file)


def last_logged(log: Path) -> int:
    """The last whole line."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return int(lines[-1]) if lines else 0


def check_folder(folder: Path, log: Path) -> int:
    """What a new run sees: nothing torn, nothing lost, nothing left over."""
    from shardflax.ckpt import CheckpointManager

    with CheckpointManager(folder, keep=2) as manager:
        step = check(manager)
        assert step >= last_logged(log)
        for older in manager.all_steps():
            assert manager.restore(state_of(0), step=older).extras == {"step": older}
        assert sorted(p.name for p in folder.iterdir()) == sorted(map(str, manager.all_steps()))
    return step


def test_one_process(run_quick: Any, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    done = run_quick(1, 2, __file__, folder, log, "many")
    assert done.returncode == 0, done.stdout + done.stderr
    assert check_folder(folder, log) >= 3


def test_one_of_two_processes(run_quick: Any, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    done = run_quick(2, 2, __file__, folder, log, "second")
    assert done.returncode != 0, done.stdout + done.stderr
    assert check_folder(folder, log) >= 2


def kill_many(folder: Path, log: Path) -> None:
    """Each child goes on from what the one before it left, once it has found nothing amiss."""
    rng = random.Random(1)
    for child in range(6):
        seconds, pid = rng.uniform(0.1, 1.5), os.fork()
        if pid == 0:
            check_folder(folder, log)
            save_until_killed(folder, log, seconds, sure=child % 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    if sys.argv[3] == "many":
        importlib.import_module("shardflax.ckpt")  # once for all children
        kill_many(Path(sys.argv[1]), Path(sys.argv[2]))
        sys.exit()

    from launch.distributed import initialize_from_env

    initialize_from_env()
    import jax

    # Of two processes, the second one is killed; the launcher then stops the first.
    delay = 1.0 if jax.process_index() == jax.process_count() - 1 else 1e6
    save_until_killed(Path(sys.argv[1]), Path(sys.argv[2]), delay, sure=2)
