"""Trees of arrays as MessagePack, in the dialect of Flax.

Extension 1 is an array, `(shape, dtype, bytes)` as MessagePack again; 2 a complex number; 3 a
scalar of numpy.  A big array is a dict of a mark, its shape and its pieces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from shardflax.core.errors import FlaxError

MAX_CHUNK_SIZE = 2**30  # bytes
# MessagePack itself ends at 2**32 bytes.  Flax cuts no arrays in lists, and does not expect it.
_MAX_IN_LIST = 2**32 - 2**10

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"

_MAX_DEPTH = 200  # levels of dicts and lists; Python ends at 1000 calls

Path = tuple[str, ...]


class MsgpackError(FlaxError, ValueError, TypeError):
    """Something cannot be written as MessagePack, or bytes cannot be read as such.

    >>> print(MsgpackError("no tuples", ("params", "w")))
    at params/w: no tuples
    """

    def __init__(self, what: str, path: Path = ()) -> None:
        super().__init__(f"at {'/'.join(path) or 'the top'}: {what}")


# --- writing


def pack(tree: Any, limit: int, in_place: bool) -> bytes:
    """`tree` as bytes, arrays of more than `limit` bytes in pieces."""
    packed = msgpack.packb(_plain(tree, (), limit, in_place), default=_extension, strict_types=True)
    assert packed is not None
    return packed


def _plain(x: Any, path: Path, limit: int, in_place: bool) -> Any:
    """`x` with arrays as numpy's, the big ones in pieces, and nothing that cannot be written."""
    _check_depth(path)
    if type(x) is dict:
        for key in x:
            if not isinstance(key, str | int):
                raise MsgpackError(f"a key is a string or an int; got {key!r}.", path)
        # Flax makes its copy through jax.tree, which sorts.
        keys = x if in_place else sorted(x, key=lambda key: (isinstance(key, str), key))
        items = {k: _plain(x[k], (*path, str(k)), limit, in_place) for k in keys}
        if in_place:
            x.update(items)
        return items
    if type(x) is list:
        limit = max(limit, _MAX_IN_LIST)
        listed = [_plain(v, (*path, str(i)), limit, in_place) for i, v in enumerate(x)]
        if in_place:
            x[:] = listed
        return listed
    if isinstance(x, jax.Array | np.ndarray):
        return _pieces(_on_host(x, path), limit)
    return _checked_scalar(x, path)


def _check_depth(path: Path) -> None:
    if len(path) > _MAX_DEPTH:
        raise MsgpackError(f"more than {_MAX_DEPTH} levels.", (*path[:3], "..."))


def _checked_scalar(x: Any, path: Path) -> Any:
    if isinstance(x, np.generic):
        return _on_host(x, path)[()]
    if type(x) is int and not -(2**63) <= x < 2**64:
        raise MsgpackError(f"an int has 64 bits at most; got {x}.", path)
    if x is None or type(x) in (bool, int, float, complex, str, bytes):
        return x
    raise MsgpackError(
        f"dicts, lists, arrays, numbers, strings, bytes and None can be written; got "
        f"{type(x).__name__}. Use to_bytes(tree), or msgpack_serialize(to_state_dict(tree)).",
        path,
    )


