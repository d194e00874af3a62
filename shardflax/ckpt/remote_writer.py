"""Writing arrays into an object store: whole files, put together in memory."""

from __future__ import annotations

import collections
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from shardflax.ckpt import faults, writing
from shardflax.ckpt.compressing import described, stored_chunks, whole
from shardflax.ckpt.durable import FileRecord, checksum
from shardflax.ckpt.index import DATA, write_index
from shardflax.ckpt.ocdbt import INLINE_BYTES, Place, Value
from shardflax.ckpt.place import StorePath
from shardflax.ckpt.plan import Stored
from shardflax.ckpt.staging import Group
from shardflax.ckpt.worker import Worker
from shardflax.ckpt.zarr import chunk_key

__all__ = ["RemoteWriter"]

_FILE_BYTES = 128 << 20
"""About as large is an object."""
_IN_FLIGHT = 2
"""Objects that are on their way at once; each is in memory."""


class RemoteWriter:
    """The database that one process writes; see `shardflax.ckpt.store.Store`."""

    def __init__(self, folder: StorePath, syncer: Worker) -> None:
        del syncer  # the store's own threads send
        self.folder = folder
        self._values: dict[str, Value] = {}
        self._records: dict[str, FileRecord] = {}
        self._sending: collections.deque[Any] = collections.deque()
        self._begin()

    def _begin(self) -> None:
        self._name, self._parts, self._size = f"{DATA}/{secrets.token_hex(16)}", list[bytes](), 0

    def write(self, group: Group) -> None:
        """Writes a group, and says so."""
        for staged in group.staged:
            leaf = group.leaf(staged)
            array = whole(staged).view(leaf.dtype)
            for index, chunk in stored_chunks(leaf, staged.lot.box, array):
                self._add(f"{leaf.name}/{chunk_key(index)}", chunk)
                if self._size >= _FILE_BYTES:
                    self._send()
        self._send()
        faults.at("group")
        group.done()

    def _add(self, key: str, value: bytes) -> None:
        if len(value) <= INLINE_BYTES:
            self._values[key] = value
            return
        self._values[key] = Place(self._name, self._size, len(value))
        self._parts.append(value)
        self._size += len(value)

    def _send(self) -> None:
        """Sends what was put together so far, and waits if too much is on its way."""
        if self._parts:
            self._put(self._name, b"".join(self._parts))
            self._begin()
        while len(self._sending) > _IN_FLIGHT:
            self._done(self._sending.popleft())

    def _put(self, name: str, data: bytes) -> None:
        self._records[name] = (len(data), checksum(data))
        self._sending.append((self.folder / name).start_writing(data))

    def write_metadata(
        self, stored: Sequence[Stored | None], scalars: Sequence[tuple[Stored, Any]]
    ) -> None:
        """Adds the metadata of all arrays, and the scalars."""
        for key, value in described(stored, scalars):
            self._add(key, value)

    def finish(self) -> dict[str, FileRecord]:
        """Waits until all is stored; the files, by their names in the folder."""
        self.wait()
        return self._records | write_index(self.folder, self._values)

    def wait(self) -> None:
        """Returns when all groups are stored; raises OSError."""
        self._send()
        while self._sending:
            self._done(self._sending.popleft())

    def _done(self, future: Any) -> None:
        try:
            future.result()
        except ValueError as error:
            raise OSError(f"{self.folder}: {error}") from error

    def abandon(self) -> None:
        """Waits for what is on its way, so that it can be removed."""
        while self._sending:
            self._sending.popleft().exception()


writing.writer.register(StorePath, RemoteWriter)


@writing.check_there.register
def _(folder: StorePath, files: Mapping[str, FileRecord]) -> None:
    """By names alone: an object is there as a whole."""
    there = {str(path.relative_to(folder)) for path in folder.files()}
    for name in files:
        if name not in there:
            raise OSError(f"{folder / name} is gone while the step is saved")
