"""The disk: full, read-only, gone; and what is on it before a step can be seen."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt import faults

ROOT = Path(__file__).parents[2]

SMALL = """
import json, os, resource, signal, subprocess, sys, tempfile
from pathlib import Path
import numpy as np
from shardflax.ckpt import CheckpointManager, CheckpointSaveError, faults, load_checkpoint
folder, how = sys.argv[1:]
if how == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
    if os.geteuid() == 0:  # nothing is read-only for root
        folder = tempfile.mkdtemp()
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
small, large = ({"w": np.arange(n)} for n in (1000, 1 << 20))
told = []
manager = CheckpointManager(folder, on_error=told.append)

def fails(step, state):
    # One step is lost, and says so everywhere; the next one is there.
    handle = manager.save(step, state)
    failure = handle.committed.exception()
    left = sorted(p.name for p in manager.directory.iterdir())
    steps = manager.all_steps()
    change(True)
    try:
        manager.save(step + 1, small)
        raised = None
    except CheckpointSaveError as error:
        raised = error
    manager.wait()
    same = (load_checkpoint(f"{folder}/{step + 1}").state["w"] == small["w"]).all()
    assert raised is failure is told[-1] and same
    return str(failure), left, steps

def change(writable):
    if how == "tmpfs":
        mode = "rw" if writable else "ro"
        subprocess.run(["mount", "-o", "remount," + mode, folder], check=True)
        return
    for path in [Path(folder), *Path(folder).rglob("*")]:
        if path.is_dir():
            path.chmod(0o755 if writable else 0o555)

