"""What a leaf is (`LeafSpec`), and when a saved one can become another.

Three kinds.  *array*: JAX and numpy arrays and numpy scalars.  *key*: typed PRNG keys, stored as
their uint32 data.  *python*: bool, int, float, complex and str, whose exact value is in the
manifest and whose nearest numpy form is among the arrays too, for other readers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from shardflax.ckpt.errors import CheckpointLeafError
from shardflax.ckpt.paths import Path, show

__all__ = ["Difference", "LeafSpec", "describe", "difference", "is_key", "is_plain", "key_words"]

_FAMILIES: dict[str, Any] = {
    "bool": jnp.bool_,
    "int": jnp.integer,
    "float": jnp.floating,
    "complex": jnp.complexfloating,
}
"""The dtypes that a Python scalar of each type may come from or go to."""


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """The kind, shape and dtype of one leaf, without its data.

    For kind "key", `dtype` is JAX's ("key<fry>") and `impl` the name of the generator.  For kind
    "python", `dtype` is the Python type's name and `value` its value.

    >>> describe(("w",), jnp.ones((2, 3)))
    LeafSpec(kind='array', shape=(2, 3), dtype='float32', impl=None, value=None)
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    impl: str | None = None
    value: bool | int | float | complex | str | None = None

    @property
    def on_disk(self) -> bool:
        """False for what only the manifest holds: no elements, huge ints, strings."""
        if self.kind != "python":
            return 0 not in self.shape
        if isinstance(self.value, str):
            return False
        return not isinstance(self.value, int) or -(2**63) <= self.value < 2**63

    @functools.cached_property
    def stored(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of the numpy array that holds the data."""
        if self.kind == "key":
            return (*self.shape, *key_words(self.impl)), np.dtype(np.uint32)
        if self.kind == "python":
            return (), np.asarray(self.value).dtype
        return self.shape, np.dtype(jnp.dtype(self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        shape, dtype = self.stored
        return math.prod(shape) * dtype.itemsize

    def __str__(self) -> str:
        """Shape and dtype as users read them: `float32[2,3]`, or `int (Python)`."""
        if self.kind == "python":
            return f"{self.dtype} (Python)"
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@functools.cache
def key_words(impl: str | None) -> tuple[int, ...]:
    """The shape of the uint32 data of one key of a generator.

    >>> key_words("threefry2x32")
    (2,)
    """
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    return tuple(key.shape)


def is_key(leaf: Any) -> bool:
    """True for an array of typed PRNG keys, abstract or not.

    >>> is_key(jax.random.key(0)), is_key(jnp.ones(2))
    (True, False)
    """
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(path: Path, leaf: Any) -> LeafSpec:
    """The spec of a leaf: an array, an abstract array, a key, a Python scalar or a string.

    Raises CheckpointLeafError for anything else, and for arrays that are traced.

    >>> describe(("step",), 3)
    LeafSpec(kind='python', shape=(), dtype='int', impl=None, value=3)
    """
    if isinstance(leaf, jax.core.Tracer):
        raise CheckpointLeafError(show(path), "it is being traced", "Save outside of jax.jit.")
    if isinstance(leaf, bool | int | float | complex | str) and not isinstance(leaf, np.generic):
        value = _exact(path, leaf)
        return LeafSpec("python", (), type(value).__name__, value=value)
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise CheckpointLeafError(
            show(path),
            f"it is a {type(leaf).__name__}, not an array, a number or a string",
            "Make it a static field (struct.field(pytree_node=False)) or pass it in `extras`.",
        )
    dtype: Any = leaf.dtype
    if isinstance(dtype, np.dtype):
        if not is_plain(dtype):
            raise CheckpointLeafError(
                show(path), f"its dtype is {dtype}", "Only numbers and bools can be stored."
            )
        return LeafSpec("array", tuple(leaf.shape), dtype.name)
    impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
    return LeafSpec("key", tuple(leaf.shape), str(dtype), impl=impl)


def _exact(path: Path, leaf: Any) -> bool | int | float | complex | str:
    """A Python scalar as one of the five types: the manifest knows no enum and no other subclass.

    Raises CheckpointLeafError for an int with more digits than Python reads.
    """
    if isinstance(leaf, str):
        return str.__str__(leaf)
    kinds: tuple[Any, ...] = (bool, int, float, complex)
    kind = next(kind for kind in kinds if isinstance(leaf, kind))
    most = sys.get_int_max_str_digits()
    if kind is int and most and leaf.bit_length() > 3 * most:
        raise CheckpointLeafError(
            show(path), f"it is an int of {leaf.bit_length():,} bits", "Store it as a string."
        )
    return kind(leaf)


@functools.cache
def is_plain(dtype: np.dtype[Any]) -> bool:
    """True for bools, and for numbers that are the same on every machine.

    >>> is_plain(np.dtype("bfloat16")), is_plain(np.dtype("S4")), is_plain(np.dtype("V4"))
    (True, False, False)
    """
    if dtype.kind in "OSUMmT" or dtype.fields is not None or dtype.name in _WIDE:
        return False
    try:
        return dtype.kind != "V" or jnp.dtype(dtype.name) == dtype  # of bfloat16, say
    except TypeError:
        return False


_WIDE = {"float128", "complex256", "longdouble", "clongdouble", "float96", "complex192"}
"""Dtypes whose bytes mean another thing on another machine."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Why a saved leaf cannot become a target leaf: "shape" or "dtype", and both sides.

    >>> Difference("dtype", "saved int32[], target float32[]").kind
    'dtype'
    """

    kind: str
    text: str


def difference(saved: LeafSpec, target: LeafSpec) -> Difference | None:
    """Why a saved leaf cannot become the target leaf exactly, or None if it can.

    >>> difference(LeafSpec("array", (2,), "float32"), LeafSpec("array", (3,), "float32")).text
    'saved float32[2], target float32[3]'
    >>> difference(LeafSpec("python", (), "int", value=3), LeafSpec("array", (), "int32"))
    """
    what = f"saved {saved}, target {target}"
    if saved.shape != target.shape:
        return Difference("shape", what)
    if "python" in (saved.kind, target.kind):
        return None if _python_fits(saved, target) else Difference("dtype", what)
    if (saved.kind, saved.dtype) != (target.kind, target.dtype):
        return Difference("dtype", what)
    return None


def _python_fits(saved: LeafSpec, target: LeafSpec) -> bool:
    """True if a Python scalar on either side meets a scalar of its own kind, without loss.

    A Python float may become an array of any floating dtype: it has no precision of its own.
    """
    if saved.kind == target.kind:
        return saved.dtype == target.dtype
    scalar, array = (saved, target) if saved.kind == "python" else (target, saved)
    if array.kind == "key" or scalar.dtype not in _FAMILIES:
        return False
    dtype = jnp.dtype(array.dtype)
    if not jnp.issubdtype(dtype, _FAMILIES[scalar.dtype]):
        return False
    if scalar is saved and isinstance(scalar.value, int) and scalar.dtype == "int":
        return bool(jnp.iinfo(dtype).min <= scalar.value <= jnp.iinfo(dtype).max)
    return True
