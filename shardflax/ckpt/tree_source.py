"""Trees in memory, and saved states under other names, offered like what was saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shardflax.ckpt.errors import CheckpointLeafError
from shardflax.ckpt.leaves import describe, is_key
from shardflax.ckpt.match import renamed
from shardflax.ckpt.paths import Names, show, tree_of
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.patterns import Renaming
from shardflax.ckpt.regions import Box
from shardflax.ckpt.sources import Later, Source

__all__ = ["RenamedSource", "TreeSource", "pieces", "with_names"]

_PIECE = 32 << 20
"""Bytes of a leaf that are in memory at once, where all of it is gone through."""
_MOST_PIECE = 8 * _PIECE
"""The same where chunks would be read several times otherwise."""


class TreeSource(Source):
    """The leaves of a tree; abstract ones (`jax.ShapeDtypeStruct`) can be compared, not read.

    Raises CheckpointLeafError for leaves that cannot be stored.

    >>> TreeSource({"a": 1, "b": np.ones(2)}).leaves[("b",)].dtype
    'float64'
    """

    def __init__(self, tree: Any) -> None:
        about = tree_of(tree)
        self._values = about.zip(jax.tree.leaves(tree))
        self._names = dict(zip(about.paths, about.names, strict=True))
        self.leaves = {path: describe(path, x) for path, x in self._values.items()}
        self.nones = about.nones

    def names(self, path: LeafPath) -> Names:
        return self._names[path]

    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        return self.leaves[path].stored[0]

    def read(self, path: LeafPath, box: Box) -> Later:
        return lambda: np.asarray(self._data(path)[box.slices])

    def _data(self, path: LeafPath) -> np.ndarray[Any, np.dtype[Any]]:
        leaf = self._values[path]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointLeafError(show(path), "it has no value", "Give an array.")
        if isinstance(leaf, jax.Array):
            if not leaf.is_fully_addressable:
                raise CheckpointLeafError(
                    show(path), "other processes hold parts of it", "Use a CheckpointManager."
                )
            leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        return np.asarray(leaf)


@dataclasses.dataclass
class RenamedSource(Source):
    """A saved state under other paths; see `with_names`."""

    inner: Source
    old: Mapping[LeafPath, LeafPath]
    nones: tuple[LeafPath, ...] = ()

    def __post_init__(self) -> None:
        self.leaves = {path: self.inner.leaves[old] for path, old in self.old.items()}
        self.boxed = self.inner.boxed

    def names(self, path: LeafPath) -> Names:
        return self.inner.names(self.old[path])

    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        return self.inner.chunk(self.old[path])

    def read(self, path: LeafPath, box: Box) -> Later:
        return self.inner.read(self.old[path], box)

    def read_boxes(self, path: LeafPath, boxes: Sequence[Box]) -> list[tuple[Box, Later]]:
        return self.inner.read_boxes(self.old[path], boxes)

    def check_size(self, nbytes: int) -> None:
        self.inner.check_size(nbytes)


def with_names(source: Source, rules: Mapping[str, str] | None) -> Source:
    """The source with components of its paths renamed, as by `CheckpointManager.restore`.

    Raises ValueError for a rule that does nothing, and for two leaves of one new name.

    >>> list(with_names(TreeSource({"encoder": {"w": 1.0}}), {"encoder": "backbone"}).leaves)
    [('backbone', 'w')]
    """
    if not rules:
        return source
    renaming = Renaming(rules)
    old, problems = renamed(source, renaming)
    if problems:
        raise ValueError("; ".join(" ".join(line.split()) for line in problems))
    return RenamedSource(source, old, tuple(map(renaming, source.nones)))


def pieces(
    source: Source, path: LeafPath, chunk: tuple[int, ...] | None = None, ordered: bool = False
) -> Iterator[Box]:
    """A leaf's data in boxes of some megabytes, cut between chunks (the source's, by default).

    If `ordered`, they follow one another as in a contiguous file, and can be somewhat larger.

    >>> [box.shape for box in pieces(TreeSource({"w": np.ones((2, 3))}), ("w",))]
    [(2, 3)]
    """
    shape, dtype = source.leaves[path].stored
    source.check_size(source.leaves[path].nbytes)
    return _boxes(Box.whole(shape), 0, chunk or source.chunk(path), dtype.itemsize, ordered)


def _boxes(
    box: Box, dim: int, chunk: tuple[int, ...], itemsize: int, ordered: bool
) -> Iterator[Box]:
    """Cuts along one dim, and along the next where that is not enough."""
    if box.size * itemsize <= _PIECE or dim == len(box.shape):
        yield box
        return
    row = box.size // box.shape[dim] * itemsize
    rows = max(1, _PIECE // row)
    step = rows // chunk[dim] * chunk[dim] or chunk[dim]
    if ordered and step * row > _MOST_PIECE:
        step = rows
    for start in range(box.start[dim], box.stop[dim], step):
        stop = min(start + step, box.stop[dim])
        layer = Box(
            (*box.start[:dim], start, *box.start[dim + 1 :]),
            (*box.stop[:dim], stop, *box.stop[dim + 1 :]),
        )
        if ordered and step > 1:
            yield layer
        else:
            yield from _boxes(layer, dim + 1, chunk, itemsize, ordered)
