"""Files that are really on the disk, and their checksums."""

from __future__ import annotations

import functools
import os
import secrets
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from shardflax import _files

__all__ = [
    "DataFile", "FileRecord", "checksum", "checksum_file", "sync_file", "sync_folder", "write_file",
]  # fmt: skip

FileRecord = tuple[int, str]
"""Size in bytes and a checksum: the CRC-32 in hex; of a data file, see `_Blocks`."""

_READ = 4 << 20
_BLOCK = 1_000_003
"""Bytes of a block of `_Blocks`; no chunk is as long."""
_BLOCKS = "blocks:"
_WRITE = 16 << 20
"""Bytes that are written in one call."""
_PARTS = 1024
"""Buffers that the kernel takes in one call."""

_Buffer = bytes | np.ndarray[Any, np.dtype[np.uint8]]


def checksum(data: bytes, like: str = "") -> str:
    """The CRC-32 of some bytes, in hex; or a checksum of the same kind as another one.

    >>> checksum(b"123456789")
    'cbf43926'
    """
    if like.startswith(_BLOCKS):
        blocks = _Blocks()
        blocks.add(data)
        return blocks.text()
    return f"{zlib.crc32(data):08x}"


def checksum_file(path: Path, like: str = "") -> str:
    """The checksum of a file, read in blocks; of the same kind as another one."""
    crc, blocks = 0, _Blocks()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ):
            if like.startswith(_BLOCKS):
                blocks.add(block)
            else:
                crc = zlib.crc32(block, crc)
    return blocks.text() if like.startswith(_BLOCKS) else f"{crc:08x}"


@functools.singledispatch
def sync_folder(path: Any) -> None:
    """Forces the names in a folder to the disk."""
    _files.sync_folder(path)


@functools.singledispatch
def write_file(path: Any, data: bytes) -> FileRecord:
    """Writes a new file and forces it to the disk; its size and checksum.

    >>> import tempfile
    >>> write_file(Path(tempfile.mkdtemp(), "f"), b"123456789")
    (9, 'cbf43926')
    """
    _files.write_file(path, data)
    return len(data), checksum(data)


class _Blocks:
    """A checksum that takes a tenth of the time of a CRC-32: that of the CRC-32Cs of all blocks.

    Not the CRC-32C of the whole: where every part of a file ends with its own, that is constant.
    """

    def __init__(self) -> None:
        self._crc = self._block = self._filled = 0

    def add(self, data: _Buffer) -> None:
        """Goes on with some bytes."""
        at = 0
        while at < len(data):
            part = data[at : at + _BLOCK - self._filled]
            self._block = google_crc32c.extend(self._block, part)  # type: ignore[arg-type]
            self._filled += len(part)
            at += len(part)
            if self._filled == _BLOCK:
                self._end()

    def _end(self) -> None:
        self._crc = zlib.crc32(self._block.to_bytes(4, "little"), self._crc)
        self._block = self._filled = 0

    def text(self) -> str:
        """The checksum."""
        if self._filled:
            self._end()
        return f"{_BLOCKS}{self._crc:08x}"


class DataFile:
    """A new file in a folder that grows by buffers, which are not copied.

    >>> import tempfile
    >>> file = DataFile(Path(tempfile.mkdtemp()))
    >>> file.append(b"abc", b"d"), file.append(b"ef")
    (0, 4)
    >>> file.close()
    (6, 'blocks:0732d8b9')
    """

    def __init__(self, folder: Path) -> None:
        self.name = secrets.token_hex(16)
        self.size = 0
        self._check = _Blocks()
        self._waiting: list[_Buffer] = []
        self._bytes = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(folder / self.name, flags, 0o666)

    def append(self, *buffers: _Buffer) -> int:
        """Goes on with some buffers, soon; at which offset they begin."""
        start = self.size
        for buffer in buffers:
            self._check.add(buffer)
            self._waiting.append(buffer)
            self._bytes += len(buffer)
            self.size += len(buffer)
        if self._bytes >= _WRITE or len(self._waiting) >= _PARTS - 8:
            self.flush()
        return start

    def flush(self) -> None:
        """Lets go of all buffers."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        _write_all(self._descriptor, waiting)

    def close(self) -> FileRecord:
        """Forces all to the disk; size and checksum."""
        try:
            self.flush()
            os.fsync(self._descriptor)
        finally:
            self.abandon()
        return self.size, self._check.text()

    def abandon(self) -> None:
        """Closes the file as it is."""
        descriptor, self._descriptor = self._descriptor, -1
        self._waiting = []
        if descriptor >= 0:
            os.close(descriptor)


def _write_all(descriptor: int, buffers: Sequence[_Buffer]) -> None:
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


def sync_file(path: Path) -> FileRecord:
    """Forces a file to the disk; its size and checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path.stat().st_size, checksum_file(path)
