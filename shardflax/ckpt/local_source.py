"""Reading steps in folders: chunks go from their files to where they are wanted."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from shardflax.ckpt.index import read_index
from shardflax.ckpt.ocdbt import Place, Value
from shardflax.ckpt.orbax_files import STATE
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.plan import Stored
from shardflax.ckpt.regions import Box, chunks_in
from shardflax.ckpt.sources import Later, LeafDataError, OurSource
from shardflax.ckpt.worker import Worker
from shardflax.ckpt.zarr import chunk_key

__all__ = ["LocalSource"]

_Array = np.ndarray[Any, np.dtype[Any]]
_ALIGNMENT = 64
"""Bytes; where buffers begin that JAX takes as they are, on the host."""
_JOB_BYTES = 4 << 20
"""Chunks that follow one another in a file are read by one thread up to this size."""
_CHECKSUM = 4


class LocalSource(OurSource):
    """A step that this library wrote, in a folder of a file system."""

    @functools.cached_property
    def _state(self) -> Path:
        return Path(self.folder) / STATE

    @functools.cached_property
    def _index(self) -> dict[str, Value]:
        return read_index(self._state)

    def read(self, path: LeafPath, box: Box) -> Later:
        ((_, later),) = self.read_boxes(path, [box])
        return later

    def read_boxes(self, path: LeafPath, boxes: Sequence[Box]) -> list[tuple[Box, Later]]:
        """Starts reading; each chunk once, however many boxes it is in."""
        stored = self.manifest.stored[path]
        if stored.codec is not None:
            return [(box, super(LocalSource, self).read(path, box)) for box in boxes]
        arrays = _aligned(boxes, stored.leaf.stored[1])
        chunks = self._chunks(stored, list(zip(boxes, arrays, strict=True)))
        jobs = [_submit(self._state, job) for job in _batched(chunks)]

        def finish(array: _Array) -> _Array:
            try:
                for job in jobs:
                    job.result()
            except (ValueError, OSError) as error:
                raise LeafDataError(path, str(error)) from error
            return array

        return [
            (box, functools.partial(finish, array))
            for box, array in zip(boxes, arrays, strict=True)
        ]

    def _chunks(self, stored: Stored, wanted: list[tuple[Box, _Array]]) -> list[_Chunk]:
        """The chunks that some boxes lie in."""
        found: dict[tuple[int, ...], _Chunk] = {}
        for box, array in wanted:
            for index, _ in chunks_in(_rounded(box, stored), stored.chunk):
                if index not in found:
                    key = f"{stored.name}/{chunk_key(index)}"
                    found[index] = _Chunk(key, self._index.get(key), _span(index, stored), stored)
                found[index].parts.append((box, array))
        return list(found.values())


@dataclasses.dataclass
class _Chunk:
    """A chunk that is to be read, and the boxes that want parts of it."""

    key: str
    value: Value | None
    box: Box
    stored: Stored
    parts: list[tuple[Box, _Array]] = dataclasses.field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Without the checksum."""
        return math.prod(self.stored.chunk) * self.stored.dtype.itemsize

    def check_size(self) -> None:
        """Raises ValueError for a chunk that is not there or of another size."""
        if self.value is None:
            raise ValueError(f"chunk {self.key} is missing")
        size = self.value.length if isinstance(self.value, Place) else len(self.value)
        if size != self.nbytes + _CHECKSUM:
            raise ValueError(
                f"chunk {self.key} has {size} bytes instead of {self.nbytes + _CHECKSUM}"
            )

    def destination(self) -> _Array | None:
        """The bytes of a box in which the whole chunk comes to lie as it is, if there is one."""
        if len(self.parts) != 1 or self.box.shape != self.stored.chunk:
            return None
        outer, array = self.parts[0]
        if self.box.meet(outer) != self.box:
            return None
        part = array[(..., *self.box.within(outer))]  # with the dots, a view also of a scalar
        return part.reshape(-1).view(np.uint8) if part.flags.c_contiguous else None

    def scatter(self, data: _Array) -> None:
        """Copies what was read to where it is wanted."""
        chunk = data.view(self.stored.leaf.stored[1]).reshape(self.stored.chunk)
        for outer, array in self.parts:
            both = self.box.meet(outer)
            if both is not None:
                array[both.within(outer)] = chunk[both.within(self.box)]


