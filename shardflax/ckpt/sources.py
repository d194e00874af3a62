"""What a saved step offers to a restore: specs of leaves, and boxes of arrays, read when asked."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from shardflax.ckpt.leaves import LeafSpec
from shardflax.ckpt.manifest import Manifest
from shardflax.ckpt.orbax_files import STATE
from shardflax.ckpt.paths import Names, show
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.place import Place
from shardflax.ckpt.plan import Stored
from shardflax.ckpt.regions import (
    SMALL_BYTES,
    Box,
    chunk_box,
    chunks_in,
    join_boxes,
    rounded,
)
from shardflax.ckpt.store import database
from shardflax.ckpt.zarr import chunk_key, decode, metadata

__all__ = ["LeafDataError", "OurSource", "Source", "context"]

_Array = np.ndarray[Any, np.dtype[Any]]
Later = Callable[[], _Array]
"""A read that was started: the call waits for it."""


class LeafDataError(ValueError):
    """The data of one leaf cannot be read.

    >>> print(LeafDataError(("w",), "the checksum of a chunk is wrong"))
    leaf 'w': the checksum of a chunk is wrong
    """

    def __init__(self, path: LeafPath, why: str) -> None:
        self.path = path
        super().__init__(f"leaf {show(path)!r}: {why}")


def context() -> ts.Context:
    """A fresh context without caches, so that nothing of an older folder is seen."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


class Source(abc.ABC):
    """A saved state.

    `leaves` has the specs by path; `nones` are the paths of None.
    """

    leaves: Mapping[LeafPath, LeafSpec]
    nones: tuple[LeafPath, ...] = ()
    boxed = False
    """True if boxes may have been saved as nodes of the tree."""

    @abc.abstractmethod
    def read(self, path: LeafPath, box: Box) -> Later:
        """Starts reading a box of the array that holds a leaf's data.

        What it returns waits for it, and raises LeafDataError if it is damaged.
        """

    @abc.abstractmethod
    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        """The shape of the chunks of a leaf."""

    def read_boxes(self, path: LeafPath, boxes: Sequence[Box]) -> list[tuple[Box, Later]]:
        """Starts reading several boxes; or one around them all, if that reads much less."""
        joined = join_boxes(boxes, self.chunk(path))
        return [(box, self.read(path, box)) for box in joined]

    def names(self, path: LeafPath) -> Names:
        """The names of the dims of a leaf, where they were recorded."""
        del path
        return None

    def check_size(self, nbytes: int) -> None:
        """Raises ValueError if arrays of this size cannot be in the files, before memory is taken.

        For what is read without a target; a target says itself how large arrays may be.
        """
        del nbytes


@dataclasses.dataclass
class OurSource(Source):
    """A step that this library wrote."""

    folder: Place
    manifest: Manifest

    def __post_init__(self) -> None:
        self.leaves = self.manifest.leaves
        self.nones = self.manifest.nones
        self._spec = database(self.folder / STATE)
        self._context = context()
        self._keys: Any = None
        self._open: dict[LeafPath, Any] = {}

    def names(self, path: LeafPath) -> Names:
        stored = self.manifest.stored.get(path)
        return None if stored is None else stored.names

    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        return self.manifest.stored[path].chunk

    def read(self, path: LeafPath, box: Box) -> Later:
        stored = self.manifest.stored[path]
        if math.prod(stored.shape) * stored.dtype.itemsize <= SMALL_BYTES:
            return self._read_small(stored, box)
        return self._read_large(stored, box)

    def _read_small(self, stored: Stored, box: Box) -> Later:
        """Reads chunks as they are, and checks them here."""
        if self._keys is None:
            self._keys = ts.KvStore.open(self._spec, context=self._context).result()
        found = [
            (
                chunk_box(index, stored.shape, stored.chunk),
                self._keys.read(f"{stored.name}/{chunk_key(index)}"),
            )
            for index, _ in chunks_in(rounded(box, stored.shape, stored.chunk), stored.chunk)
        ]

        def finish() -> _Array:
            chunks = [(at, _chunk(stored, future)) for at, future in found]
            if len(chunks) == 1 and chunks[0][0] == box and box.shape == stored.chunk:
                return chunks[0][1]
            whole = np.empty(box.shape, _dtype(stored))
            for at, chunk in chunks:
                both = at.meet(box)
                if both is not None:
                    whole[both.within(box)] = chunk[both.within(at)]
            return whole

        return finish

    def _read_large(self, stored: Stored, box: Box) -> Later:
        """Lets TensorStore read, check and copy, on its threads."""
        if stored.path not in self._open:
            spec = {
                "driver": "zarr3",
                "kvstore": {**self._spec, "path": f"{stored.name}/"},
                "metadata": metadata(stored.shape, stored.dtype, stored.chunk, stored.codec),
                "fill_missing_data_reads": False,
            }
            opened = ts.open(spec, open=True, assume_metadata=True, context=self._context)
            self._open[stored.path] = opened
        future = self._open[stored.path].result()[box.slices].read(order="C")

        def finish() -> _Array:
            try:
                return np.asarray(future.result()).view(_dtype(stored))
            except Exception as error:
                raise LeafDataError(stored.path, str(error)) from error

        return finish


def _dtype(stored: Stored) -> np.dtype[Any]:
    """The dtype of the data, which may be stored as mere bytes."""
    return stored.leaf.stored[1]


def _chunk(stored: Stored, future: Any) -> _Array:
    """A chunk, checked, without what fills it up at the edge."""
    try:
        result = future.result()
        if result.state != "value":
            raise ValueError("a chunk is missing")
        return decode(result.value, _dtype(stored), stored.chunk)
    except Exception as error:
        raise LeafDataError(stored.path, str(error)) from error
