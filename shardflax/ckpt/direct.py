"""Where the bytes of a new file go: to the disk directly where that is possible.

Through the page cache, the kernel takes new pages and copies everything to them, which costs many
times the processor time, taken from training, and pushes out what others have in the cache.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Buffer", "Cached", "Direct", "sink"]

Buffer = bytes | np.ndarray[Any, np.dtype[np.uint8]]

_WRITE = 16 << 20
"""Bytes that are written in one call through the page cache."""
_PARTS = 1024
"""Buffers that the kernel takes in one call."""
_BLOCK = 4 << 20
"""Bytes that are written in one call directly."""
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def sink(path: Path) -> Cached | Direct:
    """A new file, open for writing; direct on file systems that are on a disk of this machine.

    >>> import tempfile
    >>> file = sink(Path(tempfile.mkdtemp(), "f"))
    >>> file.put(b"abc")
    >>> file.close()
    """
    if _DIRECT and os.major(os.stat(path.parent).st_dev):  # all others have no device
        try:
            return Direct(os.open(path, _NEW | _DIRECT, 0o666))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # made, and then not opened
    return Cached(os.open(path, _NEW, 0o666))


class Cached:
    """A file that is written through the page cache, from the buffers that were put."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: list[Buffer] = []
        self._bytes = 0

    def put(self, buffer: Buffer) -> None:
        """Goes on with some bytes, soon: the buffer must stay as it is until `release`."""
        self._waiting.append(buffer)
        self._bytes += len(buffer)
        if self._bytes >= _WRITE or len(self._waiting) >= _PARTS:
            self.release()

    def release(self) -> None:
        """Lets go of all buffers."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        _write_all(self._descriptor, waiting)

    def sync(self) -> None:
        """Forces all that was put to the disk."""
        self.release()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file as it is."""
        descriptor, self._descriptor = self._descriptor, -1
        self._waiting = []
        if descriptor >= 0:
            os.close(descriptor)


class Direct:
    """A file that is written in blocks, put together in memory that begins where a page does."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._filled = 0

    @functools.cached_property
    def _block(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Shared, so that a program that forks does not make the kernel copy pages on their way."""
        return np.frombuffer(mmap.mmap(-1, _BLOCK), np.uint8)

    def put(self, buffer: Buffer) -> None:
        """Goes on with some bytes; the buffer may be changed then."""
        data, at = np.frombuffer(buffer, np.uint8), 0
        while at < len(data):
            part = data[at : at + _BLOCK - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            at += len(part)
            if self._filled == _BLOCK:
                self._write()

    def release(self) -> None:
        """Nothing: no buffer is held."""

    def _write(self) -> None:
        """Writes what is in memory; through the page cache, once the disk wants it otherwise."""
        done = 0
        if self._filled == _BLOCK:
            try:
                done = os.write(self._descriptor, self._block)  # type: ignore[arg-type]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        if done < self._filled:  # the end of the file, mostly: it is no whole number of sectors
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            _write_all(self._descriptor, [self._block[done : self._filled]])
        self._filled = 0

    def sync(self) -> None:
        """Forces all that was put to the disk."""
        self._write()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file as it is."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _write_all(descriptor: int, buffers: Sequence[Buffer]) -> None:
    """Writes buffers one after the other, however often the kernel stops in between."""
    left: list[Any] = [memoryview(buffer) for buffer in buffers]  # type: ignore[arg-type]
    while left:
        done = os.writev(descriptor, left[:_PARTS])
        whole = 0
        while whole < len(left) and done >= len(left[whole]):
            done -= len(left[whole])
            whole += 1
        left = left[whole:]
        if done:
            left[0] = left[0][done:]
