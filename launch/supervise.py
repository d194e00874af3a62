"""Keeps watch over the processes of a run: their output, their deaths, and our signals.

One thread, one `select`: output arrives through pipes, signals (also "a child has died") through
the interpreter's wakeup descriptor.  On Linux each process has a descriptor that tells of its
death: they become ready in the order in which processes die, however late that is looked at.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.console import Console, Stream
from launch.guard import Guard

__all__ = ["Started", "Supervisor", "cause", "exit_status"]

_LOST_GRACE = 3.0  # seconds for the others to stop by themselves once one has failed
_TAKEN_APART = 10.0  # seconds for the kernel to take a process apart
_PF_EXITING = 4  # of the flags in /proc/PID/stat; <linux/sched.h>
_DRAIN = 2.0  # seconds for output to arrive that outlives all processes
_FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


def cause(code: int) -> str:
    """How a process ended, in words, from `Popen.returncode`.

    >>> cause(3), cause(-9)
    ('exited with status 3', 'was killed by SIGKILL')
    """
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def exit_status(code: int) -> int:
    """What a shell would report for `Popen.returncode`.

    >>> exit_status(3), exit_status(-9)
    (3, 137)
    """
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket from which the numbers of the signals that arrive can be read."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    old_handlers = {s: signal.getsignal(s) for s in (*_FORWARDED, signal.SIGCHLD)}
    for number, old in old_handlers.items():
        if old is not signal.SIG_IGN or number == signal.SIGCHLD:  # nohup stays in force
            signal.signal(number, lambda *_: None)
    old_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield receiver
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, old in old_handlers.items():
            signal.signal(number, old)
        receiver.close()
        sender.close()


@dataclass(frozen=True)
class Started:
    """A process that leads a process group of its own, and the pipes with its output.

    >>> import subprocess
    >>> process = subprocess.Popen(["true"], process_group=0, stdout=subprocess.PIPE)
    >>> sorted(Started(process, {"out": process.stdout}).pipes)
    ['out']
    >>> process.communicate()
    (b'', None)
    """

    process: subprocess.Popen[bytes]
    pipes: Mapping[Stream, IO[bytes]]


def _is_ending(pid: int) -> bool:
    """True for a process that the kernel has begun to take apart (on Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _PF_EXITING)


def _end_of(process: subprocess.Popen[bytes]) -> int | None:
    """How such a process ended; None if the kernel does not get done with it."""
    end = time.monotonic() + _TAKEN_APART
    while (code := process.poll()) is None and time.monotonic() < end:
        time.sleep(0.01)
    return code


