"""Small leaves that are alike, taken out of the caller's hands many at once.

JAX needs some microseconds for each part of an array that it hands out: of 2,000 leaves on eight
devices, there are 16,000.  So leaves of one shape, dtype and layout are put together by a program
that copies them on their devices, where they are: starting it takes about as long as handing out
three of them.  It is compiled in the background, when a plan has shown that it is used again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

__all__ = ["MANY", "Kind", "Pack", "Row", "kinds", "pack"]

T = TypeVar("T")
MANY = 32
"""Leaves that are put together."""
_MOST_BYTES = 64 << 10
"""Of a leaf; handing out larger ones takes little of what writing them does."""
_MOST_KINDS = 16
_WORDS: dict[int, Any] = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
"""What the program copies, by bytes of an element: numbers as such might change, NaNs above all."""


@dataclasses.dataclass(eq=False)
class Kind:
    """What leaves have in common that are put together, and the program, once there is one.

    `often` says that such leaves were saved before, `failed` that there is no such program.

    >>> x = jnp.arange(3.0)
    >>> kind = Kind(x.shape, x.dtype, x.sharding)
    >>> kind.compile()
    >>> np.asarray(Row(Pack(kind.program([x] * MANY), x.dtype), 5)).tolist()
    [0.0, 1.0, 2.0]
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: Sharding
    program: Callable[[Sequence[jax.Array]], jax.Array] | None = None
    often: bool = False
    failed: bool = False

    def compile(self) -> None:
        """Makes the program, unless it is there, or cannot be made."""
        if self.program is None and not self.failed:
            try:
                self.program = _program(self.shape, self.dtype, self.sharding)
            except Exception:  # leaves are handed out one by one then
                self.failed = True


@functools.lru_cache(maxsize=64)
def _program(shape: tuple[int, ...], dtype: np.dtype[Any], sharding: Any) -> Any:
    """A program that stacks arrays; each device has its parts of them."""
    one = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    if isinstance(sharding, NamedSharding):
        out: Any = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    else:
        out = sharding
    word = _WORDS[dtype.itemsize]

    def stacked(leaves: Sequence[jax.Array]) -> jax.Array:
        return jnp.stack([jax.lax.bitcast_convert_type(leaf, word) for leaf in leaves])

    return jax.jit(stacked, out_shardings=out).lower([one] * MANY).compile()


class Pack:
    """Leaves of one kind that were put together; `array` becomes numpy's when it is looked at."""

    def __init__(self, array: Any, dtype: np.dtype[Any]) -> None:
        self.array: Any = array
        self._dtype = dtype

    @functools.cached_property
    def rows(self) -> np.ndarray[Any, Any]:
        """One leaf after the other; waits for them."""
        self.array = np.asarray(self.array)
        return self.array.view(self._dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One leaf of a pack, which numpy can look at as it can at an array of JAX."""

    pack: Pack
    index: int

    def block_until_ready(self) -> None:
        """Waits until the caller's array is no longer needed."""
        array = self.pack.array
        if not isinstance(array, np.ndarray):
            array.block_until_ready()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """The values."""
        return np.array(self.pack.rows[self.index], dtype, copy=copy)


def kinds(leaves: Sequence[Any]) -> list[Kind | None]:
    """The kind of each leaf; None for those of which there are too few, or that are too large.

    >>> found = kinds([jnp.ones(2)] * MANY + [jnp.ones(3)])
    >>> found[0] is found[1], found[-1]
    (True, None)
    """
    keys = [_key(leaf) for leaf in leaves]
    counts = collections.Counter(key for key in keys if key is not None)
    often = [key for key, n in counts.most_common(_MOST_KINDS) if n >= MANY]
    found: dict[Hashable, Kind] = {key: Kind(*key) for key in often}
    return [found.get(key) for key in keys]


def _key(leaf: Any) -> tuple[Any, ...] | None:
    """Shape, dtype and layout of a leaf that can be packed."""
    # A program for the devices of several processes would have to be started by all of them.
    if not isinstance(leaf, jax.Array) or jax.process_count() > 1:
        return None
    dtype, sharding = leaf.dtype, leaf.sharding
    usual = sharding.memory_kind == next(iter(sharding.device_set)).default_memory().kind
    known = isinstance(sharding, SingleDeviceSharding) or (
        isinstance(sharding, NamedSharding) and sharding == _plain(sharding)
    )
    if not isinstance(dtype, np.dtype) or not known or not usual:
        return None
    words = dtype.itemsize in _WORDS and dtype.kind != "b" and dtype.name not in _PARTS_OF_BYTES
    return (leaf.shape, dtype, sharding) if words and leaf.nbytes <= _MOST_BYTES else None


def _plain(sharding: NamedSharding) -> NamedSharding:
    """The same axes and nothing else: no dims that are left open, or sums that are to be made."""
    spec = PartitionSpec(*sharding.spec)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


_PARTS_OF_BYTES = {"int4", "uint4", "int2", "uint2", "float4_e2m1fn"}


def pack(
    items: Sequence[T], kind_of: Callable[[T], Kind | None], leaf_of: Callable[[T], Any]
) -> tuple[list[tuple[Pack, Sequence[T]]], list[T]]:
    """Packs of what can be packed now, and the rest.

    >>> pack([1.0, 2.0], lambda item: None, lambda item: item)
    ([], [1.0, 2.0])
    """
    alike: dict[Kind | None, list[T]] = {None: []}
    for item in items:
        kind = kind_of(item)
        key = kind if kind is not None and kind.program is not None else None
        alike.setdefault(key, []).append(item)
    rest, packs = alike.pop(None), list[tuple[Pack, Sequence[T]]]()
    for kind, members in alike.items():
        assert kind is not None
        for part in _cut(members):
            array = _put_together(kind, [leaf_of(item) for item in part])
            if array is None:
                rest += part
            else:
                packs.append((Pack(array, kind.dtype), part))
    return packs, rest


def _cut(members: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(members), MANY):
        yield members[start : start + MANY]


def _put_together(kind: Kind, leaves: Sequence[jax.Array]) -> jax.Array | None:
    """The stack of some leaves; None if there are too few, or it cannot be made of these."""
    if len(leaves) < MANY // 2 or kind.program is None:
        return None
    try:
        return kind.program([*leaves, *[leaves[-1]] * (MANY - len(leaves))])
    except (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
        # Another layout in memory, say, which JAX does not support, or a device that is full: the
        # leaves are then copied one by one, as those that are alone.
        return None
