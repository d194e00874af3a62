"""Real processes: they compute together, die together, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
HANG = 300.0
"""Seconds after which something has stopped for good, on the slowest machine."""

SUM = """
import jax, numpy as np
from launch.distributed import initialize_from_env
initialize_from_env()
n = jax.device_count()
mesh = jax.make_mesh((n,), ("data",))
rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
x = jax.make_array_from_callback((n,), rows, lambda i: np.arange(n, dtype=np.float32)[i])
def total(x):
    return jax.lax.psum(x, "data")
y = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data")))(x)
mine = {float(s.data[0]) for s in y.addressable_shards}
print("process", jax.process_index(), "of", jax.process_count(), jax.local_device_count(), mine)
"""

# Process `who` fails in the way `how`; the others wait in a collective that never ends.
FAIL = """
import os, signal, sys
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from launch.distributed import initialize_from_env
how, who = sys.argv[1], int(sys.argv[2])
initialize_from_env()
multihost_utils.sync_global_devices("up")
if jax.process_index() == who:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(7)
    raise ValueError("broken on purpose")
multihost_utils.sync_global_devices("never")
"""

# No JAX: starts at once.  Each process says its pid and the pid of a process it started itself.
LINGER = """
import os, signal, subprocess, sys, time
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def stop(number, frame):
    os.write(1, f"got {signal.Signals(number).name}\\n".encode())  # print may just be at work
    sys.exit(0 if sys.argv[1] == "polite" else 5)
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
elif sys.argv[1] != "plain":
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
print("pids", os.getpid(), own.pid, flush=True)
time.sleep(600)
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(text)
    return path


def alive(pid: int) -> bool:
    """True while the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def notices(err: str) -> list[str]:
    """What the launcher itself said."""
    return [line for line in err.splitlines() if line.startswith("launch: ")]


def wait_until_gone(pids: list[int]) -> list[int]:
    end = time.monotonic() + HANG
    while any(alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return [p for p in pids if alive(p)]


def pids_of(launcher: subprocess.Popen[str], processes: int) -> list[int]:
    """Reads the launcher's output until each process has said its pids; in their order."""
    assert launcher.stdout is not None
    found: dict[str, list[int]] = {}
    while len(found) < processes:
        index, word, *pids = launcher.stdout.readline().split()
        assert word == "pids"
        found[index] = [int(pid) for pid in pids]
    return [pid for index in sorted(found) for pid in found[index]]


@pytest.mark.parametrize(
    ("processes", "devices", "start"),
    [(1, 8, "run_quick"), (2, 4, "run_local"), (4, 2, "run_quick")],
)
def test_all_devices_sum_up(
    request: pytest.FixtureRequest, tmp_path: Path, processes: int, devices: int, start: str
) -> None:
    """By the launcher itself where the environment names a proxy, which nobody is to ask."""
    nobody = {"PYTHONPATH": str(ROOT), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    options = {"env": {**os.environ, **nobody}} if start == "run_local" else {}
    done = request.getfixturevalue(start)(processes, devices, script(tmp_path, SUM), **options)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"[{i}] process {i} of {processes} {devices} {{28.0}}" for i in range(processes)
    ]


@pytest.mark.parametrize(
    ("how", "who", "status", "words", "start"),
    [
        ("kill", 0, 137, "was killed by SIGKILL", "run_local"),
        ("kill", 1, 137, "was killed by SIGKILL", "run_quick"),
        ("exit", 0, 7, "exited with status 7", "run_quick"),
        ("exit", 1, 7, "exited with status 7", "run_local"),
        ("raise", 0, 1, "exited with status 1", "run_local"),
        ("raise", 1, 1, "exited with status 1", "run_quick"),
    ],
)
def test_one_that_fails_stops_all(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    how: str,
    who: int,
    status: int,
    words: str,
    start: str,
) -> None:
    run = request.getfixturevalue(start)
    done = run(2, 1, script(tmp_path, FAIL), how, str(who))
    assert done.returncode == status, done.stderr
    said = notices(done.stderr)
    assert said[:2] == [f"launch: process {who} {words}", f"launch: stopping process {1 - who}"]
    if how == "raise":
        assert f"[{who}] ValueError: broken on purpose" in done.stderr
    if start == "run_local":
        assert "runpy" not in done.stderr.partition("ValueError")[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("manner", "status"), [("polite", 0), ("failing", 5)])
def test_signals_are_forwarded(
    start_local, tmp_path: Path, number: signal.Signals, manner: str, status: int
) -> None:
    launcher = start_local(2, 1, script(tmp_path, LINGER), manner)
    pids = pids_of(launcher, 2)
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=HANG)
    assert sorted(out.splitlines()) == [f"[0] got {number.name}", f"[1] got {number.name}"]
    assert launcher.returncode == status
    assert wait_until_gone(pids) == []


def test_a_default_program_dies_of_sigterm(start_local, tmp_path: Path) -> None:
    launcher = start_local(2, 1, script(tmp_path, LINGER), "plain")
    pids = pids_of(launcher, 2)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=HANG)
    assert launcher.returncode == 143
    assert "process 0 was killed by SIGTERM" in err
    assert wait_until_gone(pids) == []


def test_a_second_signal_kills_the_stubborn(start_local, tmp_path: Path) -> None:
    launcher = start_local(2, 1, script(tmp_path, LINGER), "stubborn")
    pids = pids_of(launcher, 2)
    launcher.send_signal(signal.SIGINT)
    assert "SIGINT; waiting up to 30 s" in launcher.stderr.readline()
    assert all(alive(p) for p in pids)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=HANG)
    assert launcher.returncode == 137
    assert wait_until_gone(pids) == []