class Supervisor:
    """Starts processes, shows their output, and stops all of them when one fails.

    The first failure decides: the others get SIGTERM, and SIGKILL three seconds later.  SIGINT and
    SIGTERM are forwarded, and the processes have `grace` seconds to stop; a second signal ends it
    at once.  Each process leads a process group of its own, whose remains are killed with it.

    >>> import io, subprocess, sys
    >>> log = io.StringIO()
    >>> def start(index):
    ...     program = f"print('hello from {index}')"
    ...     process = subprocess.Popen(
    ...         [sys.executable, "-c", program], process_group=0, stdout=subprocess.PIPE
    ...     )
    ...     return Started(process, {"out": process.stdout})
    >>> Supervisor(Console(1, log, log), grace=1.0).run(1, start)
    0
    >>> print(log.getvalue(), end="")
    [0] hello from 0
    """

    def __init__(self, console: Console, grace: float) -> None:
        self._console = console
        self._grace = grace
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._selector = selectors.DefaultSelector()
        self._deaths: dict[int, int] = {}  # descriptors of processes that have not been buried
        self._deadline: float | None = None  # when SIGKILL follows
        self._signalled = False
        self._status = 0

    def run(self, count: int, start: Callable[[int], Started]) -> int:
        """Starts process i with `start(i)`, for each; waits for all.

        Returns the exit status of the first process that failed; 0 if none did.
        """
        with _signals() as arrived, self._selector, Guard() as self._guard:
            self._selector.register(arrived, selectors.EVENT_READ)
            try:
                for index in range(count):
                    started = start(index)
                    self._running[index] = started.process
                    self._guard.add(started.process.pid)
                    self._watch(index, started)
                while self._running:
                    self._step(arrived)
                self._drain()
            finally:
                self._kill_all()
                for descriptor in self._deaths:
                    os.close(descriptor)
        for index in range(count):
            self._console.close(index)
        return self._status

    def _watch(self, index: int, started: Started) -> None:
        for name, pipe in started.pipes.items():
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, (index, name))
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an old kernel, or a container that forbids it
                descriptor = os.pidfd_open(started.process.pid)
                self._deaths[descriptor] = index
                self._selector.register(descriptor, selectors.EVENT_READ)

    def _step(self, arrived: socket.socket) -> None:
        """Waits for something to happen, and answers it."""
        wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        ready = [key for key, _ in self._selector.select(wait)]
        for key in (k for k in ready if k.data):
            self._read(key)
        # Last: these may close what is ready.
        died = [self._deaths[k.fd] for k in ready if k.fd in self._deaths]
        if died:
            self._reap(died)
        if any(k.fileobj is arrived for k in ready):
            self._answer(arrived.recv(4096))
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            names = ", ".join(str(i) for i in self._running)
            self._console.notice(f"process {names} did not stop in time; killing it")
            self._kill_all()
            self._reap()

    def _read(self, key: selectors.SelectorKey) -> None:
        index, stream = key.data
        data = os.read(key.fd, 1 << 16)
        if data:
            self._console.feed(index, data, stream)
        else:
            self._selector.unregister(key.fileobj)
            if not isinstance(key.fileobj, int):
                key.fileobj.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _answer(self, numbers: bytes) -> None:
        self._reap()
        for number in numbers:
            if number in _FORWARDED:
                self._forward(signal.Signals(number))

    def _forward(self, number: signal.Signals) -> None:
        if not self._running:
            return
        if self._signalled:
            self._console.notice(f"{number.name} again; killing all processes")
            self._kill_all()
            return
        self._console.notice(f"{number.name}; waiting up to {self._grace:g} s for the processes")
        self._send(_FORWARDED[number], self._grace)

    def _send(self, number: signal.Signals, grace: float) -> None:
        """Asks the processes (not their groups, whose work they may still need) to stop."""
        self._signalled = True
        self._deadline = time.monotonic() + grace
        for process in self._running.values():
            process.send_signal(number)

    def _reap(self, order: Sequence[int] = ()) -> None:
        """Takes notice of the processes that have ended; of some, the order is known."""
        ended = {i: p.poll() for i, p in self._running.items()}
        place = {index: number for number, index in enumerate(order)}
        if any(code is not None for code in ended.values()):
            # Who is still being taken apart may have closed its connections before: whoever died
            # of that was the quicker one.
            for index, process in self._running.items():
                if ended[index] is None and _is_ending(process.pid):
                    ended[index], place[index] = _end_of(process), -1
        # Of several found dead at once, one that aborted most likely did so because of another:
        # that is how JAX answers the loss of a peer.
        gone = [(i, code) for i, code in ended.items() if code is not None]
        last = len(place)
        for index, code in sorted(
            gone, key=lambda x: (x[1] == -signal.SIGABRT, place.get(x[0], last), x[0])
        ):
            self._bury(index, code)

    def _bury(self, index: int, code: int) -> None:
        process = self._running.pop(index)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind
        self._guard.remove(process.pid)
        self._forget(index)
        self._read_rest(index)
        if not self._running:
            self._deadline = None
        if code == 0:
            return
        self._console.notice(f"process {index} {cause(code)}")
        if self._status == 0:
            self._status = exit_status(code)
            if self._running:
                self._stop_others()

    def _forget(self, index: int) -> None:
        """Closes what told of the death of a process."""
        for descriptor in [d for d, i in self._deaths.items() if i == index]:
            del self._deaths[descriptor]
            self._selector.unregister(descriptor)
            os.close(descriptor)

    def _stop_others(self) -> None:
        if not self._signalled:
            names = ", ".join(str(i) for i in self._running)
            self._console.notice(f"stopping process {names}")
            self._send(signal.SIGTERM, _LOST_GRACE)
            self._signalled = False  # a signal from outside is still the first one

    def _read_rest(self, index: int) -> None:
        """Shows the last words of a process before its death is announced."""
        for key in [k for k in self._selector.get_map().values() if k.data and k.data[0] == index]:
            with contextlib.suppress(BlockingIOError):
                while key.fd in self._selector.get_map():
                    self._read(key)

    def _drain(self) -> None:
        """Reads what is still on its way once no process runs."""
        end = time.monotonic() + _DRAIN
        while len(self._selector.get_map()) > 1 and time.monotonic() < end:
            for key, _ in self._selector.select(end - time.monotonic()):
                if key.data:
                    self._read(key)

    def _kill_all(self) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
