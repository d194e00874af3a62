"""Which rows of a batch a process reads, and how they become one array of all processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding

from shardflax.training.data.errors import BatchLayoutError

__all__ = ["Batch", "BatchLayout"]


class Batch(TypedDict):
    """What a step is fed: two int32 arrays of shape (global_batch, seq_len).

    `targets` are `inputs` one token later.

    >>> sorted(Batch.__annotations__)
    ['inputs', 'targets']
    """

    inputs: jax.Array
    targets: jax.Array


@dataclass(frozen=True)
class BatchLayout:
    """How batches of `(global_batch, seq_len)` lie on a mesh, and what of them this process reads.

    `sharding` is that of the two dims (batch, length).  Raises `BatchLayoutError` for a dim that is
    empty, or that its mesh axes do not divide.

    >>> mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    >>> rows = NamedSharding(mesh, jax.P("data"))
    >>> BatchLayout(8, 16, rows).rows
    (0, 1, 2, 3, 4, 5, 6, 7)
    >>> BatchLayout(6, 16, rows)
    Traceback (most recent call last):
    shardflax.training.data.errors.BatchLayoutError: global_batch=6: expected a multiple of 4 \
(data=4); write 4 or 8
    """

    global_batch: int
    seq_len: int
    sharding: NamedSharding

    def __post_init__(self) -> None:
        spec, mesh = self.sharding.spec, self.sharding.mesh
        dims = (("global_batch", self.global_batch), ("seq_len", self.seq_len))
        if len(spec) > len(dims):
            raise ValueError(f"expected a spec for the dims (batch, length), found {spec}")
        for (dim, size), entry in zip(dims, (*spec, None, None), strict=False):
            names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            axes = {name: mesh.shape[name] for name in names}
            if size < 1 or size % math.prod(axes.values()):
                raise BatchLayoutError(dim, size, axes)

    @property
    def shape(self) -> tuple[int, int]:
        """(global_batch, seq_len)."""
        return self.global_batch, self.seq_len

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that this process's devices hold, ascending."""
        held = self.sharding.addressable_devices_indices_map(self.shape)
        return tuple(sorted({r for i in held.values() if i for r in self._range(i[0])}))

    def _range(self, index: slice) -> range:
        return range(self.global_batch)[index]

    def assemble(self, rows: tuple[int, ...], windows: npt.NDArray[np.uint8]) -> Batch:
        """The global batch, of which this process has `windows`: uint8 (len(rows), seq_len + 1)."""
        tokens = windows.astype(np.int32)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.sharding.is_fully_addressable:  # all rows are here: one copy, no calls for parts
            inputs, targets = jax.device_put((inputs, targets), self.sharding)
            return {"inputs": inputs, "targets": targets}
        return {"inputs": self._global(rows, inputs), "targets": self._global(rows, targets)}

    def _global(self, rows: tuple[int, ...], local: npt.NDArray[np.int32]) -> jax.Array:
        return jax.make_array_from_callback(self.shape, self.sharding, self._shards_of(rows, local))

    def _shards_of(
        self, rows: tuple[int, ...], local: npt.NDArray[np.int32]
    ) -> Callable[[tuple[slice, ...] | None], npt.NDArray[np.int32]]:
        """Cuts one device's part, given as slices of the global array, out of the local rows."""

        def cut(index: tuple[slice, ...] | None) -> npt.NDArray[np.int32]:
            assert index is not None
            held = self._range(index[0])
            start = rows.index(held.start)  # held rows are consecutive, here as there
            return local[start : start + len(held), index[1]]

        return cut