manager.save(1, small)
full = fails(2, large)
once = [False]
faults.listen(lambda point: point == "written" and once and change(once.pop()))
read_only = fails(4, small)
manager.close()
CheckpointManager(folder).close()
left = sorted(p.name for p in manager.directory.iterdir())
print(json.dumps([full, read_only, left]))
"""


def small_disk(folder: Path) -> tuple[list[str], str]:
    """A command that runs the next one with a disk of 4 MiB, or with a limit on sizes of files."""
    mount = f'mount -t tmpfs -o size=4m tmpfs {folder} && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if (
        shutil.which("unshare")
        and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    ):
        return prefix, "tmpfs"
    return [], "limit"


def test_a_disk_that_is_full_or_read_only_costs_one_step_and_nothing_else(tmp_path: Path) -> None:
    """Read-only from one moment to the next, while a step is written."""
    prefix, how = small_disk(tmp_path)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", SMALL, str(tmp_path), how],
        cwd=ROOT, env=env, text=True, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    full, read_only, left = json.loads(done.stdout.strip().splitlines()[-1])
    error, there, steps = full
    assert "Saving step 2" in error and re.search("No space left|File too large", error)
    assert there == ["1"] and steps == [1]
    error, there, steps = read_only
    assert "Saving step 4" in error and re.search("Read-only|Permission denied", error)
    assert steps == [1, 3] and left == ["1", "3", "5"]


def test_the_folder_of_the_run_vanishes_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    manager = ckpt.CheckpointManager(folder)
    end = faults.listen(lambda point: point == "group" and shutil.rmtree(folder))
    manager.save(1, {"w": jnp.ones(4)})
    with pytest.raises(ckpt.CheckpointSaveError, match="step 1"):
        manager.wait()
    end()
    shutil.rmtree(folder, ignore_errors=True)
    manager.save(2, {"w": jnp.ones(4)})
    with pytest.raises(ckpt.CheckpointSaveError, match="No such file"):
        manager.wait()
    folder.mkdir()
    manager.save(3, {"w": jnp.ones(4)})
    manager.close()
    assert manager.all_steps() == [3]


def test_files_that_vanish_while_a_step_is_saved_are_missed(tmp_path: Path) -> None:
    def lose(point: str) -> None:
        if point == "merged":
            (path,) = (p for p in tmp_path.glob("*/state/d/*") if p.stat().st_size > 4096)
            path.unlink()

    manager = ckpt.CheckpointManager(tmp_path)
    end = faults.listen(lose)
    manager.save(1, {"w": np.arange(5000)})
    with pytest.raises(ckpt.CheckpointSaveError, match="state/d"):
        manager.wait()
    end()
    assert list(tmp_path.iterdir()) == []
    manager.close()


def test_two_runs_in_one_folder_do_not_destroy_each_other(tmp_path: Path) -> None:
    """The second one begins while the first is saving, and both save step 5."""
    there, gate = threading.Event(), threading.Event()
    first = ckpt.CheckpointManager(tmp_path)
    end = faults.listen(lambda point: point == "written" and (there.set() or gate.wait(300)))
    first.save(5, {"w": np.arange(3)})
    assert there.wait(300)
    second = ckpt.CheckpointManager(tmp_path)
    assert list(tmp_path.glob("5.saving*")), "what a living process writes is not cleaned up"
    end()
    second.save(5, {"w": np.arange(3) + 1})
    second.close()
    gate.set()
    with pytest.raises(ckpt.CheckpointSaveError, match="Step 5 is already in") as caught:
        first.close()
    assert isinstance(caught.value.__cause__, ckpt.CheckpointExistsError)
    assert ckpt.load_checkpoint(tmp_path / "5").state["w"].tolist() == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


STATE = {"w": np.arange(1 << 18), "b": np.arange(7), "name": "x", "step": 3}


def entries(step: Path) -> set[str]:
    """The files and folders of a step, by their names in it."""
    return {str(path.relative_to(step)) for path in (step, *step.rglob("*"))}


Event = tuple[str, str]
"""("fsync", path), ("write", path), ("names", folder): its names changed; ("commit", source)."""


def check_order(events: list[Event], root: Path) -> None:
    """Everything was synced after its last change and before the commit, the run's folder after it.

    The manifest is the last file that is synced.
    """
    commit = next(i for i, (what, _) in enumerate(events) if what == "commit")
    source = Path(events[commit][1])
    synced = {path: i for i, (what, path) in enumerate(events[:commit]) if what == "fsync"}
    names = entries(root / "3")
    assert {"MANIFEST.json", "extras/metadata", "state/_METADATA", "state/d", "."} <= names
    assert not {name for name in names if str(source / name) not in synced}
    for i, (what, path) in enumerate(events[:commit]):
        if what in ("write", "names") and path in synced and Path(path) != root:
            assert synced[path] > i, (what, path)
    files = [name for name in names if (root / "3" / name).is_file()]
    assert max(files, key=lambda name: synced[str(source / name)]) == "MANIFEST.json"
    assert ("fsync", str(root)) in events[commit:]


STRACE = shutil.which("strace")


def test_all_is_on_the_disk_before_a_step_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if STRACE is None:
        with capsys.disabled():
            print("\nstrace is not installed: only Python says what it forces to the disk")
    events: list[Event] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        events.append(("commit", str(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    with ckpt.CheckpointManager(tmp_path / "new" / "run") as manager:
        monkeypatch.setattr(os, "rename", renamed)
        manager.save(3, STATE)
        manager.wait()
    check_order(events, tmp_path / "new" / "run")
    begun = [path for _, path in events[: events.index(("fsync", str(manager.directory)))]]
    assert begun == [str(tmp_path / "new"), str(tmp_path)], "the names of new folders are there too"


CALLS = (
    *("fsync", "fdatasync", "write", "writev", "pwrite64", "pwritev", "ftruncate"),
    *("openat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat"),
)


def whole_lines(log: Path) -> list[str]:
    """The calls that succeeded; what another thread's call interrupted in the log is put together.

    An fsync stands where it began, all else where it ended.
    """
    lines: list[str] = []
    begun: dict[str, tuple[int, str]] = {}
    for line in log.read_text(errors="replace").splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            begun[thread] = len(lines), call.removesuffix("<unfinished ...>")
            lines.append("")
        elif resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", call):
            at, start = begun.pop(thread)
            if start.startswith(("fsync", "fdatasync")):
                lines[at] = start + resumed[1]
            else:
                lines.append(start + resumed[1])
        else:
            lines.append(call)
    return [line for line in lines if re.search(r"\) += \d", line)]


def strace_says(log: Path, root: Path) -> list[Event]:
    """What system calls did in a folder."""
    events: list[Event] = []

    def moved(source: str, target: str) -> None:
        """What was done to a file is said of its new name."""
        events[:] = [(what, target if path == source else path) for what, path in events]
        events.extend(("names", str(Path(path).parent)) for path in (source, target))

    for line in whole_lines(log):
        quoted = re.findall(r'"([^"]*)"', line)
        if found := re.match(r"f(data)?sync\(\d+<([^>]*)>", line):
            events.append(("fsync", found[2]))
        elif str(root) not in line:
            continue
        elif line.startswith("rename"):
            committed = ".saving" in quoted[0] and Path(quoted[0]).parent == root
            moved(*quoted) if not committed else events.append(("commit", quoted[0]))
        elif found := re.match(r"(?:p?writev?(?:64)?|ftruncate)\(\d+<([^>]*)>", line):
            events.append(("write", found[1]))
        elif line.startswith(("mkdir", "unlink")) or "O_CREAT" in line:
            events.append(("names", str(Path(quoted[0]).parent)))
    return events


if STRACE is not None:

    def test_the_kernel_says_so_too(tmp_path: Path) -> None:
        code = (
            "import sys, numpy as np\n"
            "from shardflax.ckpt import CheckpointManager\n"
            "state = {'w': np.arange(1 << 18), 'b': np.arange(7), 'name': 'x', 'step': 3}\n"
            "CheckpointManager(sys.argv[1]).save(3, state)\n"
        )
        log, root = tmp_path / "log", tmp_path / "run"
        knows = subprocess.run([str(STRACE), "--help"], capture_output=True, text=True).stdout
        quick = ["--seccomp-bpf"] if "--seccomp-bpf" in knows else []
        done = subprocess.run(
            [str(STRACE), "-f", *quick, "-y", "-o", str(log), "-e", "trace=" + ",".join(CALLS),
             sys.executable, "-c", code, str(root)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        events = strace_says(log, root)
        written = {path for what, path in events if what == "write"}
        assert len(written) >= 6 and any("/state/d/" in path for path in written)
        check_order(events, root)
        assert ("fsync", str(tmp_path)) in events
