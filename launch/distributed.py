"""How a process learns which part of a run it is.

A launcher sets three variables for each process that it starts:

- `SHARDFLAX_COORDINATOR`: host:port of process 0's coordination service,
- `SHARDFLAX_NUM_PROCESSES`: how many processes there are,
- `SHARDFLAX_PROCESS_ID`: which of them this is, from 0.

None of them is set where a process runs alone.  A fourth, `SHARDFLAX_PROGRESS`, tells
`shardflax.training.Progress` how to report progress: `bar` (draw one with carriage returns, at most
`COLUMNS` wide) or `lines` (whole lines).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

__all__ = [
    "Cluster",
    "cluster_from_env",
    "initialize_from_env",
    "leave_together",
    "leaving_on_failure",
]

_COORDINATOR = "SHARDFLAX_COORDINATOR"
_NUM_PROCESSES = "SHARDFLAX_NUM_PROCESSES"
_PROCESS_ID = "SHARDFLAX_PROCESS_ID"
_LATER = 1.0  # seconds by which a failure may be the answer to another one


@dataclass(frozen=True)
class Cluster:
    """One process's place among the processes of a run.

    >>> Cluster("127.0.0.1:1234", num_processes=2, process_id=1).environ()["SHARDFLAX_PROCESS_ID"]
    '1'
    """

    coordinator: str
    num_processes: int
    process_id: int

    def environ(self) -> dict[str, str]:
        """The variables that tell a process its place."""
        return {
            _COORDINATOR: self.coordinator,
            _NUM_PROCESSES: str(self.num_processes),
            _PROCESS_ID: str(self.process_id),
        }


def cluster_from_env(environ: Mapping[str, str] | None = None) -> Cluster | None:
    """This process's place as the launcher described it; None where it runs alone.

    Raises `LaunchEnvironmentError` if only some of the variables are set, or one makes no sense.

    >>> cluster_from_env({}) is None
    True
    >>> place = Cluster("127.0.0.1:1234", num_processes=2, process_id=1)
    >>> cluster_from_env(place.environ()) == place
    True
    """
    environ = os.environ if environ is None else environ
    given = [v for v in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if environ.get(v)]
    if not given:
        return None
    coordinator = environ.get(_COORDINATOR, "")
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise _error(_COORDINATOR, "host:port", environ)
    num_processes = _number(_NUM_PROCESSES, environ)
    if num_processes < 1:
        raise _error(_NUM_PROCESSES, "a number from 1", environ)
    process_id = _number(_PROCESS_ID, environ)
    if not process_id < num_processes:
        raise _error(_PROCESS_ID, f"a number below {_NUM_PROCESSES}={num_processes}", environ)
    return Cluster(coordinator, num_processes, process_id)


def _number(variable: str, environ: Mapping[str, str]) -> int:
    if not environ.get(variable, "").isdigit():
        raise _error(variable, "a number", environ)
    return int(environ[variable])


def _error(variable: str, expected: str, environ: Mapping[str, str]) -> Exception:
    # Imported late: the launcher itself shall start without waiting for JAX.
    from launch.errors import LaunchEnvironmentError

    found = repr(environ[variable]) if variable in environ else "it unset"
    return LaunchEnvironmentError(variable, expected, found)


def initialize_from_env(
    *, initialization_timeout: int = 120, heartbeat_timeout: int = 60, shutdown_timeout: int = 300
) -> Cluster | None:
    """Joins the other processes of the run, before anything else touches a device.

    Does nothing (and returns None) where the process runs alone.  All waits are bounded, in
    seconds: for the others to come up, for signs of life, and for the others to finish.
    Processes with CPU devices talk to one another through gloo.

    >>> initialize_from_env() is None  # nobody launched the doctests
    True
    """
    cluster = cluster_from_env()
    if cluster is None:
        return None
    import jax

    _ask_no_proxy(cluster.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=initialization_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=shutdown_timeout,
    )
    return cluster


_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy."""


def _ask_no_proxy(coordinator: str) -> None:
    """The processes of a run talk directly, also where the environment names a proxy for gRPC."""
    if not any(os.environ.get(name) for name in _PROXIES):
        return  # JAX warns of every variable of a proxy, this one too
    host = coordinator.rpartition(":")[0].strip("[]")
    direct = "no_grpc_proxy"  # as gRPC spells it
    others = os.environ.get(direct) or os.environ.get("no_proxy")
    os.environ[direct] = f"{others},{host}" if others else host


def leave_together(seconds: float = 15.0) -> bool:
    """Waits at most so long for all processes of the run to come here; tells whether they did.

    For an error that all processes meet alike: they part in order, and one of them reports it.
    Afterwards there is nothing left to do but to exit.

    >>> leave_together()  # nobody else is there
    True
    """
    if cluster_from_env() is None:
        return True
    import jax

    together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    together.start()
    together.join(seconds)
    return not together.is_alive()


@contextlib.contextmanager
def leaving_on_failure() -> Iterator[None]:
    """One of several processes that fails leaves at once, and so lets the others be stopped.

    An ordinary exit would first wait for the others in the shutdown barrier of `jax.distributed`,
    which they never reach.  After an exception it waits a moment: that may be the loss of another
    process, which shall be found dead first.  A process that runs alone exits as usual.

    >>> with leaving_on_failure():
    ...     print("work")
    work
    """
    try:
        yield
    except BaseException as error:
        status = _status(error)
        if status == 0 or cluster_from_env() is None:
            raise
        _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if not isinstance(error, SystemExit):
            time.sleep(_LATER)
        os._exit(status)


def _status(error: BaseException) -> int:
    """The exit status that Python would give."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def _report(error: BaseException) -> None:
    """What Python would print."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error.with_traceback(_own_frames(error.__traceback__)))
    elif not isinstance(error.code, int):
        print(error.code, file=sys.stderr)


def _own_frames(frames: TracebackType | None) -> TracebackType | None:
    """The traceback from the program's first frame on, without the launcher's."""
    here = str(Path(__file__).parent)
    inner = frames
    while inner is not None:
        name = inner.tb_frame.f_code.co_filename
        if not name.startswith("<frozen") and str(Path(name).parent) != here:
            return inner
        inner = inner.tb_next
    return frames