def _on_host(x: Any, path: Path) -> np.ndarray:
    if isinstance(x, jax.Array):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise MsgpackError("a key: write jax.random.key_data(key) in its place.", path)
        if not x.is_fully_addressable:
            raise MsgpackError("an array of which other processes hold parts.", path)
    array = np.asarray(x)
    if _dtype(array.dtype.name) is None:
        raise MsgpackError(f"arrays of dtype {array.dtype} cannot be written.", path)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _pieces(array: np.ndarray, limit: int) -> Any:
    if array.nbytes <= limit:
        return array
    flat, step = array.reshape(-1), max(1, limit // array.itemsize)
    pieces = [flat[i : i + step] for i in range(0, flat.size, step)]
    return {_CHUNKED: True, "shape": _numbered(array.shape), "chunks": _numbered(pieces)}


def _numbered(items: Any) -> dict[str, Any]:
    return {str(i): item for i, item in enumerate(items)}


def _extension(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return msgpack.ExtType(_ARRAY, _array_bytes(x))
    if isinstance(x, np.generic):
        return msgpack.ExtType(_SCALAR, _array_bytes(np.asarray(x)))
    assert isinstance(x, complex)
    return msgpack.ExtType(_COMPLEX, msgpack.packb((x.real, x.imag)))


def _array_bytes(array: np.ndarray) -> Any:
    return msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)


# --- reading


def unpack(data: bytes) -> Any:
    """The tree that was packed."""
    try:
        tree = msgpack.unpackb(data, ext_hook=_read_extension, raw=False, strict_map_key=False)
        return _whole(tree, ())
    except MsgpackError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        found = f"{type(error).__name__}: {error}"
        raise MsgpackError(f"these bytes are no MessagePack of a tree ({found}).") from error


def _read_extension(code: int, data: bytes) -> Any:
    if code == _ARRAY:
        return _read_array(data)
    if code == _SCALAR:
        return _read_array(data)[()]
    if code != _COMPLEX:
        raise MsgpackError(f"extension {code} is none of 1 (array), 2 (complex), 3 (scalar).")
    real, imag = msgpack.unpackb(data)
    return complex(real, imag)


def _read_array(data: bytes) -> np.ndarray:
    shape, name, buffer = msgpack.unpackb(data, raw=False)
    dtype = _dtype(name)
    if dtype is None:
        raise MsgpackError(f"an array of dtype {name!r}, which cannot be read.")
    if len(buffer) != _size(shape) * dtype.itemsize:
        raise MsgpackError(f"an array of shape {shape} and dtype {name} in {len(buffer)} bytes.")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _size(shape: Any) -> int:
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise MsgpackError(f"a shape is a list of sizes; got {shape!r}.")
    return math.prod(shape)


def _dtype(name: Any) -> np.dtype | None:
    """The dtype of a name, if it is one of plain numbers: never objects, strings, records."""
    if isinstance(name, str) and _NUMBERS.fullmatch(name):
        try:
            return np.dtype(getattr(jnp, name, None) or name)
        except TypeError:
            return None
    return None


_NUMBERS = re.compile(
    r"bool|u?int(2|4|8|16|32|64)|(b?float\d+(_\w+)?)|complex(64|128)|(datetime|timedelta)64(\[\w+\])?"
)


def _whole(x: Any, path: Path) -> Any:
    """`x` with the pieces of big arrays put together."""
    _check_depth(path)
    if isinstance(x, dict):
        if _CHUNKED in x:
            return _joined(x, path)
        return {key: _whole(value, (*path, str(key))) for key, value in x.items()}
    if isinstance(x, list):
        return [_whole(value, (*path, str(i))) for i, value in enumerate(x)]
    return x


def _joined(x: dict[str, Any], path: Path) -> np.ndarray:
    shape, chunks = (_in_order(x.get(name), path) for name in ("shape", "chunks"))
    if not chunks or not all(isinstance(c, np.ndarray) and c.ndim == 1 for c in chunks):
        raise MsgpackError("the pieces of a big array are arrays of one dim.", path)
    if len({c.dtype for c in chunks}) > 1 or sum(c.size for c in chunks) != _size(shape):
        raise MsgpackError(f"the pieces of a big array do not make the shape {shape}.", path)
    return np.concatenate(chunks).reshape(shape)


def _in_order(items: Any, path: Path) -> list[Any]:
    if not isinstance(items, Mapping) or set(items) != {str(i) for i in range(len(items))}:
        raise MsgpackError("the parts of a big array are numbered from 0.", path)
    return [items[str(i)] for i in range(len(items))]
