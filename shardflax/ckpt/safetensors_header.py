"""The header of a safetensors file, read strictly and written.

Eight bytes hold the length of the header, little-endian; then come the header in JSON and the data
of the tensors, without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NoReturn

import jax.numpy as jnp
import numpy as np

__all__ = ["CODES", "Header", "Tensor", "header_bytes", "read_header"]

CODES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
"""The dtypes of the format, and what numpy calls them."""
_CODE_OF = {name: code for code, name in CODES.items()}
_METADATA = "__metadata__"
_LENGTH = 8
_MOST = 32 << 20
"""Bytes of a header; 100,000 tensors need some 10 MB."""
_MOST_DIMS = 32


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor: numpy's name of its dtype, its shape, and where its data begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _itemsize(self.dtype)


@dataclasses.dataclass(frozen=True)
class Header:
    """The tensors of a file by name, in the order of the header, and its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO) -> Header:
    """Reads the header of a file and checks it against the file's size.

    Raises ValueError for anything that the format does not allow: a length or an offset beyond the
    end, overlaps and gaps, shapes that do not fit the data, names that come twice.

    >>> import io
    >>> head, begins = header_bytes({"w": ("float32", (2,))}, {})
    >>> read_header(io.BytesIO(head + bytes(8))).tensors
    {'w': Tensor(dtype='float32', shape=(2,), begin=64)}
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH), "little")
    if size < _LENGTH or length > size - _LENGTH:
        raise ValueError(f"it is cut short: a header of {length:,} bytes in {size:,}")
    if length > _MOST:
        raise ValueError(f"its header has {length:,} bytes; {_MOST:,} are the most")
    body = _parsed(file.read(length))
    metadata = body.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its metadata are not strings")
    start = _LENGTH + length
    tensors = {name: _tensor(name, entry, start) for name, entry in body.items()}
    _check_cover(tensors, start, size)
    return Header(tensors, metadata)


def _parsed(text: bytes) -> dict[str, Any]:
    """The JSON object of the header."""
    if text[:1] != b"{":
        raise ValueError("its header is not a JSON object")
    try:
        body = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_no, parse_float=_no
        )
        json.dumps(body, ensure_ascii=False).encode()  # lone surrogates
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _no(text: str) -> NoReturn:
    raise ValueError(f"a number {text[:20]}, where there are only integers")


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    """One entry, checked by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    code = entry["dtype"]
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"tensor {name!r} has dtype {str(code)[:40]!r}; known: {', '.join(CODES)}")
    shape, offsets = _counts(name, entry["shape"]), _counts(name, entry["data_offsets"])
    if len(shape) > _MOST_DIMS or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has {len(shape)} dims and {len(offsets)} offsets")
    found = Tensor(CODES[code], shape, start + offsets[0])
    if offsets[1] - offsets[0] != found.nbytes:
        raise ValueError(
            f"tensor {name!r}, {found.dtype}{list(shape)}, needs {found.nbytes:,} bytes, "
            f"but has offsets {list(offsets)}"
        )
    return found


def _counts(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError(f"tensor {name!r} has a size or an offset that is none")
    return tuple(value)


def _check_cover(tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """Raises unless the tensors lie one after the other, up to the end of the file."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != at:
            what = "overlaps another one" if tensor.begin < at else "comes after a gap"
            raise ValueError(f"tensor {name!r} {what}")
        at += tensor.nbytes
    if at != size:
        raise ValueError(f"it has {size:,} bytes; its tensors end at {at:,}")


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of tensors given as (dtype, shape), and where each one's data begin.

    Data come in the order of item sizes, the largest first, so that all are aligned.  Raises
    KeyError for a dtype that the format lacks.

    >>> header_bytes({"a": ("int8", (3,)), "b": ("float32", ())}, {})[1]
    {'b': 120, 'a': 124}
    """
    body: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    at = 0
    for name in sorted(tensors, key=lambda n: (-_itemsize(tensors[n][0]), n)):
        dtype, shape = tensors[name]
        end = at + math.prod(shape) * _itemsize(dtype)
        body[name] = {"dtype": _CODE_OF[dtype], "shape": shape, "data_offsets": [at, end]}
        offsets[name], at = at, end
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)
    begin = _LENGTH + len(text)
    head = len(text).to_bytes(_LENGTH, "little") + text
    return head, {name: begin + offset for name, offset in _in(offsets)}


def _in(offsets: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    """In the order of the data."""
    return sorted(offsets.items(), key=lambda item: item[1])


def _itemsize(dtype: str) -> int:
    return np.dtype(jnp.dtype(dtype)).itemsize
