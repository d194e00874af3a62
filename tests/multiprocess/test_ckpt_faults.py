"""Processes killed at every named point of a save, alone and in company; hung peers; exits.

This file is also the script: `test_ckpt_faults.py FOLDER ...`.  It imports all it needs, then
forks one child (or two) for each case, before any of them starts threads: a case costs little.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt import faults

if __name__ != "__main__":
    pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
TIMEOUT = 1.0
BEFORE = faults.POINTS[: faults.POINTS.index("rename") + 1]
"""The points at which nothing is committed yet."""
PEER = ("staged", "folder", "group", "written")
"""The points that the second of two processes passes before it has reported."""


def state_of(step: int) -> dict[str, Any]:
    """Small and large leaves that tell their step."""
    return {"w": np.full((600, 512), step, np.int32), "b": np.full(5, step, np.float32), "n": step}


def is_of(restored: ckpt.Restored, step: int) -> bool:
    state = restored.state
    return bool((state["w"] == step).all() and (state["b"] == step).all() and state["n"] == step)


# --- the script


def forked(work: Callable[[], int]) -> int:
    """A child that does some work and leaves with its status."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        status = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_at(point: str) -> None:
    def listener(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    faults.listen(listener)


def save_and_die(folder: Path, point: str) -> int:
    """Has saved step 1; is killed while it saves step 2."""
    manager = ckpt.CheckpointManager(folder, keep=2)
    manager.save(1, state_of(1))
    manager.wait()
    die_at(point)
    manager.save(2, state_of(2))
    manager.wait()
    return 3


def pair(folder: Path, index: int, port: int, role: str, point: str) -> int:
    """One of two processes; `role` says what happens to which of them at the point."""
    from launch.distributed import Cluster, initialize_from_env

    os.environ.update(Cluster(f"127.0.0.1:{port}", 2, index).environ())
    initialize_from_env()
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("a"))

    def spread(step: int) -> Any:
        state = state_of(step)
        w = state["w"]
        made = jax.make_array_from_callback(w.shape, sharding, lambda index: w[index])
        return {**state, "w": made}

    manager = ckpt.CheckpointManager(folder, keep=2, timeout=60 if role == "fail" else TIMEOUT)
    manager.save(1, spread(1))
    manager.wait()
    if index == 1 and role == "die":
        die_at(point)
    if index == 1 and role == "hang":
        faults.listen(lambda name: time.sleep(60) if name == point else None)
    if index == 1 and role == "fail":
        faults.listen(lambda name: 1 / 0 if name == point else None)
    try:
        manager.save(2, spread(2))
        manager.wait()
    except ckpt.CheckpointSaveError as error:
        left = sorted(p.name for p in folder.iterdir())
        report = {"error": str(error), "steps": manager.all_steps(), "left": left}
        (folder.parent / f"{folder.name}.{index}.json").write_text(json.dumps(report))
    return 0


def wait_for(pids: list[int], seconds: float) -> dict[int, int]:
    """The statuses of children; who is still there after some time is killed."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(ended) < len(pids):
        for pid in pids:
            if pid not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return ended


def run_alone(root: Path) -> None:
    """Every point, one child each."""
    for point in faults.POINTS:
        pid = forked(lambda point=point: save_and_die(root / point, point))
        status = wait_for([pid], 60)[pid]
        assert status == -signal.SIGKILL, (point, status)


def run_pairs(root: Path) -> None:
    """Two children for each case."""
    from launch.local import free_port

    cases = [("die", point) for point in PEER] + [("hang", "written"), ("fail", "group")]
    for role, point in cases:
        port = free_port()
        folder = root / f"{role}-{point}"
        pids = [
            forked(lambda i=i: pair(folder, i, port, role, point))  # noqa: B023
            for i in range(2)
        ]
        first = wait_for(pids[:1], 60)
        if role != "fail":
            os.kill(pids[1], signal.SIGKILL)
        wait_for(pids[1:], 30)
        assert first[pids[0]] == 0, (role, point, first)


# --- the tests


def run(mode: str, root: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    done = subprocess.run(
        [sys.executable, __file__, mode, str(root)],
        cwd=ROOT, env=env, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_killed_at_every_point(tmp_path: Path) -> None:
    run("alone", tmp_path)
    for point in faults.POINTS:
        folder = tmp_path / point
        steps = [1] if point in BEFORE else [1, 2]
        with ckpt.CheckpointManager(folder, keep=2) as manager:
            assert manager.all_steps() == steps, point
            for step in steps:
                assert is_of(manager.restore(state_of(0), step=step), step), point
            assert sorted(p.name for p in folder.iterdir()) == [str(s) for s in steps], point
            assert manager.save(3, state_of(3))
        assert is_of(ckpt.load_checkpoint(folder / "3", state_of(0)), 3), point


def test_a_peer_that_dies_hangs_or_fails(tmp_path: Path) -> None:
    run("pairs", tmp_path)
    reports = {path.name[:-7]: json.loads(path.read_text()) for path in tmp_path.glob("*.0.json")}
    assert sorted(reports) == sorted([*(f"die-{p}" for p in PEER), "hang-written", "fail-group"])
    for case, report in reports.items():
        if case.startswith("fail"):
            assert "process 1: ZeroDivisionError" in report["error"]
        else:
            assert "Process 1 did not answer for 1 s" in report["error"], (case, report)
        assert report["steps"] == [1] and report["left"] == ["1"], (case, report)
        with ckpt.CheckpointManager(tmp_path / case) as manager:
            assert is_of(manager.restore(state_of(0)), 1)
    other = json.loads((tmp_path / "fail-group.1.json").read_text())
    assert "ZeroDivisionError" in other["error"] and other["steps"] == [1]


if __name__ == "__main__":
    {"alone": run_alone, "pairs": run_pairs}[sys.argv[1]](Path(sys.argv[2]))