def _aligned(boxes: Sequence[Box], dtype: np.dtype[Any]) -> list[_Array]:
    """Uninitialized arrays in one piece of memory, which costs fewer page faults."""
    sizes = [box.size * dtype.itemsize for box in boxes]
    steps = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    memory = np.empty(sum(steps) + _ALIGNMENT, np.uint8)
    at = -memory.ctypes.data % _ALIGNMENT
    arrays: list[_Array] = []
    for box, size, step in zip(boxes, sizes, steps, strict=True):
        arrays.append(memory[at : at + size].view(dtype).reshape(box.shape))
        at += step
    return arrays


def _batched(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks that one thread reads: near one another in one file."""
    by_file: dict[str, list[_Chunk]] = collections.defaultdict(list)
    for chunk in chunks:
        by_file[chunk.value.file if isinstance(chunk.value, Place) else ""].append(chunk)
    for some in by_file.values():
        some.sort(key=lambda c: c.value.offset if isinstance(c.value, Place) else 0)
        batch: list[_Chunk] = []
        for chunk in some:
            if batch and sum(c.nbytes for c in batch) + chunk.nbytes > _JOB_BYTES:
                yield batch
                batch = []
            batch.append(chunk)
        yield batch


def _read_batch(folder: Path, batch: Sequence[_Chunk]) -> None:
    """Reads and checks chunks of one file, or such as are in the index."""
    value = batch[0].value
    descriptor, name = -1, "index"
    if isinstance(value, Place):
        name = f"{folder / value.file}"
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for chunk in batch:
            _read_chunk(descriptor, chunk)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _read_chunk(descriptor: int, chunk: _Chunk) -> None:
    """Reads one chunk to where it is wanted."""
    chunk.check_size()
    value = chunk.value
    data = chunk.destination()
    target = np.empty(chunk.nbytes, np.uint8) if data is None else data
    if isinstance(value, Place):
        check = bytearray(_CHECKSUM)
        _fill(descriptor, value.offset, target, check)
    else:
        assert value is not None
        target[:] = np.frombuffer(value[:-_CHECKSUM], np.uint8)
        check = value[-_CHECKSUM:]
    if google_crc32c.value(target) != int.from_bytes(check, "little"):  # type: ignore[arg-type]
        raise ValueError(f"the checksum of chunk {chunk.key} is wrong")
    if data is None:
        chunk.scatter(target)


def _fill(descriptor: int, offset: int, *buffers: Any) -> None:
    """Reads from a file until all buffers are full."""
    left = [memoryview(buffer) for buffer in buffers]
    while left:
        count = os.preadv(descriptor, left, offset)
        if not count:
            raise ValueError("it ends too early")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def _rounded(box: Box, stored: Stored) -> Box:
    """A box that begins and ends between chunks (or at the end of the array)."""
    start = (a // c * c for a, c in zip(box.start, stored.chunk, strict=True))
    stop = (-(-b // c) * c for b, c in zip(box.stop, stored.chunk, strict=True))
    return Box(tuple(start), tuple(map(min, stop, stored.shape)))


def _span(index: tuple[int, ...], stored: Stored) -> Box:
    """The elements of an array that are in a chunk."""
    start = tuple(i * c for i, c in zip(index, stored.chunk, strict=True))
    ends = (a + c for a, c in zip(start, stored.chunk, strict=True))
    return Box(start, tuple(map(min, ends, stored.shape)))


_readers: list[Worker] = []
"""Threads that read, once there are any."""


def _submit(folder: Path, batch: Sequence[_Chunk]) -> Future[None]:
    if not _readers:
        _readers.append(Worker("shardflax-read", min(16, max(4, os.cpu_count() or 1))))
    return _readers[0].submit(functools.partial(_read_batch, folder, batch))


os.register_at_fork(after_in_child=_readers.clear)
