"""`launch.train` with real processes: killed and started again, and on other topologies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.history import History
from tests.multiprocess.quick import ROOT, Launcher

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 24
SMALL = (
    *("--model", "tiny", "--layers", "1", "--seq-len", "32", "--batch", "8"),
    *("--steps", str(STEPS), "--warmup-steps", "4", "--eval-batches", "1", "--sample", "0"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is quick to read."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(f"{i} squared is {i * i}, and cubed {i**3}." for i in range(800)))
    return path


def command(corpus: Path, run: Path, *more: str) -> tuple[str, ...]:
    return ("-m", "launch.train", "--data", str(corpus), "--run", str(run), *SMALL, *more)


def paced(args: Sequence[str], step: int) -> tuple[str, ...]:
    """The same command, which takes its time from a step on: what is done to it then is in time."""
    assert args[:2] == ("-m", "launch.train")
    return ("-m", "tests.multiprocess.paced", str(step), *args[2:])


MESH = ("--mesh", "fsdp=2,tensor=2", "--preset", "fsdp_tp")


def losses(run: Path) -> list[float]:
    """The loss of each step, which must be all there, once."""
    lines = History.read(run / "losses.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def wait_for_step(run: Path, step: int, launcher: Launcher) -> None:
    """Waits until the run has done a step."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and launcher.poll() is None:
        lines = History.read(run / "losses.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {launcher.communicate()}")


def children(pid: int) -> list[int]:
    """The processes of a run: the children of its launcher, but for its guard."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            line = (entry.parent / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if parent == pid and "-ISc" not in line:
            found.append(int(entry.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Path, compiled: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of a run of 2 processes x 2 devices that nobody kills; by the launcher itself."""
    run = tmp_path_factory.mktemp("run")
    launcher = [sys.executable, "-m", "launch.local", "--processes=2", "--devices=2", "--"]
    done = subprocess.run(
        [*launcher, *command(corpus, run, *MESH)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env={**os.environ, **compiled, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(run)


KILLS = {6: "first", 8: "second", 10: "both", 11: "launcher"}
"""After which step it is, and who is killed there.  Step 3 is saved when step 6 is done."""


def test_a_run_killed_again_and_again_goes_on_as_if_nothing_had_been(
    undisturbed: list[float],
    corpus: Path,
    tmp_path: Path,
    start_quick: Callable[..., Launcher],
    run_quick: Callable[..., Any],
) -> None:
    args = command(corpus, tmp_path, *MESH, "--save-every", "3")
    before = 0
    for step, who in KILLS.items():
        after = max(step, before + 1)
        launcher = start_quick(2, 2, *paced(args, after))
        wait_for_step(tmp_path, after, launcher)
        pids = children(launcher.pid)
        assert len(pids) == 2
        chosen = {"first": pids[:1], "second": pids[1:], "both": pids, "launcher": [launcher.pid]}
        for pid in chosen[who]:
            os.kill(pid, signal.SIGKILL)
        out, _ = launcher.communicate(timeout=300)
        assert launcher.returncode != 0
        assert not before or 3 <= went_on(out) <= before
        before = History.read(tmp_path / "losses.jsonl")[-1]["step"]
        assert before < STEPS, "killed too late to show anything"

    before = went_on_and_stopped(start_quick, 2, 2, args, tmp_path, before + 1)
    again = run_quick(2, 2, *args)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"going on after step {before}" in again.stdout
    assert losses(tmp_path) == undisturbed  # bit for bit


def went_on(out: str) -> int:
    """The step from which a run says that it goes on: one that it saved."""
    said = re.search(r"going on after step (\d+)", out)
    assert said and int(said[1]) % 3 == 0, out
    return int(said[1])


def went_on_and_stopped(
    start_quick: Callable[..., Launcher],
    processes: int,
    devices: int,
    args: Sequence[str],
    run: Path,
    step: int,
) -> int:
    """Asks a run to stop after some step, and returns the step that it saved then."""
    launcher = start_quick(processes, devices, *paced(args, step))
    wait_for_step(run, step, launcher)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=300)
    stopped = re.search(r"stopped after step (\d+), which is saved", out)
    assert stopped and step <= int(stopped[1]) < STEPS, out + err
    assert launcher.returncode != 0
    return int(stopped[1])


def test_a_run_that_is_asked_to_stop_goes_on_with_another_number_of_processes(
    undisturbed: list[float],
    corpus: Path,
    tmp_path: Path,
    start_quick: Callable[..., Launcher],
    run_quick: Callable[..., Any],
) -> None:
    """And in another layout."""
    args = command(corpus, tmp_path, "--mesh", "data=2,fsdp=4", "--preset", "fsdp")
    step = went_on_and_stopped(start_quick, 1, 8, args, tmp_path, 4)  # no save is due
    args = command(corpus, tmp_path, "--mesh", "data=2,fsdp=2,tensor=2", "--preset", "fsdp_tp")
    again = run_quick(4, 2, *args)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"going on after step {step}" in again.stdout
    found = losses(tmp_path)
    assert found == pytest.approx(undisturbed, rel=1e-4)
    assert found[-1] < 0.8 * found[0]


def test_a_finished_run_has_nothing_left_to_do(
    undisturbed: list[float], corpus: Path, tmp_path: Path, run_quick: Callable[..., Any]
) -> None:
    """In yet another layout, with whose losses, too."""
    args = command(corpus, tmp_path, "--mesh", "data=4,tensor=2", "--preset", "tp_sp")
    done = run_quick(1, 8, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    before = losses(tmp_path)
    assert before[0] == pytest.approx(undisturbed[0], rel=1e-6)
    assert before == pytest.approx(undisturbed, rel=1e-4)
    args = command(corpus, tmp_path, "--mesh", "data=4", "--preset", "dp")
    again = run_quick(1, 4, *args)
    assert again.returncode == 0, again.stderr
    assert f"all {STEPS} steps are done" in again.stdout
    assert losses(tmp_path) == before
    other = run_quick(1, 4, *args, "--model", "small")
    assert other.returncode == 2
    assert "error:" in other.stderr and "embed/embedding" in other.stderr
    assert "Traceback" not in other.stderr


def test_errors_are_said_once(corpus: Path, tmp_path: Path, run_quick: Callable[..., Any]) -> None:
    done = run_quick(2, 4, *command(corpus, tmp_path, "--mesh", "data=2,fsdp=2,tensro=2"))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "tensor" in done.stderr and "Traceback" not in done.stderr
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
