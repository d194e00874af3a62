"""Processes killed at every named point of a save; dead and hung peers; every way to end; rivals.

This file is also the script: `test_ckpt_faults.py FOLDER`.  It imports all it needs, then
forks one child (or two) for each case, before any of them starts threads: a case costs little.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt import faults, reading

if __name__ != "__main__":
    pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
HANG = 300.0
"""Seconds that nobody needs, however slow the machine is."""
TIMEOUT = 1.0
"""Seconds that are waited for who does not come."""
BEFORE = faults.POINTS[: faults.POINTS.index("rename") + 1]
"""The points at which nothing is committed yet."""
PEER = ("staged", "folder", "group", "written")
"""The points that the second of two processes passes before it has reported."""
CASES = [
    *(("die", point) for point in (*PEER, "reported", "committed")),
    ("hang", "written"),
    ("late", "written"),
    ("fail", "group"),
    ("die", "reading"),
    ("hang", "reading"),
    *(("lead", point) for point in (*faults.POINTS, "reading")),
    ("stuck", "written"),
]
"""What happens to the second of two processes, and when; "lead": the first dies; "stuck": hangs."""


FIRST = ("lead", "stuck")
WAITED_FOR = {("die", point) for point in (*PEER, "reading")} | {
    ("hang", "written"), ("hang", "reading"), ("late", "written"), ("stuck", "written"),
}  # fmt: skip
"""The cases of which one hears by waiting; of the others, at once."""


def steps_after(role: str, point: str) -> list[int]:
    """Step 1, and step 2 if it was committed all the same; step 3 if both went on."""
    if role in ("late", "fail"):
        return [1, 3]
    done = point != "reading" and role in ("lead", "die")
    return [1, 2] if done and point not in (BEFORE if role == "lead" else PEER) else [1]


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


def when(point: str, what: Callable[[], object]) -> Callable[[], object]:
    """Does something at a point of a save, or when a step that was opened is read."""
    if point == "reading":
        read = reading.restore_source

        def patched(*args: Any) -> Any:
            what()
            return read(*args)

        reading.restore_source = patched
        return patched
    return faults.listen(lambda name: what() if name == point else None)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder: Path, point: str) -> int:
    """Has saved step 1; is killed while it saves step 2."""
    manager = ckpt.CheckpointManager(folder, keep=2)
    manager.save(1, state_of(1))
    manager.wait()
    when(point, die)
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

    manager = ckpt.CheckpointManager(folder, keep=2, timeout=HANG)
    there = folder.with_suffix(".there")
    reports = [folder.with_suffix(f".{i}.json") for i in range(2)]

    def happens() -> None:
        """To the one whom the case is about; "late" waits until the other one has given up."""
        there.touch()
        if role == "late":
            wait_until(reports[1 - index].exists)
        else:
            {"die": die, "lead": die, "fail": lambda: 1 / 0}.get(role, hang)()

    def waits() -> None:
        """The other one, whom nothing kept waiting so far, however slow both of them are."""
        wait_until(there.exists)
        be_patient(manager, TIMEOUT)

    manager.save(1, spread(1))
    manager.wait()
    target, end = spread(2), int
    if index == (role not in FIRST):
        end = when(point, happens)
    elif (role, point) in WAITED_FOR:
        end = when(point if point == "reading" else ("written", "reported")[index], waits)
    try:
        if point == "reading":
            manager.restore(target)
        else:
            manager.save(2, target)
            manager.wait()
    except ckpt.CheckpointError as error:
        left = sorted(p.name for p in folder.iterdir())
        report = {"error": str(error), "kind": type(error).__name__}
        report |= {"steps": manager.all_steps(), "left": left}
        partial = reports[index].with_suffix(".partial")
        partial.write_text(json.dumps(report))
        partial.rename(reports[index])
    if role in ("late", "fail"):  # the next step is none the worse for it
        end()
        be_patient(manager, HANG)
        manager.save(3, spread(3))
        manager.close()
    return 0


def hang() -> None:
    time.sleep(12 * HANG)


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.01)


def be_patient(manager: ckpt.CheckpointManager, seconds: float) -> None:
    """Changes for how long a manager waits from now on."""
    object.__setattr__(manager._meeting, "timeout", seconds)


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
        status = wait_for([pid], HANG)[pid]
        assert status == -signal.SIGKILL, (point, status)


def run_pairs(root: Path) -> None:
    """Two children for each case."""
    from launch.local import free_port

    for role, point in CASES:
        folder = root / f"{role}-{point}"
        with free_port() as port:
            pids = [
                forked(lambda i=i: pair(folder, i, port, role, point))  # noqa: B023
                for i in range(2)
            ]
            if role in FIRST:
                pids.reverse()
            first = wait_for(pids[:1], HANG)
            if role not in ("fail", "late"):
                os.kill(pids[1], signal.SIGKILL)
            wait_for(pids[1:], HANG)
        # JAX ends a process whose coordination service is gone, if it is faster than we are.
        assert first[pids[0]] in ((0, -signal.SIGABRT) if role == "lead" else (0,)), (role, point)


WAYS = {"end": 0, "exit": 3, "exception": 1, "os._exit": 4, "os._exit while writing": 4}
"""How a program ends right after `save`, and its status."""


def leave(folder: Path, way: str) -> None:
    """Ends without a wait or a close."""
    manager = ckpt.CheckpointManager(folder)
    manager.save(1, state_of(1))
    manager.wait()
    writing = threading.Event()
    long = HANG if way == "os._exit while writing" else 0.2  # it is still at work when we leave
    if way != "os._exit":
        when("written", lambda: writing.set() or time.sleep(long))
    manager.save(2, state_of(2))
    if way == "exit":
        sys.exit(3)
    if way == "exception":
        raise LookupError("raised on purpose")
    if way == "os._exit while writing":
        assert writing.wait(HANG)
    if way.startswith("os._exit"):
        os._exit(4)


def run_ways(root: Path) -> None:
    """One child for each way; it ends as any program does, with its hooks."""
    found: dict[str, int] = {}
    for way in WAYS:
        pid = os.fork()
        if pid == 0:
            said = os.open(root / f"{way}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            leave(root / way, way)
            return
        found[way] = wait_for([pid], HANG)[pid]
    (root / "statuses.json").write_text(json.dumps(found))


RIVALRY = 40
"""How many steps each of two jobs saves."""


def rival(folder: Path, index: int) -> int:
    """Saves steps as fast as it can where another job does the same."""
    manager = ckpt.CheckpointManager(folder, keep=2)
    for step in range(1, RIVALRY + 1):
        try:
            manager.save(step, {"n": step, "b": np.full(5, index, np.float32)})
            manager.wait()
        except ckpt.CheckpointError as error:
            if not isinstance(error.__cause__ or error, ckpt.CheckpointExistsError):
                raise
    return 0


def run_rivals(root: Path) -> None:
    """Two jobs that know nothing of each other."""
    pids = [forked(lambda i=i: rival(root / "run", i)) for i in range(2)]
    assert set(wait_for(pids, HANG).values()) == {0}


# --- the tests


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of each mode, once the script has been through all of them."""
    root = tmp_path_factory.mktemp("run")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    done = subprocess.run(
        [sys.executable, __file__, str(root)],
        cwd=ROOT, env=env, text=True, capture_output=True, timeout=12 * HANG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_killed_at_every_point(ran: Path) -> None:
    root = ran / "alone"
    for point in faults.POINTS:
        folder = root / point
        steps = [1] if point in BEFORE else [1, 2]
        with ckpt.CheckpointManager(folder, keep=2) as manager:
            assert manager.all_steps() == steps, point
            for step in steps:
                assert is_of(manager.restore(state_of(0), step=step), step), point
            assert sorted(p.name for p in folder.iterdir()) == [str(s) for s in steps], point
            assert manager.save(3, state_of(3))
        assert is_of(ckpt.load_checkpoint(folder / "3", state_of(0)), 3), point


def test_a_peer_that_dies_hangs_or_fails(ran: Path) -> None:
    """The other one says which, and for how long it waited."""
    root = ran / "pairs"
    reports = {path.name[:-7]: json.loads(path.read_text()) for path in root.glob("*.0.json")}
    assert set(reports) == {
        f"{role}-{point}"
        for role, point in CASES
        if role not in FIRST and 2 not in steps_after(role, point)
    }
    for case, report in reports.items():
        if case.startswith("fail"):
            assert "process 1: ZeroDivisionError" in report["error"]
        else:
            assert "Process 1 did not answer for 1 s (" in report["error"], (case, report)
        kind = "CheckpointPeerError" if case.endswith("reading") else "CheckpointSaveError"
        assert report["kind"] == kind, (case, report)
        assert report["steps"] == [1] and report["left"] == ["1"], (case, report)
    for case, why in (("fail-group", "ZeroDivisionError"), ("late-written", "Process 1 did not")):
        other = json.loads((root / f"{case}.1.json").read_text())
        assert why in other["error"] and other["steps"] == [1]


def test_a_first_process_that_dies_or_hangs(ran: Path) -> None:
    """It runs JAX's coordination service: the others hear at once that it died."""
    root = ran / "pairs"
    for path in root.glob("lead-*.1.json"):
        report = json.loads(path.read_text())
        assert "Process 0 did not answer" in report["error"], report
        assert "coordination service" in report["error"], report
    report = json.loads((root / "stuck-written.1.json").read_text())
    assert "Process 0 did not answer for 2 s (committing step 2)" in report["error"], report
    assert report["steps"] == [1], report


def test_whatever_happened_to_a_process_what_was_committed_is_there(ran: Path) -> None:
    """Killed at every point, the first and the second of two processes."""
    for role, point in CASES:
        folder, steps = ran / "pairs" / f"{role}-{point}", steps_after(role, point)
        with ckpt.CheckpointManager(folder, keep=2) as manager:
            assert manager.all_steps() == steps, (role, point)
            for step in steps:
                assert is_of(manager.restore(state_of(0), step=step), step), (role, point)
        assert {path.name for path in folder.iterdir()} == {str(step) for step in steps}


def test_every_way_to_end_right_after_save(ran: Path) -> None:
    """The exit hook commits; `os._exit` knows no hooks, and loses what was not yet committed."""
    root = ran / "ways"
    assert json.loads((root / "statuses.json").read_text()) == WAYS
    for way in WAYS:
        said = (root / f"{way}.txt").read_text()
        names = {path.name for path in (root / way).iterdir()}
        if way.endswith("writing"):
            assert names - {"1"} and "2" not in names
        if way in ("end", "exit") and "lost at exit" not in said:
            assert said == "" and names == {"1", "2"}
        if way == "exception":
            assert "LookupError: raised on purpose" in said
        with ckpt.CheckpointManager(root / way) as manager:
            steps = manager.all_steps()
            if not way.startswith("os._exit") and sys.version_info[:3] not in NO_THREADS:
                assert steps == [1, 2], said
            for step in steps:
                assert is_of(manager.restore(state_of(0), step=step), step), way
            assert steps[0] == 1 and {str(step) for step in steps} == {
                path.name for path in (root / way).iterdir()
            }


NO_THREADS = ((3, 12, 0), (3, 12, 1))
"""Versions that start no thread once a program is ending."""


def test_two_jobs_in_one_folder(ran: Path) -> None:
    """Each step is the one's or the other's, and whole; neither stumbles over the other."""
    root = ran / "rivals"
    with ckpt.CheckpointManager(root / "run", read_only=True) as manager:
        steps = manager.all_steps()
        assert steps[-1] == RIVALRY and len(steps) >= 2
        for step in steps:
            state = manager.restore(step=step).state
            assert state["n"] == step
            assert state["b"].tolist() in ([0.0] * 5, [1.0] * 5)
    assert {path.name for path in (root / "run").iterdir()} == {str(step) for step in steps}


if __name__ == "__main__":
    for run in (run_alone, run_rivals, run_pairs, run_ways):  # children of the last one come back
        folder = Path(sys.argv[1]) / run.__name__.removeprefix("run_")
        folder.mkdir()
        run(folder)
