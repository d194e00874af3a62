"""A thread that is started early: Python 3.12 starts none once a program is ending."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Worker"]

T = TypeVar("T")


class Worker:
    """Runs functions one after the other on a thread of its own, which ends with the worker.

    >>> worker = Worker("example")
    >>> worker.submit(lambda: 1 + 1).result()
    2
    >>> worker.close()
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._jobs.put, None)
        self._end.atexit = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Runs a job when those before it are done."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Ends the thread once the jobs are done, and waits for that."""
        self._end()
        self._thread.join()


def _run(jobs: queue.SimpleQueue[Any]) -> None:
    """The thread; it must not know the worker, which could not end otherwise."""
    while (item := jobs.get()) is not None:
        _do(*item)
        del item  # with everything that the job holds on to


def _do(job: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)
