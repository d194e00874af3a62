"""Files that are really on the disk."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["sync_folder", "write_file"]


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, mode: str = "xb") -> None:
    """Writes a file, a new one by default, and forces it to the disk."""
    with path.open(mode) as file:
        file.write(data)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
