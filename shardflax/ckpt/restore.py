"""From a source and a target to arrays on the target's devices."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardflax.ckpt.leaves import LeafSpec, is_key, key_words
from shardflax.ckpt.match import Take
from shardflax.ckpt.metering import Meter
from shardflax.ckpt.paths import Path, nest, tree_of
from shardflax.ckpt.regions import Box
from shardflax.ckpt.sources import Later, Source

__all__ = ["load", "load_on_host"]

_Array = np.ndarray[Any, np.dtype[Any]]
_AHEAD = 256 << 20
"""Bytes that are read ahead of what is being put on devices."""


def load(source: Source, takes: Mapping[Path, Take], target: Any, meter: Meter) -> Any:
    """The target's tree, boxes included, with the values of the source.

    `meter` hears of each leaf, all of it: other processes may read other parts of it.

    Raises LeafDataError for a leaf that is damaged.
    """
    tree = tree_of(target)
    wanted = tree.zip(jax.tree.leaves(target))
    sizes = {path: _size(take) for path, take in takes.items()}
    meter.expect(sum(sizes.values()))
    found: dict[Path, Any] = {}
    for path, value in _ahead(_Leaf(source, p, takes[p], leaf) for p, leaf in wanted.items()):
        found[path] = value
        meter.advance(sizes[path])
    return jax.tree.unflatten(tree.treedef, [found[path] for path in tree.paths])


def _size(take: Take) -> int:
    """The bytes of a leaf that comes from the source."""
    return take.target.nbytes if take.taken is not None else 0


def load_on_host(
    source: Source,
    wanted: Callable[[Path], bool] = lambda path: True,
    meter: Meter | None = None,
) -> Any:
    """All leaves as numpy arrays (keys as the words of their data), in nested dicts."""
    source.check_size(sum(s.nbytes for p, s in source.leaves.items() if wanted(p) and _reads(s)))
    host: dict[Path, Any] = dict.fromkeys(filter(wanted, source.nones))
    laters: list[tuple[Path, Later | None, LeafSpec]] = []
    for path, spec in source.leaves.items():
        if wanted(path):
            later = source.read(path, Box.whole(spec.stored[0])) if _reads(spec) else None
            laters.append((path, later, spec))
    heard = meter or Meter("reading")
    heard.expect(sum(spec.nbytes for _, _, spec in laters))
    for path, later, spec in laters:
        host[path] = _made(spec) if later is None else later()
        heard.advance(spec.nbytes)
    return nest(host)


def _reads(spec: LeafSpec) -> bool:
    """True if the data of a leaf is among the arrays."""
    return spec.kind != "python" and spec.on_disk


def _made(spec: LeafSpec) -> Any:
    """The value of a leaf of which the manifest has it all."""
    return spec.value if spec.kind == "python" else np.zeros(*spec.stored)


class _Leaf:
    """One leaf on its way: what is read of it, and where that goes."""

    def __init__(self, source: Source, path: Path, take: Take, target: Any) -> None:
        self.source, self.path, self.take, self.target = source, path, take, target
        self.reading: list[tuple[Box, Later]] = []
        self.nbytes = 0

    def start(self) -> None:
        """Starts the reads that this process needs."""
        saved, taken = self.take.saved, self.take.taken
        if saved is None or taken is None or not _reads(saved):
            return
        words = key_words(saved.impl) if saved.kind == "key" else ()
        shape = (*taken.shape(saved.shape), *words)
        boxes = _boxes(self.target, shape)
        if not boxes:  # all of it is on devices of other processes
            return
        if taken.dim is None:
            self.reading = self.source.read_boxes(taken.paths[0], boxes)
        else:
            self.reading = [(box, self._read(box)) for box in boxes]
        self.nbytes = sum(box.size for box in boxes) * saved.stored[1].itemsize

    def _read(self, box: Box) -> Later:
        """Starts reading a box of what the saved leaves amount to."""
        taken = self.take.taken
        assert taken is not None and taken.dim is not None
        dim = taken.dim
        if taken.index is not None:
            later = self.source.read(taken.paths[0], _insert(box, dim, taken.index))
            return lambda: np.squeeze(later(), dim)
        inner = Box(_without(box.start, dim), _without(box.stop, dim))
        several = [
            self.source.read(taken.paths[i], inner) for i in range(box.start[dim], box.stop[dim])
        ]
        return lambda: np.stack([later() for later in several], dim)

    def finish(self) -> Any:
        """The leaf, on the target's devices."""
        take, target = self.take, self.target
        if take.taken is None or take.saved is None:
            return target
        if not self.reading:
            value = (
                _made(take.saved)
                if take.taken.dim is None
                else np.zeros(take.taken.shape(take.saved.shape), take.saved.stored[1])
            )
            return _placed([(None, self._cast(value))], take, target)
        read: list[tuple[Box | None, Any]] = [
            (box, self._cast(later())) for box, later in self.reading
        ]
        self.reading = []
        return _placed(read, take, target)

    def _cast(self, array: _Array) -> _Array:
        return array.astype(jnp.dtype(self.take.target.dtype)) if self.take.cast else array


