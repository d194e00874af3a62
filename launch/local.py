"""Starts several processes on this machine, each with emulated devices, as one JAX run.

    python -m launch.local --processes 2 --devices 4 -- -m some.module args
    python -m launch.local --processes 2 --devices 4 -- script.py args

The program calls `launch.distributed.initialize_from_env()` before it touches a device.  The lines
of process i come out with the prefix `[i] `; a progress bar that it draws with carriage returns
stays the last line of a terminal.  When one process fails, the others are stopped, and its exit
status is the launcher's.  SIGINT and SIGTERM are forwarded.  On Linux, no process outlives the
launcher, however that dies.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from launch.chatter import GlooChatter
from launch.child import LAUNCHER, STDOUT
from launch.console import Console
from launch.distributed import Cluster
from launch.supervise import Started, Supervisor

__all__ = ["child_environ", "free_port", "main"]

_DEVICES = "xla_force_host_platform_device_count"
# A loaded machine may schedule one device's thread long after another's: wait, don't abort.
_PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": "120",
    "xla_cpu_collective_call_terminate_timeout_seconds": "600",
}


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A TCP port of the loopback interface that nobody else uses, nor gets until the block ends.

    >>> with free_port() as port:
    ...     0 < port < 65536
    True
    """
    with socket.socket() as held:
        if sys.platform == "linux":  # JAX's service says the same, and so may listen there
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port


def _xla_flags(inherited: str, devices: int) -> str:
    """The caller's flags, with our number of devices, and our patience where he says nothing."""
    kept = [f for f in inherited.split() if not re.match(f"--{_DEVICES}(=|$)", f)]
    given = {f.lstrip("-").partition("=")[0] for f in kept}
    ours = [f"--{k}={v}" for k, v in _PATIENCE.items() if k not in given]
    return " ".join([*kept, *ours, f"--{_DEVICES}={devices}"])


def child_environ(
    cluster: Cluster, devices: int, columns: int | None = None, xla_flags: str = ""
) -> dict[str, str]:
    """The variables that differ from the launcher's own in one of the processes it starts.

    `columns` is the width of a bar that the process may draw; None forbids bars.

    >>> env = child_environ(Cluster("127.0.0.1:1234", 2, 0), devices=4)
    >>> env["SHARDFLAX_NUM_PROCESSES"], env["SHARDFLAX_PROGRESS"]
    ('2', 'lines')
    """
    alone = cluster.num_processes == 1
    return {
        **dict.fromkeys(cluster.environ(), ""),
        **({} if alone else cluster.environ()),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": _xla_flags(xla_flags, devices),
        "SHARDFLAX_PROGRESS": "lines" if columns is None else "bar",
        **({} if columns is None else {"COLUMNS": str(columns)}),
    }


def _start(
    command: Sequence[str], processes: int, devices: int, port: int, console: Console, index: int
) -> Started:
    """Starts process `index` in a session of its own, so that a terminal signals only us."""
    columns = console.columns(index) if console.tty and index == 0 else None
    cluster = Cluster(f"127.0.0.1:{port}", processes, index)
    environ = child_environ(cluster, devices, columns, os.environ.get("XLA_FLAGS", ""))
    # Python's stdout gets a pipe of its own: native code writes to descriptor 1 when it likes.
    reading, writing = os.pipe()
    with open(writing, "wb"):
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.child", *command],
            env={**os.environ, **environ, LAUNCHER: str(os.getpid()), STDOUT: str(writing)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            start_new_session=True,
        )
    assert process.stdout is not None
    assert process.stderr is not None
    out = open(reading, "rb")  # noqa: SIM115 (the supervisor closes it)
    return Started(process, {"out": out, "native": process.stdout, "err": process.stderr})


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and the command after `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.local",
        usage="%(prog)s [--processes N] [--devices M] -- (-m module | script.py) ...",
        description="Start N processes with M emulated devices each, as one JAX run.",
    )
    parser.add_argument("--processes", type=_positive, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--devices", type=_positive, default=1, metavar="M", help="per process; default 1"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long the processes may take to stop after SIGINT or SIGTERM; default 30",
    )
    split = list(argv).index("--") if "--" in argv else len(argv)
    options, command = parser.parse_args(argv[:split]), list(argv[split + 1 :])
    if not command or command == ["-m"]:
        parser.error("say after -- what to run: -m some.module args, or script.py args")
    if command[0] != "-m" and not os.path.isfile(command[0]):
        parser.error(f"expected -m some.module or a script after --, found {command[0]!r}")
    return options, command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of this module; returns the exit status.

    >>> main(["--processes", "1", "--", "-m", "timeit", "-n", "1", "-r", "1", "pass"])
    ... # doctest: +ELLIPSIS
    [0] 1 loop, best of 1: ...
    0
    """
    options, command = _parse(sys.argv[1:] if argv is None else argv)
    console = Console(options.processes, noise=GlooChatter)
    try:
        with free_port() as port:
            start = partial(_start, command, options.processes, options.devices, port, console)
            return Supervisor(console, options.grace).run(options.processes, start)
    except BrokenPipeError:  # whoever read our output has gone, and so have the processes now
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


if __name__ == "__main__":
    sys.exit(main())
