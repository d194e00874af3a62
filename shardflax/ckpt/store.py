"""Writing chunks of arrays into files, several at once, each forced to the disk when it is full."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from shardflax.ckpt import faults
from shardflax.ckpt.compressing import described, stored_chunks, whole
from shardflax.ckpt.durable import DataFile, FileRecord
from shardflax.ckpt.index import DATA, write_index
from shardflax.ckpt.ocdbt import INLINE_BYTES, Place, Value
from shardflax.ckpt.place import Place as Folder
from shardflax.ckpt.place import kvstore
from shardflax.ckpt.plan import GROUP_BYTES, Stored
from shardflax.ckpt.regions import chunks_in
from shardflax.ckpt.staging import Group, Staged
from shardflax.ckpt.worker import Worker
from shardflax.ckpt.zarr import checksum_of, chunk_key, filled_up

__all__ = ["Store", "database"]

_Array = np.ndarray[Any, np.dtype[Any]]
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def database(folder: Folder) -> dict[str, Any]:
    """TensorStore's description of the database in a folder.

    >>> database(Path("/data/run"))["base"]
    {'driver': 'file', 'path': '/data/run/'}
    """
    return {
        "driver": "ocdbt",
        "base": kvstore(folder),
        "config": {"compression": None, "max_inline_value_bytes": INLINE_BYTES},
    }


@dataclasses.dataclass
class Store:
    """What one process writes into a folder: groups of lots, and then the index."""

    folder: Path
    pool: Worker

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[DataFile] = []
        self._values: dict[str, Value] = {}
        self._records: dict[str, FileRecord] = {}
        self._jobs: collections.deque[Future[None]] = collections.deque()

    def write(self, group: Group) -> None:
        """Starts writing a group.

        Waits while too many are on their way; raises what went wrong with an earlier one.
        """
        job = functools.partial(self._write, group)
        self._jobs.append(self.pool.submit(job))
        del job, group
        while len(self._jobs) >= self.pool.threads:
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Returns when all groups are on the disk; raises what went wrong."""
        while self._jobs:
            self._jobs.popleft().result()
        files, self._open = self._open, []
        closing = [self.pool.submit(functools.partial(self._close, file)) for file in files]
        for future in closing:
            future.result()

    def _write(self, group: Group) -> None:
        """Appends a group to a file that nobody else is writing to."""
        file = _Lazy(self)
        try:
            values = {
                key: _put(file, chunk, check)
                for staged in group.staged
                for key, chunk, check in _chunks(group.leaf(staged), staged)
            }
            file.flush()
        finally:
            file.give_back()
        self._values.update(values)
        faults.at("group")
        group.done()
        self._close_full()

    def take(self) -> DataFile:
        """A file to write to."""
        with self._lock:
            if self._open:
                return self._open.pop()
        for folder in (self.folder, self.folder / DATA):
            folder.mkdir(exist_ok=True)
        return DataFile(self.folder / DATA)

    def give_back(self, file: DataFile) -> None:
        """Lets others write to a file."""
        with self._lock:
            self._open.append(file)

    def _close_full(self) -> None:
        """Forces files to the disk that are large enough."""
        while (file := self._take_full()) is not None:
            self._close(file)

    def _take_full(self) -> DataFile | None:
        with self._lock:
            found = next((i for i, x in enumerate(self._open) if x.size >= GROUP_BYTES), None)
            return None if found is None else self._open.pop(found)

    def _close(self, file: DataFile) -> None:
        self._records[f"{DATA}/{file.name}"] = file.close()

    def write_metadata(
        self, stored: Sequence[Stored | None], scalars: Sequence[tuple[Stored, Any]]
    ) -> None:
        """Puts the metadata of all arrays, and the scalars, into the index."""
        self._values.update(described(stored, scalars))

    def finish(self) -> dict[str, FileRecord]:
        """Waits until everything is on the disk; the files, by their names in the folder."""
        self.wait()
        return self._records | write_index(self.folder, self._values)

    def abandon(self) -> None:
        """Waits for files that are being written, so that the folder can be removed."""
        while self._jobs:
            self._jobs.popleft().exception()
        for file in self._open:
            file.abandon()


class _Lazy:
    """A file of a store, made when something is written to it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._file: DataFile | None = None

    def append(self, *buffers: bytes | _Bytes) -> Place:
        """Where the buffers will be."""
        if self._file is None:
            self._file = self._store.take()
        start = self._file.append(*buffers)
        return Place(f"{DATA}/{self._file.name}", start, sum(map(len, buffers)))

    def flush(self) -> None:
        """Lets go of the buffers."""
        if self._file is not None:
            self._file.flush()

    def give_back(self) -> None:
        """Lets others write to the file."""
        if self._file is not None:
            self._store.give_back(self._file)


def _put(file: _Lazy, chunk: _Bytes, check: bytes) -> Value:
    """A chunk: as it is, if it is small, else its place in the file."""
    if len(chunk) + len(check) <= INLINE_BYTES:
        return chunk.tobytes() + check
    return file.append(chunk, check) if check else file.append(chunk)


def _chunks(leaf: Stored, staged: Staged) -> Iterator[tuple[str, _Bytes, bytes]]:
    """The chunks of a lot, by their keys, with what comes after them.

    Not copied if they are contiguous and not compressed.
    """
    box, array = staged.lot.box, whole(staged)
    if leaf.codec is not None:
        for index, data in stored_chunks(leaf, box, array.view(leaf.dtype)):
            yield f"{leaf.name}/{chunk_key(index)}", np.frombuffer(data, np.uint8), b""
        return
    for index, chunk in chunks_in(box, leaf.chunk):
        part = array[chunk.within(box)]
        data = np.ascontiguousarray(filled_up(part, leaf.chunk)).reshape(-1).view(np.uint8)
        yield f"{leaf.name}/{chunk_key(index)}", data, checksum_of(data)
