"""Arrays in zarr version 3, as bytes: metadata, keys of chunks, and chunks with their checksum."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np

__all__ = [
    "checksum_of", "chunk_key", "decode", "encode", "filled_up", "metadata", "metadata_file",
    "storable",
]  # fmt: skip

_LEVEL = 1
"""Of compression: higher ones take much longer and save little of what models are made of."""
_CHECKSUM = 4
"""Bytes of a CRC-32C at the end of each chunk."""

_DTYPES = frozenset(
    (
        *("bool", "int2", "int4", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64"),
        *("complex64", "complex128", "float8_e3m4", "float8_e4m3fn", "float8_e4m3fnuz"),
        *("float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
)
"""What TensorStore knows; others are stored as the bytes that they are."""


def storable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that an array is stored with.

    >>> storable(np.dtype(">f4"))
    dtype('float32')
    """
    return dtype.newbyteorder("=") if dtype.name in _DTYPES else np.dtype(np.uint8)


@functools.lru_cache(maxsize=4096)
def _codecs(itemsize: int, codec: str | None) -> tuple[dict[str, Any], ...]:
    config = {"configuration": {"endian": "little"}} if itemsize > 1 else {}
    # The checksum is of what is stored, so that nothing damaged is ever decompressed.
    packed = [{"name": codec, "configuration": {"level": _LEVEL}}] if codec else []
    return ({"name": "bytes", **config}, *packed, {"name": "crc32c"})


def metadata(
    shape: Sequence[int], dtype: np.dtype[Any], chunk: Sequence[int], codec: str | None = None
) -> dict[str, Any]:
    """The metadata of an array; `codec` compresses its chunks.

    >>> metadata((4,), np.dtype("float32"), (2,))["chunk_grid"]["configuration"]
    {'chunk_shape': [2]}
    """
    return {
        "zarr_format": 3,
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": list(_codecs(dtype.itemsize, codec)),
        "fill_value": _zero(dtype),
    }


def _zero(dtype: np.dtype[Any]) -> Any:
    """A zero in JSON."""
    if dtype.kind == "c":
        return [0, 0]
    return False if dtype.kind == "b" else 0


@functools.lru_cache(maxsize=4096)
def metadata_file(
    shape: tuple[int, ...], dtype: np.dtype[Any], chunk: tuple[int, ...], codec: str | None = None
) -> bytes:
    """The file `zarr.json` of an array.

    >>> metadata_file((), np.dtype("bool"), ())[:30]
    b'{"zarr_format": 3, "shape": []'
    """
    return json.dumps({**metadata(shape, dtype, chunk, codec), "node_type": "array"}).encode()


def chunk_key(index: Sequence[int]) -> str:
    """The key of a chunk, below the array's.

    >>> chunk_key((1, 0)), chunk_key(())
    ('c/1/0', 'c')
    """
    return "/".join(["c", *map(str, index)])


def checksum_of(data: bytes | np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """The CRC-32C of some bytes, as it stands after them.

    >>> checksum_of(b"123456789").hex()
    '839206e3'
    """
    return google_crc32c.value(data).to_bytes(_CHECKSUM, "little")  # type: ignore[arg-type]


def filled_up(
    chunk: np.ndarray[Any, np.dtype[Any]], full: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[Any]]:
    """A chunk, with zeros where it is at the edge.

    >>> filled_up(np.ones(1), (2,))
    array([1., 0.])
    """
    if chunk.shape == full:
        return chunk
    filled = np.zeros(full, chunk.dtype)
    filled[tuple(map(slice, chunk.shape))] = chunk
    return filled


def encode(chunk: np.ndarray[Any, Any], full: tuple[int, ...]) -> bytes:
    """The bytes of a chunk and their checksum; a chunk at the edge is filled up with zeros.

    >>> encode(np.zeros(1, np.uint8), (2,))
    b'\\x00\\x00\\xd2wa\\xf1'
    """
    data = filled_up(chunk, full).tobytes()
    return data + checksum_of(data)


def decode(
    stored: bytes, dtype: np.dtype[Any], full: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[Any]]:
    """A chunk from its bytes; raises ValueError if they are not what was written.

    >>> decode(encode(np.arange(3), (3,)), np.dtype(int), (3,)).tolist()
    [0, 1, 2]
    """
    size = int(np.prod(full)) * dtype.itemsize
    if len(stored) != size + _CHECKSUM:
        raise ValueError(f"a chunk has {len(stored)} bytes instead of {size + _CHECKSUM}")
    data = stored[:size]
    if google_crc32c.value(data) != int.from_bytes(stored[size:], "little"):
        raise ValueError("the checksum of a chunk is wrong")
    return np.frombuffer(data, dtype).reshape(full)
