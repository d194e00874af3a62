"""The index files of a folder: which chunks there are, and where."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from shardflax.ckpt.durable import FileRecord, sync_folder, write_file
from shardflax.ckpt.ocdbt import MANIFEST, Place, Value, read_tree, write_tree
from shardflax.ckpt.place import Place as Folder

__all__ = ["DATA", "merge_indices", "read_index", "write_index"]

DATA = "d"
"""The folder of the files with data."""


def write_index(folder: Folder, values: Mapping[str, Value]) -> dict[str, FileRecord]:
    """Writes the index of a folder, if there are values, and forces all names in it to the disk.

    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> sorted(name[:2] for name in write_index(folder, {"a": b"1"}))
    ['d/', 'ma']
    >>> read_index(folder)
    {'a': b'1'}
    """
    records: dict[str, FileRecord] = {}
    if values:
        for path in (folder, folder / DATA):  # a process may have metadata alone
            path.mkdir(exist_ok=True)
        name = f"{DATA}/{secrets.token_hex(16)}"
        tree = write_tree(values, name)
        records[name] = write_file(folder / name, tree.nodes)
        records[MANIFEST] = write_file(folder / MANIFEST, tree.manifest)
    for path in (folder / DATA, folder):
        with contextlib.suppress(FileNotFoundError):  # without values, there may be no files
            sync_folder(path)
    return records


def read_index(folder: Folder) -> dict[str, Value]:
    """All values of a folder's index; raises ValueError, naming the file, if it is damaged."""
    name = MANIFEST

    def read(place: Place) -> bytes:
        nonlocal name
        name = place.file
        with _open(folder / name) as file:
            file.seek(place.offset)
            return file.read(place.length)

    try:
        with _open(folder / MANIFEST) as file:
            manifest = file.read()
        return read_tree(manifest, read)
    except (ValueError, OSError, OverflowError) as error:
        raise ValueError(f"{folder / name}: {error}") from error


def _open(path: Folder) -> IO[bytes]:
    """Opens a file; nobody waits for a named pipe in its place."""
    if not isinstance(path, Path):
        return path.open("rb")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def merge_indices(
    folder: Folder, parts: Sequence[str], wanted: Iterable[str] = ()
) -> dict[str, FileRecord]:
    """Makes an index for a folder of those of its sub-folders; the files that are new.

    What several have under one key is taken from the first.  Raises ValueError for a key that is
    wanted, and that none of them has.
    """
    values: dict[str, Value] = {}
    for part in parts:
        for key, value in read_index(folder / part).items():
            if isinstance(value, Place):
                value = dataclasses.replace(value, file=f"{part}/{value.file}")
            values.setdefault(key, value)
    if lost := next((key for key in wanted if key not in values), None):
        raise ValueError(f"no process has written {lost}")
    return write_index(folder, values)
