"""How a leaf is cut for storage: who writes which part of it, in chunks of which shape."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

__all__ = [
    "CHUNK_BYTES",
    "SMALL_BYTES",
    "Box",
    "Part",
    "boxes_of",
    "chunk_box",
    "chunk_shape",
    "chunks_in",
    "join_boxes",
    "rounded",
]

CHUNK_BYTES = 8 << 20
"""No chunk is larger, so that a process reads little more than it needs."""
SMALL_BYTES = 1 << 20
"""Leaves up to this size are stored in as few chunks as there are writers."""
_WASTE = 1.3
"""A box around all that is wanted is read at once if single reads would read this much more."""


@dataclasses.dataclass(frozen=True, order=True)
class Box:
    """A range of indices in every dim: `start` and `stop`.

    >>> Box((0, 2), (4, 4)).shape
    (4, 2)
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def of(cls, index: Sequence[slice], shape: Sequence[int]) -> Box:
        """The box that slices (of step 1) select in an array.

        >>> Box.of((slice(None), slice(1, 2)), (3, 4))
        Box(start=(0, 1), stop=(3, 2))
        """
        ranges = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        return cls(tuple(r[0] for r in ranges), tuple(r[1] for r in ranges))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of an array."""
        return cls((0,) * len(shape), tuple(shape))

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The length of each dim."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @functools.cached_property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes an array."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The slices of this box in an array that holds the outer one."""
        return tuple(
            slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True)
        )

    def meet(self, other: Box) -> Box | None:
        """What both have in common.

        >>> Box((0,), (4,)).meet(Box((2,), (9,)))
        Box(start=(2,), stop=(4,))
        """
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def join(self, other: Box) -> Box:
        """The smallest box around both."""
        return Box(tuple(map(min, self.start, other.start)), tuple(map(max, self.stop, other.stop)))


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an array, the processes that hold it, and the positions of this one's copies.

    Positions are indices of `jax.Array.addressable_data`.
    """

    box: Box
    holders: tuple[int, ...]
    positions: tuple[int, ...]


def boxes_of(array: jax.Array) -> tuple[Part, ...]:
    """The distinct parts of an array over all processes, in order.

    >>> import jax.numpy as jnp
    >>> boxes_of(jnp.ones(3))
    (Part(box=Box(start=(0,), stop=(3,)), holders=(0,), positions=(0,)),)
    """
    shape, own = array.shape, [shard.device for shard in array.addressable_shards]
    holders: dict[Box, set[int]] = {}
    places: dict[Box, list[int]] = {}
    index: Any
    for device, index in array.sharding.devices_indices_map(shape).items():
        box = Box.of(index, shape)
        holders.setdefault(box, set()).add(device.process_index)
        places.setdefault(box, [])
        if device.process_index == jax.process_index():
            places[box].append(own.index(device))
    return tuple(
        Part(b, tuple(sorted(holders[b])), tuple(sorted(places[b]))) for b in sorted(holders)
    )


def chunk_shape(shape: Sequence[int], itemsize: int, boxes: Sequence[Box]) -> tuple[int, ...]:
    """A shape of chunks such that no chunk lies in two of the boxes, which tile the array.

    >>> chunk_shape((8, 6), 4, [Box((0, 0), (4, 6)), Box((4, 0), (8, 6))])
    (4, 6)
    >>> chunk_shape((4096, 4096), 4, [Box((0, 0), (4096, 4096))])
    (512, 4096)
    """
    chunk: list[int] = []
    cut: list[bool] = []
    for dim, length in enumerate(shape):
        edges = {box.start[dim] for box in boxes} | {box.stop[dim] for box in boxes}
        chunk.append(math.gcd(*edges) or 1)
        cut.append(edges != {0, length})
    for dim in range(len(chunk)):
        excess = math.prod(chunk) * itemsize / CHUNK_BYTES
        if excess <= 1:
            break
        chunk[dim] = _shorter(chunk[dim], excess, exact=cut[dim])
    return tuple(chunk)


def _shorter(length: int, excess: float, exact: bool) -> int:
    """A length that is `excess` times shorter; one that divides it, if exact."""
    pieces = min(math.ceil(excess), length)
    if not exact:
        return math.ceil(length / pieces)
    return next(length // n for n in range(pieces, length + 1) if length % n == 0)


def chunks_in(box: Box, chunk: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """The chunks of a box that begins and ends between chunks: their grid indices and boxes.

    >>> [index for index, _ in chunks_in(Box((4, 0), (8, 6)), (2, 6))]
    [(2, 0), (3, 0)]
    """
    spans = [range(a // c, -(-b // c)) for a, b, c in zip(box.start, box.stop, chunk, strict=True)]
    for index in itertools.product(*spans):
        start = tuple(i * c for i, c in zip(index, chunk, strict=True))
        stop = tuple(map(min, ((i + 1) * c for i, c in zip(index, chunk, strict=True)), box.stop))
        yield index, Box(start, stop)


def rounded(box: Box, shape: Sequence[int], chunk: Sequence[int]) -> Box:
    """The box, made to begin and end between chunks (or at the end of the array).

    >>> rounded(Box((3,), (6,)), (10,), (4,)), rounded(Box((3,), (9,)), (10,), (4,)).stop
    (Box(start=(0,), stop=(8,)), (10,))
    """
    start = (a // c * c for a, c in zip(box.start, chunk, strict=True))
    stop = (-(-b // c) * c for b, c in zip(box.stop, chunk, strict=True))
    return Box(tuple(start), tuple(map(min, stop, shape)))


def chunk_box(index: Sequence[int], shape: Sequence[int], chunk: Sequence[int]) -> Box:
    """The elements of an array that are in a chunk.

    >>> chunk_box((2,), (10,), (4,))
    Box(start=(8,), stop=(10,))
    """
    start = tuple(i * c for i, c in zip(index, chunk, strict=True))
    ends = (a + c for a, c in zip(start, chunk, strict=True))
    return Box(start, tuple(map(min, ends, shape)))


def join_boxes(boxes: Sequence[Box], chunk: Sequence[int]) -> list[Box]:
    """The boxes, or one around them all if that reads much less, because they share chunks.

    >>> join_boxes([Box((0,), (2,)), Box((2,), (4,))], (4,))
    [Box(start=(0,), stop=(4,))]
    """
    if len(boxes) < 2:
        return list(boxes)
    around = boxes[0]
    for box in boxes[1:]:
        around = around.join(box)
    single = sum(_touched(box, chunk) for box in boxes)
    return [around] if single > _WASTE * _touched(around, chunk) else list(boxes)


def _touched(box: Box, chunk: Sequence[int]) -> int:
    """How many elements the chunks have that a box lies in."""
    spans = (-(-b // c) - a // c for a, b, c in zip(box.start, box.stop, chunk, strict=True))
    return math.prod(spans) * math.prod(chunk)
