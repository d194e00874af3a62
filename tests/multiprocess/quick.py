"""`launch.local` that starts at once: forked from a process that has imported everything.

To import JAX takes longer than most of what a test has to say to it.  This file is also that
process: it reads what to start from a socket, and never touches a device itself.  What it forks is
the launcher with its own supervisor, and what that forks are the processes of a run.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

__all__ = ["Launcher", "Nursery"]

ROOT = Path(__file__).parents[2]
MODULES = (
    *("shardflax.ckpt", "shardflax.training.data", "launch.train"),
    *("orbax.checkpoint", "orbax.checkpoint.experimental.v1"),
    *("jax.experimental.array_serialization.serialization", "flax.training.checkpoints"),
    *("optax", "pytest"),
)
"""What programs of tests import.  None of it starts a thread of Python or looks for devices."""


class Launcher:
    """A launcher that was started: as much of `subprocess.Popen` as tests use."""

    def __init__(self, args: Sequence[str], said: int, out: int, err: int) -> None:
        self.args, self.returncode = args, cast("int | None", None)
        self.stdout, self.stderr = (open(fd, encoding="utf-8") for fd in (out, err))  # noqa: SIM115
        self._said = open(said, "rb", buffering=0)  # noqa: SIM115
        self.pid = int(self._said.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, as `Popen` gives it."""
        if self.returncode is None:
            poll = select.poll()  # `select` cannot wait for a descriptor of a large number
            poll.register(self._said, select.POLLIN)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._said.readline() or b"9"))
            self._said.close()
        return self.returncode

    def poll(self) -> int | None:
        """The same if it has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it says until it ends."""
        said: dict[IO[str], str] = {}
        streams = (self.stdout, self.stderr)
        reading = [
            threading.Thread(target=lambda s=s: said.update({s: s.read()}), daemon=True)
            for s in streams
        ]
        for thread in reading:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for thread, stream in zip(reading, streams, strict=True):
            thread.join(300)
            stream.close()
        return said.get(self.stdout, ""), said.get(self.stderr, "")

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that has imported everything; made when the first launcher is wanted."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.multiprocess.quick", str(theirs.fileno())],
                cwd=ROOT, env=environ, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def start(
        self,
        processes: int,
        devices: int,
        *command: str | Path,
        env: Mapping[str, str] = os.environ,
    ) -> Launcher:
        """Starts `launch.local --processes N --devices M -- command`; see `tests/conftest.py`."""
        options = [f"--processes={processes}", f"--devices={devices}", "--grace=300"]
        args = [*options, "--", *map(str, command)]
        pipes = [os.pipe() for _ in range(3)]
        theirs = [writing for _, writing in pipes]
        text = json.dumps({"args": args, "env": dict(env)}).encode()
        socket.send_fds(self._socket, [len(text).to_bytes(8, "little")], theirs)
        self._socket.sendall(text)
        for writing in theirs:
            os.close(writing)
        return Launcher(args, *(reading for reading, _ in pipes))

    def run(self, *args: Any, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
        """The same to its end."""
        launcher = self.start(*args)
        out, err = launcher.communicate(timeout)
        return subprocess.CompletedProcess(launcher.args, launcher.wait(), out, err)

    def close(self) -> None:
        """Ends it, and what it started."""
        self._socket.close()
        self._process.wait(300)


# --- the process


def serve(connection: socket.socket) -> None:
    """Imports everything, and then starts what it is told to, until nobody can tell it any more."""
    for name in MODULES:
        importlib.import_module(name)
    while True:
        size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
        if not size:
            break
        text = connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
        if os.fork() == 0:
            leave_with(functools.partial(nurse, connection, json.loads(text), *descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def nurse(connection: socket.socket, job: dict[str, Any], said: int, out: int, err: int) -> int:
    """Forks a launcher; says its number, and how it ended."""
    connection.close()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(said)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.clear()
        os.environ.update(job["env"])
        leave_with(functools.partial(launch, job["args"]))
    os.close(out)
    os.close(err)
    os.write(said, b"%d\n" % pid)
    os.write(said, b"%d\n" % os.waitpid(pid, 0)[1])
    return 0


def launch(args: Sequence[str]) -> int:
    """`launch.local` whose processes are forked."""
    from launch import local

    local.subprocess = _Forking  # type: ignore[assignment]
    return local.main(args)


class _Forking:
    """In the place of `subprocess`: runs `python -m launch.child COMMAND` without the start."""

    DEVNULL, PIPE = subprocess.DEVNULL, subprocess.PIPE

    class Popen:
        """A process that was forked."""

        def __init__(
            self, command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int], **_: Any
        ) -> None:
            (native, self._out), (err, self._err) = os.pipe(), os.pipe()
            self.returncode: int | None = None
            self.pid = os.fork()
            if self.pid == 0:
                os.setsid()
                os.dup2(self._out, 1)
                os.dup2(self._err, 2)
                leave_with(functools.partial(child, command[3:], env, pass_fds[0]))
            os.close(self._out)
            os.close(self._err)
            self.stdout, self.stderr = open(native, "rb"), open(err, "rb")  # noqa: SIM115

        def _wait(self, how: int) -> int | None:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, how)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

        def poll(self) -> int | None:
            """Its exit status, if it has ended."""
            return self._wait(os.WNOHANG)

        def wait(self) -> int | None:
            """Its exit status."""
            return self._wait(0)

        def send_signal(self, number: int) -> None:
            """Unless it has ended."""
            if self.poll() is None:
                os.kill(self.pid, number)


def child(command: Sequence[str], env: Mapping[str, str], descriptor: int) -> int:
    """What `launch.child` does."""
    from launch.child import LAUNCHER, STDOUT, die_with_parent, run
    from launch.distributed import leaving_on_failure

    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update({k: v for k, v in env.items() if k not in (LAUNCHER, STDOUT)})
    die_with_parent(int(env[LAUNCHER]))
    sys.stdout = sys.__stdout__ = open(descriptor, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    with leaving_on_failure():
        run(command)
    return 0


def leave_with(work: Callable[[], int]) -> None:
    """Does some work and ends this process as Python would, but for the frames above."""
    status = 1
    try:
        status = work()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
