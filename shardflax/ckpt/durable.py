"""Files that are really on the disk, and their checksums."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

__all__ = ["FileRecord", "checksum", "checksum_file", "sync_file", "sync_folder", "write_file"]

FileRecord = tuple[int, str]
"""Size in bytes and CRC-32 in hex.

Not the CRC-32C that TensorStore ends its own files with: that of a whole such file is a constant.
"""

_BLOCK = 4 << 20


def checksum(data: bytes) -> str:
    """The CRC-32 of some bytes, in hex.

    >>> checksum(b"123456789")
    'cbf43926'
    """
    return f"{zlib.crc32(data):08x}"


def checksum_file(path: Path) -> FileRecord:
    """Size and checksum of a file, read in blocks."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, f"{crc:08x}"


def sync_file(path: Path) -> FileRecord:
    """Forces a file to the disk; its size and checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return checksum_file(path)


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Writes a new file and forces it to the disk; its size and checksum.

    >>> import tempfile
    >>> write_file(Path(tempfile.mkdtemp(), "f"), b"123456789")
    (9, 'cbf43926')
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data), checksum(data)
