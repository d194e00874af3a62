"""Values on their way from the caller's arrays to the writer: copies that are the writer's own.

On the CPU backend a numpy view of a buffer is enough: JAX does not reuse a buffer that numpy looks
at, also if it is donated.  On accelerators, transfers to pinned host memory are started, which the
runtime finishes before it lets anybody overwrite the source.  Many small leaves that are alike are
copied at once (`packing.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from shardflax.ckpt.packing import Row, pack
from shardflax.ckpt.plan import Lot, Stored
from shardflax.core.staging import single_device_arrays

__all__ = ["Group", "Staged", "stage"]

_PINNED = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Staged:
    """A lot and the values of its pieces, or of all of it: what numpy can look at.

    `moving` says that they are still on their way.
    """

    lot: Lot
    values: Sequence[Any]
    moving: bool = False

    def ready(self) -> None:
        """Waits until the values no longer need the caller's arrays."""
        for value in self.values:
            if not isinstance(value, np.ndarray):
                value.block_until_ready()

    def arrays(self) -> list[np.ndarray[Any, np.dtype[Any]]]:
        """The values in numpy, in order of the pieces."""
        return [np.asarray(value) for value in self.values]


@dataclasses.dataclass(frozen=True)
class Group:
    """Lots that are written at once, how all leaves are stored, and who hears that it is done."""

    stored: Sequence[Stored | None]
    staged: Sequence[Staged]
    done: Callable[[], object] = lambda: None

    def leaf(self, staged: Staged) -> Stored:
        """How the leaf of a lot is stored."""
        leaf = self.stored[staged.lot.leaf]
        assert leaf is not None
        return leaf


def stage(lots: Sequence[Lot], leaves: Sequence[Any]) -> list[Staged]:
    """Takes the values of lots out of the caller's hands; starts transfers, waits for none.

    >>> from shardflax.ckpt.plan import make_plan
    >>> plan, leaves = make_plan({"w": np.arange(3)})
    >>> stage(plan.parcels[0], leaves)[0].arrays()
    [array([0, 1, 2])]
    """
    with _no_collection():
        packs, rest = pack(lots, lambda lot: lot.kind, lambda lot: leaves[lot.leaf])
        far = [x for x, _ in packs if not _on_host(x.array.sharding)]
        for one, array in zip(far, _fetched([x.array for x in far]), strict=True):
            one.array = array
        rows = [
            Staged(lot, (Row(one, i),), moving=True)
            for one, members in packs
            for i, lot in enumerate(members)
        ]
        return [*rows, *_stage(rest, leaves)]


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
    staged: list[Staged] = []
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
        staged.append(Staged(lot, found, moving=not near))
    copies = _fetched([found[i] for found, i in far])
    for (found, i), copy in zip(far, copies, strict=True):
        found[i] = copy
    return staged


def _parts(leaf: Any) -> tuple[Any, Sequence[Any], bool]:
    """The leaf, or the words of its keys; what is on each device; whether numpy can look at it."""
    if not isinstance(leaf, jax.Array):
        return leaf, (), True
    data = leaf if isinstance(leaf.dtype, np.dtype) else jax.random.key_data(leaf)
    return data, single_device_arrays(data), _on_host(data.sharding)


@functools.lru_cache(maxsize=1024)
def _on_host(sharding: jax.sharding.Sharding) -> bool:
    """True if numpy can look at the buffers of an array."""
    device = next(iter(sharding.device_set))
    return device.platform == "cpu" and sharding.memory_kind != _PINNED


def _fetched(sources: Sequence[Any]) -> Sequence[Any]:
    """Starts the transfer of values that are on accelerators."""
    if not sources:
        return ()
    kinds = {m.kind for m in next(iter(sources[0].devices())).addressable_memories()}
    if _PINNED not in kinds or sources[0].sharding.memory_kind == _PINNED:
        for source in sources:
            source.copy_to_host_async()
        return [np.array(source) for source in sources]
    return jax.device_put(sources, [s.sharding.with_memory_kind(_PINNED) for s in sources])
