"""Writing arrays through TensorStore: an OCDBT database whose files are synced as they appear."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from shardflax.ckpt import faults
from shardflax.ckpt.durable import FileRecord, sync_file, sync_folder
from shardflax.ckpt.plan import GROUP_BYTES, Stored
from shardflax.ckpt.regions import Box, chunks_in
from shardflax.ckpt.staging import Staged
from shardflax.ckpt.worker import Worker
from shardflax.ckpt.zarr import chunk_key, encode, metadata, metadata_file

__all__ = ["Store", "database", "merge"]

_Array = np.ndarray[Any, np.dtype[Any]]


def database(folder: Path) -> dict[str, Any]:
    """TensorStore's description of the database in a folder.

    >>> database(Path("/data/run"))["base"]
    {'driver': 'file', 'path': '/data/run/'}
    """
    return {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder}/"},
        "config": {"compression": None, "max_inline_value_bytes": 1024},
    }


def _context() -> ts.Context:
    """A fresh context: a cached one would remember an older database at the same path.

    Files are synced by us, while the next ones are written.
    """
    return ts.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})


@dataclasses.dataclass
class Store:
    """The database that one process writes, file by file, into a folder."""

    folder: Path
    syncer: Worker

    def __post_init__(self) -> None:
        self._spec = database(self.folder)
        self._context = _context()
        self._keys: Any = ts.KvStore.open(self._spec, context=self._context).result()
        self._records: dict[str, Future[FileRecord]] = {}
        self._empty = True
        self._queued: list[tuple[str, bytes]] = []

    def write(self, stored: Sequence[Stored | None], group: Sequence[Staged]) -> None:
        """Writes a group in one transaction, or more if a lot is larger than a group."""
        for part in _transactions(stored, group):
            transaction = ts.Transaction(atomic=True)
            keys = self._keys.with_transaction(transaction)
            writes = [keys.write(key, value) for key, value in self._take_queued()]
            for leaf, box, array, small in part:
                if small:
                    writes += _write_small(keys, leaf, box, array)
                else:
                    writes.append(self._write_large(transaction, leaf, box, array))
            self._commit(transaction, writes)
            faults.at("group")

    def _commit(self, transaction: Any, writes: Sequence[Any]) -> None:
        """Commits; a write that nobody holds on to until then would not be part of it."""
        transaction.commit_async().result()
        for write in writes:
            write.result()
        self._empty = self._empty and not writes
        self._sync_new()

    def _write_large(self, transaction: Any, leaf: Stored, box: Box, array: _Array) -> Any:
        """Adds a box to a transaction; TensorStore cuts it, and adds checksums, on commit."""
        target: Any = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {**self._spec, "path": f"{leaf.name}/"},
                "metadata": metadata(leaf.shape, leaf.dtype, leaf.chunk),
                "store_data_equal_to_fill_value": True,
            },
            open=True,
            assume_metadata=True,
            context=self._context,
            transaction=transaction,
        ).result()
        return target[box.slices].write(array, can_reference_source_data_indefinitely=True)

    def write_metadata(
        self, stored: Sequence[Stored | None], scalars: Sequence[tuple[Stored, Any]]
    ) -> None:
        """Writes the metadata of all arrays, and the scalars, with the next transaction."""
        for leaf in itertools.chain(stored, (leaf for leaf, _ in scalars)):
            if leaf is not None:
                content = metadata_file(leaf.shape, leaf.dtype, leaf.chunk)
                self._queued.append((f"{leaf.name}/zarr.json", content))
        for leaf, value in scalars:
            chunk = encode(np.asarray(value, leaf.dtype), ())
            self._queued.append((f"{leaf.name}/{chunk_key(())}", chunk))

    def _take_queued(self) -> list[tuple[str, bytes]]:
        queued, self._queued = self._queued, []
        return queued

    def _sync_new(self) -> None:
        """Lets the data files that the last transaction made be synced in the background."""
        for name in _names(self.folder / "d"):
            if name not in self._records:
                path = self.folder / "d" / name
                self._records[name] = self.syncer.submit(lambda path=path: sync_file(path))

    def finish(self) -> dict[str, FileRecord]:
        """Waits until everything is on the disk; the files, by their names in the folder."""
        if self._queued:
            transaction = ts.Transaction(atomic=True)
            keys = self._keys.with_transaction(transaction)
            self._commit(transaction, [keys.write(k, v) for k, v in self._take_queued()])
        records = {f"d/{name}": record.result() for name, record in self._records.items()}
        if (self.folder / "d").is_dir():
            sync_folder(self.folder / "d")
        if not self._empty:
            records["manifest.ocdbt"] = sync_file(self.folder / "manifest.ocdbt")
        sync_folder(self.folder)
        return records

    def abandon(self) -> None:
        """Waits for files that are being synced, so that the folder can be removed."""
        for record in self._records.values():
            record.exception()


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:  # small databases have no data files
        return []


def _write_small(keys: Any, leaf: Stored, box: Box, array: _Array) -> list[Any]:
    """Adds the chunks of a box to a transaction, made by us: much less work per chunk."""
    return [
        keys.write(f"{leaf.name}/{chunk_key(index)}", encode(array[chunk.within(box)], leaf.chunk))
        for index, chunk in chunks_in(box, leaf.chunk)
    ]


_Write = tuple[Stored, Box, _Array, bool]


def _transactions(
    stored: Sequence[Stored | None], group: Sequence[Staged]
) -> Iterator[list[_Write]]:
    """The writes of each transaction: usually one, of the whole group."""
    part: list[_Write] = []
    size = 0
    for staged in group:
        leaf = stored[staged.lot.leaf]
        assert leaf is not None
        for box, array in _cut(leaf, staged.lot.box, _whole(staged)):
            if part and size + array.nbytes > GROUP_BYTES:
                yield part
                part, size = [], 0
            part.append((leaf, box, array.view(leaf.dtype), staged.lot.small))
            size += array.nbytes
    if part:
        yield part


def _whole(staged: Staged) -> _Array:
    """The values of a lot as one array."""
    arrays = staged.arrays()
    lot = staged.lot
    if len(arrays) == 1:
        array = arrays[0].reshape(lot.box.shape)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    whole = np.empty(lot.box.shape, arrays[0].dtype)
    for piece, array in zip(lot.pieces, arrays, strict=True):
        whole[piece.box.within(lot.box)] = array
    return whole


def _cut(leaf: Stored, box: Box, array: _Array) -> Iterator[tuple[Box, _Array]]:
    """A box in layers of whole chunks along its first dim that has several, none too large."""
    dim = next((d for d, (n, c) in enumerate(zip(box.shape, leaf.chunk, strict=True)) if n > c), 0)
    if array.nbytes <= GROUP_BYTES or not box.shape:
        yield box, array
        return
    unit = leaf.chunk[dim]
    units = max(1, GROUP_BYTES * box.shape[dim] // array.nbytes // unit) * unit
    for start in range(box.start[dim], box.stop[dim], units):
        layer = Box(
            (*box.start[:dim], start, *box.start[dim + 1 :]),
            (*box.stop[:dim], min(start + units, box.stop[dim]), *box.stop[dim + 1 :]),
        )
        yield layer, array[layer.within(box)]


def merge(folder: Path, parts: Sequence[str], syncer: Worker) -> dict[str, FileRecord]:
    """Makes one database in a folder that refers to those in its sub-folders; its own files."""
    whole = Store(folder, syncer)
    transaction, copies = ts.Transaction(atomic=True), list[Any]()
    for part in parts:
        # Only within one context are values referred to instead of copied.
        source: Any = ts.KvStore.open(database(folder / part), context=whole._context).result()
        copies.append(source.experimental_copy_range_to(whole._keys.with_transaction(transaction)))
    whole._commit(transaction, copies)
    return whole.finish()
