"""Values on their way from the caller's arrays to the writer: copies that are the writer's own.

On the CPU backend a numpy view of a buffer is enough: JAX does not reuse a buffer that numpy looks
at, also if it is donated.  On accelerators, transfers to pinned host memory are started, which the
runtime finishes before it lets anybody overwrite the source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from shardflax.ckpt.leaves import is_key
from shardflax.ckpt.plan import Lot
from shardflax.core.staging import single_device_arrays

__all__ = ["Staged", "stage"]

_PINNED = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Staged:
    """A lot and the values of its pieces: numpy arrays, or arrays in host memory of JAX."""

    lot: Lot
    values: tuple[Any, ...]

    @property
    def moving(self) -> bool:
        """True if values are still on their way from an accelerator."""
        return any(isinstance(value, jax.Array) for value in self.values)

    def ready(self) -> None:
        """Waits until the values no longer need the caller's arrays."""
        for value in self.values:
            if isinstance(value, jax.Array):
                value.block_until_ready()

    def arrays(self) -> list[np.ndarray[Any, np.dtype[Any]]]:
        """The values in numpy, in order of the pieces."""
        return [np.asarray(value) for value in self.values]


def stage(lots: Sequence[Lot], leaves: Sequence[Any]) -> list[Staged]:
    """Takes the values of lots out of the caller's hands; starts transfers, waits for none.

    >>> from shardflax.ckpt.plan import make_plan
    >>> plan, leaves = make_plan({"w": np.arange(3)})
    >>> stage(plan.parcels[0], leaves)[0].arrays()
    [array([0, 1, 2])]
    """
    with _no_collection():
        return _stage(lots, leaves)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from looking at all that is made here, again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _stage(lots: Sequence[Lot], leaves: Sequence[Any]) -> list[Staged]:
    data: dict[int, tuple[Any, Sequence[Any], bool]] = {}
    values: list[list[Any]] = []
    far: list[tuple[list[Any], int]] = []
    for lot in lots:
        if lot.leaf not in data:
            data[lot.leaf] = _parts(leaves[lot.leaf])
        whole, parts, near = data[lot.leaf]
        found: list[Any] = [
            parts[piece.position] if piece.position >= 0 else np.array(whole)
            for piece in lot.pieces
        ]
        if near:
            found = list(map(np.asarray, found))
        else:
            far += [(found, i) for i, piece in enumerate(lot.pieces) if piece.position >= 0]
        values.append(found)
    _fetch(far)
    return [Staged(lot, tuple(found)) for lot, found in zip(lots, values, strict=True)]


def _parts(leaf: Any) -> tuple[Any, Sequence[Any], bool]:
    """The leaf, or the words of its keys; what is on each device; whether numpy can look at it."""
    if not isinstance(leaf, jax.Array):
        return leaf, (), True
    data = jax.random.key_data(leaf) if is_key(leaf) else leaf
    return data, single_device_arrays(data), _on_host(data)


def _on_host(array: jax.Array) -> bool:
    """True if numpy can look at the buffers."""
    device = next(iter(array.sharding.device_set))
    return device.platform == "cpu" and array.sharding.memory_kind != _PINNED


def _fetch(far: Sequence[tuple[list[Any], int]]) -> None:
    """Starts the transfer of all values that are on accelerators."""
    if not far:
        return
    sources = [found[i] for found, i in far]
    kinds = {m.kind for m in next(iter(sources[0].devices())).addressable_memories()}
    if _PINNED not in kinds or sources[0].sharding.memory_kind == _PINNED:
        for source in sources:
            source.copy_to_host_async()
        copies = [np.array(source) for source in sources]
    else:
        targets = [source.sharding.with_memory_kind(_PINNED) for source in sources]
        copies = jax.device_put(sources, targets)
    for (found, i), copy in zip(far, copies, strict=True):
        found[i] = copy