def _ahead(leaves: Iterator[_Leaf]) -> Iterator[tuple[Path, Any]]:
    """Finishes the leaves in order, while the next ones are already being read."""
    started: collections.deque[_Leaf] = collections.deque()
    size = 0
    for leaf in leaves:
        leaf.start()
        started.append(leaf)
        size += leaf.nbytes
        while started and size > _AHEAD:
            first = started.popleft()
            size -= first.nbytes
            yield first.path, first.finish()
    while started:
        first = started.popleft()
        yield first.path, first.finish()


def _insert(box: Box, dim: int, index: int) -> Box:
    """A box with one more dim, of which it is one slice."""
    start = (*box.start[:dim], index, *box.start[dim:])
    return Box(start, (*box.stop[:dim], index + 1, *box.stop[dim:]))


def _without(numbers: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return numbers[:dim] + numbers[dim + 1 :]


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf is committed to; None for host values and for arrays that JAX may move."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    if isinstance(leaf, jax.Array) and leaf.committed:
        return leaf.sharding
    return None


def _boxes(target: Any, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """The boxes of an array that this process needs for a target, in order."""
    sharding = _sharding(target)
    if sharding is None:
        return (Box.whole(shape),)
    return _boxes_on(sharding, tuple(target.shape), shape)


@functools.lru_cache(maxsize=1024)
def _boxes_on(
    sharding: jax.sharding.Sharding, outer: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Box, ...]:
    """The boxes of an array of which the first dims, of shape `outer`, are sharded."""
    words: Any = (slice(None),) * (len(shape) - len(outer))
    indices: Any = sharding.addressable_devices_indices_map(outer).values()
    return tuple(sorted({Box.of((*index, *words), shape) for index in indices}))


@functools.lru_cache(maxsize=4096)
def _box_at(index: tuple[tuple[int | None, int | None], ...], shape: tuple[int, ...]) -> Box:
    """The box that slices select, of which only start and stop are given."""
    return Box.of([slice(*ends) for ends in index], shape)


def _placed(read: list[tuple[Box | None, Any]], take: Take, target: Any) -> Any:
    """One leaf in the target's own type, on its devices."""
    saved = take.saved
    assert saved is not None
    if saved.kind == "python":
        value = read[0][1]
        if not hasattr(target, "dtype"):
            return _on_host(value, target)
        read = [(None, np.asarray(value, target.dtype))]
    if not isinstance(target, jax.Array | jax.ShapeDtypeStruct):
        return _on_host(read[0][1], target)
    if is_key(target):
        return jax.random.wrap_key_data(_on_device(read, target), impl=saved.impl)
    return _weak(_on_device(read, target), target)


def _on_host(value: Any, target: Any) -> Any:
    """A numpy array, numpy scalar, string or Python scalar, as the target is."""
    if isinstance(target, np.ndarray):
        return np.array(value)  # the caller's own, and writable
    if isinstance(target, np.generic):
        return np.asarray(value)[()]
    return value.item() if hasattr(value, "item") else value


def _on_device(read: list[tuple[Box | None, Any]], target: Any) -> jax.Array:
    """A JAX array, committed to the target's sharding if it has one."""
    sharding = _sharding(target)
    if sharding is None:
        return jnp.asarray(read[0][1])
    outer, whole = read[0]
    if len(read) > 1 or outer is not None:
        shape = _shape(read, target)
        return jax.make_array_from_callback(shape, sharding, _Parts(read, shape))
    return jax.make_array_from_callback(
        whole.shape, sharding, lambda index: whole[index], dtype=whole.dtype
    )


def _shape(read: list[tuple[Box | None, Any]], target: Any) -> tuple[int, ...]:
    """The shape of the data of a target: with the words of keys, where it holds some."""
    words = read[0][1].ndim - len(target.shape)
    return (*target.shape, *read[0][1].shape[read[0][1].ndim - words :]) if words else target.shape


class _Parts:
    """Gives each device its part of what was read."""

    def __init__(self, read: list[tuple[Box | None, Any]], shape: tuple[int, ...]) -> None:
        self._read, self._shape = dict(read), shape

    def __call__(self, index: Any) -> _Array:
        box = _box_at(tuple((part.start, part.stop) for part in index), self._shape)
        if box in self._read:
            return self._read[box]
        outer, array = next(iter(self._read.items()))
        assert outer is not None
        return array[box.within(outer)]


def _weak(value: jax.Array, target: Any) -> jax.Array:
    """`value` with the weak type of a scalar target, so that a compiled step takes it as it is."""
    if value.shape or not getattr(target, "weak_type", False):
        return value
    scalar = np.asarray(value.addressable_data(0)).item()
    return jax.jit(lambda x: x, out_shardings=_sharding(target))(scalar)