def test_a_dead_peer_ends_the_stubborn_too(start_local, tmp_path: Path) -> None:
    launcher = start_local(2, 1, script(tmp_path, LINGER), "stubborn")
    pids = pids_of(launcher, 2)
    os.kill(pids[0], signal.SIGKILL)
    _, err = launcher.communicate(timeout=HANG)
    assert launcher.returncode == 137
    assert "did not stop in time; killing it" in err
    assert wait_until_gone(pids) == []


ENDING = """
import ctypes, os, platform, sys, threading, time
from pathlib import Path

def ended(index):
    stat = Path("/proc", Path(f"{sys.argv[1]}/{index}").read_text(), "stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True

def end_after(other, status):
    while not ended(other):
        time.sleep(0.01)
    os._exit(status)

me = int(os.environ["SHARDFLAX_PROCESS_ID"])
for index in (me, 1 - me):
    part = Path(sys.argv[1], f"{index}.part")
    if index == me:
        part.write_text(str(os.getpid()))
        part.rename(part.with_suffix(""))
    while not part.with_suffix("").exists():
        time.sleep(0.01)
if me == 0:
    end_after(1, 1)
threading.Thread(target=end_after, args=(0, 7)).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # this thread ends
"""


def test_who_is_still_being_taken_apart_died_first(run_quick, tmp_path: Path) -> None:
    """As a process with much memory is, whose connections are closed already."""
    done = run_quick(2, 1, script(tmp_path, ENDING), tmp_path)
    said = notices(done.stderr)
    assert said == [
        "launch: process 1 exited with status 7",
        "launch: stopping process 0",
        "launch: process 0 exited with status 1",
    ]
    assert done.returncode == 7


def test_who_died_first_is_known_though_nobody_looked(start_local, tmp_path: Path) -> None:
    """The launcher is held meanwhile: it finds both dead at once."""
    launcher = start_local(2, 1, script(tmp_path, LINGER), "stubborn")
    pids = pids_of(launcher, 2)
    launcher.send_signal(signal.SIGSTOP)
    for pid, number in ((pids[2], signal.SIGKILL), (pids[0], signal.SIGUSR1)):
        os.kill(pid, number)
        assert wait_until_gone([pid]) == []
    launcher.send_signal(signal.SIGCONT)
    _, err = launcher.communicate(timeout=HANG)
    said = notices(err)
    assert said == [
        "launch: process 1 was killed by SIGKILL",
        "launch: stopping process 0",
        "launch: process 0 was killed by SIGUSR1",
    ]
    assert launcher.returncode == 137


def test_nobody_outlives_a_killed_launcher(start_local, tmp_path: Path) -> None:
    launcher = start_local(2, 1, script(tmp_path, LINGER), "stubborn")
    pids = pids_of(launcher, 2)
    launcher.kill()
    launcher.wait()
    try:
        assert wait_until_gone(pids) == []
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_remains_of_a_finished_process_are_killed(run_local, tmp_path: Path) -> None:
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    program = f"import subprocess, sys\nprint(subprocess.Popen({sleeper}).pid)"
    done = run_local(1, 1, script(tmp_path, program), timeout=HANG)
    assert done.returncode == 0
    pid = int(done.stdout.split()[-1])
    assert wait_until_gone([pid]) == []


def test_modules_run_as_main_with_their_arguments(run_local) -> None:
    done = run_local(1, 1, "-m", "timeit", "-n", "1", "-r", "1", "import sys; print(sys.argv[1:])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0] ['-n', '1', '-r', '1', ")


def test_a_bar_on_a_terminal_and_none_in_a_log(start_local, tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "print(os.environ['SHARDFLAX_PROGRESS'], os.environ.get('COLUMNS'))\n"
        "if os.environ['SHARDFLAX_PROGRESS'] == 'bar':\n"
        "    sys.stdout.write('\\rhalf\\rwhole\\n')\n"
    )
    path = script(tmp_path, program)
    launcher = start_local(2, 1, path, env=_terminal())
    out, _ = launcher.communicate(timeout=HANG)
    assert sorted(out.splitlines()) == ["[0] lines 70", "[1] lines 70"]

    ours, theirs = pty.openpty()
    launcher = start_local(2, 1, path, stdout=theirs, stderr=theirs, env=_terminal())
    launcher.wait(timeout=HANG)
    os.close(theirs)
    shown = read_all(ours).decode()
    assert "[0] bar 65" in shown  # 70, the prefix, and one left free so that nothing wraps
    assert "[1] lines 70" in shown
    assert "[0] whole" in re.sub(r"\x1b\[K", "", shown)


def read_all(terminal: int) -> bytes:
    """What was written to a terminal that nobody writes to any more; it may come in parts."""
    parts: list[bytes] = []
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while part := stream.read(1 << 16):
            parts.append(part)
    return b"".join(parts)


def test_native_output_stays_out_of_a_bar(start_local, tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys\n"
        "sys.stdout.write('\\rhalf')\n"
        "sys.stdout.flush()\n"
        "os.write(1, b'[Gloo] Rank 0 is connected to 0 peer ranks. \\n')\n"
        "subprocess.run(['echo', 'from elsewhere'])\n"
        "print('\\rwhole')\n"
    )
    launcher = start_local(1, 1, script(tmp_path, program))
    out, _ = launcher.communicate(timeout=HANG)
    assert sorted(out.splitlines()) == ["[0] from elsewhere", "[0] whole"]


def _terminal() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "70"}
