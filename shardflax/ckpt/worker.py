"""Threads that are started early: Python 3.12 starts none once a program is ending."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["THREADS", "Worker"]

T = TypeVar("T")
THREADS = 3
"""How many files are written at once: while one is forced to the disk, others go on."""


class Worker:
    """Runs functions in their order on threads of its own (one by default), which end with it.

    >>> worker = Worker("example")
    >>> worker.submit(lambda: 1 + 1).result()
    2
    >>> worker.close()
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_run, args=(self._jobs,), name=name, daemon=True)
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._end = weakref.finalize(self, self._jobs.put, None)
        self._end.atexit = False

    @property
    def threads(self) -> int:
        """How many functions can run at once."""
        return len(self._threads)

    @property
    def here(self) -> bool:
        """True on one of its threads, which must not wait for what they do themselves."""
        return threading.current_thread() in self._threads

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Runs a job when those before it are done, or as soon as a thread is free."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Ends the threads once the jobs are done, and waits for that, if that can be."""
        self._end()
        for thread in self._threads:
            if not self.here:
                thread.join()


def _run(jobs: queue.SimpleQueue[Any]) -> None:
    """A thread; it must not know the worker, which could not end otherwise."""
    while (item := jobs.get()) is not None:
        _do(*item)
        del item  # with everything that the job holds on to
    jobs.put(None)  # for the next thread


def _do(job: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)
