"""Reading steps in folders: chunks go from their files to where they are wanted."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from shardflax.ckpt.index import read_index
from shardflax.ckpt.ocdbt import Place, Value
from shardflax.ckpt.orbax_files import STATE
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.plan import Stored
from shardflax.ckpt.regions import Box, chunk_box, chunks_in, rounded
from shardflax.ckpt.sources import Later, LeafDataError, OurSource
from shardflax.ckpt.worker import Worker
from shardflax.ckpt.zarr import checksum_of, chunk_key

__all__ = ["LocalSource"]

_Array = np.ndarray[Any, np.dtype[Any]]
_ALIGNMENT = 64
"""Bytes; where buffers begin that JAX takes as they are, on the host."""
_JOB_BYTES, _JOB_CHUNKS = 4 << 20, 64
"""How much of a file one thread reads before it looks for more to do."""
_SHARED_BYTES = 1 << 18
_CHECKSUM = 4
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Nobody waits for a named pipe in the place of a file, which could not be read at an offset."""


class LocalSource(OurSource):
    """A step that this library wrote, in a folder of a file system."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._job = _Job(Path(), "")

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
        """Starts reading, soon; each chunk once, however many boxes it is in."""
        stored = self.manifest.stored[path]
        if stored.codec is not None:
            return [(box, super(LocalSource, self).read(path, box)) for box in boxes]
        try:
            index = self._index
        except ValueError as error:  # it cannot be read
            raise LeafDataError(path, str(error)) from error
        arrays = _aligned(boxes, stored.leaf.stored[1])
        leaf = _Leaf(path, stored, arrays)
        for spot in _spots(stored.shape, stored.chunk, tuple(boxes)):
            self._add(_Chunk(leaf, spot, index.get(f"{stored.name}/{spot.key}")))
        return [
            (box, functools.partial(leaf.finish, array))
            for box, array in zip(boxes, arrays, strict=True)
        ]

    def _add(self, chunk: _Chunk) -> None:
        """Puts a chunk on the list of what is to be read; a full list is read at once."""
        file = chunk.value.file if isinstance(chunk.value, Place) else ""
        if self._job.full or self._job.file != file:
            self._job.start()
            self._job = _Job(self._state, file)
        self._job.chunks.append(chunk)
        self._job.nbytes += chunk.nbytes
        if not chunk.leaf.jobs or chunk.leaf.jobs[-1] is not self._job:
            chunk.leaf.jobs.append(self._job)
        if self._job.full:
            self._job.start()


@dataclasses.dataclass
class _Leaf:
    """Boxes of one leaf that are being read."""

    path: LeafPath
    stored: Stored
    arrays: list[_Array]
    jobs: list[_Job] = dataclasses.field(default_factory=list)
    error: Exception | None = None

    def finish(self, array: _Array) -> _Array:
        """One of the arrays, once all of them are there."""
        while self.jobs:
            self.jobs.pop().start().result()
        if self.error is not None:
            raise LeafDataError(self.path, str(self.error)) from self.error
        return array


@dataclasses.dataclass(eq=False)
class _Job:
    """Chunks of one file (or of the index, if it has no name) that one thread reads."""

    folder: Path
    file: str
    chunks: list[_Chunk] = dataclasses.field(default_factory=list)
    nbytes: int = 0
    future: Future[None] | None = None

    @property
    def full(self) -> bool:
        """True if nothing can be added."""
        many = self.nbytes >= _JOB_BYTES or len(self.chunks) >= _JOB_CHUNKS
        return many or self.future is not None

    def start(self) -> Future[None]:
        """Lets a thread read it, unless one does already."""
        if self.future is None:
            self.future = _readers().submit(self._run)
        return self.future

    def _run(self) -> None:
        chunks, self.chunks = self.chunks, []
        try:
            if self.file:
                descriptor = os.open(self.folder / self.file, _READ)
            else:
                descriptor = -1
        except OSError as error:
            for chunk in chunks:
                chunk.leaf.error = error
            return
        try:
            for chunk in chunks:
                self._read(chunk, descriptor)
        finally:
            if self.file:
                os.close(descriptor)

    def _read(self, chunk: _Chunk, descriptor: int) -> None:
        try:
            chunk.read(descriptor)
        except (ValueError, OSError, OverflowError) as error:
            where = self.folder / self.file if self.file else "the index"
            chunk.leaf.error = ValueError(f"{where}: {error}")


@dataclasses.dataclass(frozen=True, slots=True)
class _Spot:
    """A chunk of an array, and the boxes that want parts of it.

    Of each box its number, which part of it that is, and which part of the chunk.  `direct` says
    that the chunk as it is stored is a contiguous part of the one box that wants it.
    """

    key: str
    parts: tuple[tuple[int, tuple[slice, ...], tuple[slice, ...]], ...]
    direct: bool


@functools.lru_cache(maxsize=1024)
def _spots(
    shape: tuple[int, ...], chunk: tuple[int, ...], boxes: tuple[Box, ...]
) -> tuple[_Spot, ...]:
    """The chunks that some boxes lie in."""
    found: dict[tuple[int, ...], list[tuple[int, Box]]] = {}
    for number, box in enumerate(boxes):
        for index, _ in chunks_in(rounded(box, shape, chunk), chunk):
            found.setdefault(index, []).append((number, box))
    spots: list[_Spot] = []
    for index, wanting in found.items():
        span = chunk_box(index, shape, chunk)
        parts = [(n, box, span.meet(box)) for n, box in wanting]
        slices = [(n, m.within(box), m.within(span)) for n, box, m in parts if m is not None]
        whole = len(wanting) == 1 and parts[0][2] == span and span.shape == chunk
        direct = whole and _contiguous(span.shape, wanting[0][1].shape)
        spots.append(_Spot(chunk_key(index), tuple(slices), direct))
    return tuple(spots)


def _contiguous(part: Sequence[int], whole: Sequence[int]) -> bool:
    """True if a part of an array, of some shape, is one piece of memory."""
    dims = [d for d, length in enumerate(part) if length > 1]
    return all(part[d] == whole[d] for d in range(min(dims, default=0) + 1, len(part)))


@dataclasses.dataclass(slots=True)
class _Chunk:
    """A chunk that is to be read: where it is, and where it goes."""

    leaf: _Leaf
    spot: _Spot
    value: Value | None

    @property
    def nbytes(self) -> int:
        """Without the checksum."""
        return math.prod(self.leaf.stored.chunk) * self.leaf.stored.dtype.itemsize

    def read(self, descriptor: int) -> None:
        """Reads and checks it, and puts it where it is wanted; raises ValueError, OSError."""
        value = self._checked()
        number, part, _ = self.spot.parts[0]
        if self.spot.direct:
            # With the dots, it is a view also of an array without dims.
            target = self.leaf.arrays[number][(..., *part)].reshape(-1).view(np.uint8)
        else:
            target = np.empty(self.nbytes, np.uint8)
        check = bytearray(_CHECKSUM)
        if isinstance(value, Place):
            _fill(descriptor, value.offset, target, check)
        else:
            target[:] = np.frombuffer(value, np.uint8)[:-_CHECKSUM]
            check[:] = value[-_CHECKSUM:]
        if checksum_of(target) != check:
            raise ValueError(f"the checksum of chunk {self.spot.key} is wrong")
        if not self.spot.direct:
            self._scatter(target)

    def _checked(self) -> Value:
        """Where it is, if it has the right size there."""
        if self.value is None:
            raise ValueError(f"chunk {self.spot.key} is missing")
        size = self.value.length if isinstance(self.value, Place) else len(self.value)
        wanted = self.nbytes + _CHECKSUM
        if size != wanted:
            raise ValueError(f"chunk {self.spot.key} has {size} bytes instead of {wanted}")
        return self.value

    def _scatter(self, data: _Array) -> None:
        """Copies what was read to where it is wanted."""
        stored = self.leaf.stored
        chunk = data.view(stored.leaf.stored[1]).reshape(stored.chunk)
        for number, there, here in self.spot.parts:
            self.leaf.arrays[number][there] = chunk[here]


def _aligned(boxes: Sequence[Box], dtype: np.dtype[Any]) -> list[_Array]:
    """Arrays that hold nothing yet: small ones share a piece of memory, which takes less time.

    Large ones do not: the allocator then has pages that were in use before.  New ones, and above
    all huge ones, can take longer than all of the reading, on virtual machines.
    """
    steps = [-(-box.size * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for box in boxes]
    if sum(steps) > _SHARED_BYTES:
        pieces = [(_memory(step), 0) for step in steps]
    else:
        ends = list(itertools.accumulate(steps))
        memory = _memory(ends[-1])
        pieces = [(memory, end - step) for end, step in zip(ends, steps, strict=True)]
    return [
        np.ndarray(box.shape, dtype, memory, at)
        for box, (memory, at) in zip(boxes, pieces, strict=True)
    ]


def _memory(size: int) -> _Array:
    """Bytes that begin where JAX likes it."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    at = -memory.ctypes.data % _ALIGNMENT
    return memory[at : at + size]


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


@functools.cache
def _readers() -> Worker:
    """Threads that read, from the first time on; more than processors: they wait for the disk."""
    return Worker("shardflax-read", min(16, max(8, os.cpu_count() or 1)))


os.register_at_fork(after_in_child=_readers.cache_clear)
