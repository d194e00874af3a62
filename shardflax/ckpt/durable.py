"""Files that are really on the disk, and their checksums."""

from __future__ import annotations

import functools
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

import google_crc32c

from shardflax import _files
from shardflax.ckpt.direct import Buffer, sink

__all__ = [
    "DataFile", "FileRecord", "checksum", "checksum_file", "sync_file", "sync_folder", "write_file",
]  # fmt: skip

FileRecord = tuple[int, str]
"""Size in bytes and a checksum: the CRC-32 in hex; of a data file, see `_Blocks`."""

_READ = 4 << 20
_BLOCK = 1_000_003
"""Bytes of a block of `_Blocks`; no chunk is as long."""
_BLOCKS = "blocks:"


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

    def add(self, data: Buffer) -> None:
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
    """A new file in a folder that grows by buffers, with its checksum.

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
        self._sink = sink(folder / self.name)

    def append(self, *buffers: Buffer) -> int:
        """Goes on with some buffers, soon; at which offset they begin."""
        start = self.size
        for buffer in buffers:
            self._check.add(buffer)
            self._sink.put(buffer)
            self.size += len(buffer)
        return start

    def flush(self) -> None:
        """Lets go of all buffers."""
        self._sink.release()

    def close(self) -> FileRecord:
        """Forces all to the disk; size and checksum."""
        try:
            self._sink.sync()
        finally:
            self.abandon()
        return self.size, self._check.text()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._sink.close()


def sync_file(path: Path) -> FileRecord:
    """Forces a file to the disk; its size and checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path.stat().st_size, checksum_file(path)
