"""The chunks of an array as they are stored: plain, or compressed by TensorStore."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from shardflax.ckpt.plan import Stored
from shardflax.ckpt.regions import Box, chunks_in
from shardflax.ckpt.staging import Staged
from shardflax.ckpt.zarr import chunk_key, encode, metadata, metadata_file

__all__ = ["described", "stored_chunks", "whole"]

_Array = np.ndarray[Any, np.dtype[Any]]


def described(
    stored: Sequence[Stored | None], scalars: Sequence[tuple[Stored, Any]]
) -> Iterator[tuple[str, bytes]]:
    """The metadata of all arrays, and the scalars, by their keys.

    >>> list(described([None], []))
    []
    """
    for leaf in itertools.chain(stored, (leaf for leaf, _ in scalars)):
        if leaf is not None:
            content = metadata_file(leaf.shape, leaf.dtype, leaf.chunk, leaf.codec)
            yield f"{leaf.name}/zarr.json", content
    for leaf, value in scalars:
        yield f"{leaf.name}/{chunk_key(())}", encode(np.asarray(value, leaf.dtype), ())


def stored_chunks(leaf: Stored, box: Box, array: _Array) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """The indices of the chunks in a box, and their bytes with a checksum at the end.

    >>> import dataclasses
    >>> from shardflax.ckpt.plan import make_plan
    >>> plan, _ = make_plan({"w": np.arange(4000)})
    >>> leaf, box = plan.stored[0], Box((0,), (4000,))
    >>> [(_, plain)] = stored_chunks(leaf, box, np.arange(4000))
    >>> [(_, less)] = stored_chunks(dataclasses.replace(leaf, codec="zstd"), box, np.arange(4000))
    >>> len(plain), len(less) < len(plain)
    (32004, True)
    """
    if leaf.codec is None:
        for index, chunk in chunks_in(box, leaf.chunk):
            yield index, encode(array[chunk.within(box)], leaf.chunk)
    else:
        yield from _compressed(leaf, box, array)


def _compressed(leaf: Stored, box: Box, array: _Array) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """TensorStore writes to memory, on several threads."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    memory = {"driver": "memory", "path": "array/"}
    spec = {
        "driver": "zarr3",
        "kvstore": memory,
        "metadata": metadata(leaf.shape, leaf.dtype, leaf.chunk, leaf.codec),
        "store_data_equal_to_fill_value": True,
    }
    target: Any = ts.open(spec, open=True, assume_metadata=True, context=context).result()
    target[box.slices].write(array).result()
    keys: Any = ts.KvStore.open(memory, context=context).result()
    for index, _ in chunks_in(box, leaf.chunk):
        key = chunk_key(index)
        yield index, keys.read(key).result().value
        keys.write(key, None).result()


def whole(staged: Staged) -> _Array:
    """The values of a lot as one array, in the byte order of the machine."""
    arrays, lot = staged.arrays(), staged.lot
    if len(arrays) == 1:
        array = arrays[0].reshape(lot.box.shape)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    joined = np.empty(lot.box.shape, arrays[0].dtype)
    for piece, array in zip(lot.pieces, arrays, strict=True):
        joined[piece.box.within(lot.box)] = array
    return joined
