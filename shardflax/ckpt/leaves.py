"""What a leaf is (`LeafSpec`), how it is stored, and how it comes back.

Three kinds.  *array*: JAX and numpy arrays and numpy scalars.  *key*: typed PRNG keys, stored as
their uint32 data.  *python*: bool, int, float and complex, whose exact value is in the manifest
and whose nearest numpy form is among the arrays too, for other readers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from shardflax.ckpt.errors import CheckpointLeafError
from shardflax.ckpt.paths import Path, show

__all__ = ["Difference", "LeafSpec", "describe", "difference", "store"]

_FAMILIES = {
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
    value: bool | int | float | complex | None = None

    @property
    def on_disk(self) -> bool:
        """False for what only the manifest holds: arrays without elements, huge ints."""
        if self.kind == "python":
            return not isinstance(self.value, int) or -(2**63) <= self.value < 2**63
        return 0 not in self.shape

    def __str__(self) -> str:
        """Shape and dtype as users read them: `float32[2,3]`, or `int (Python)`."""
        if self.kind == "python":
            return f"{self.dtype} (Python)"
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def describe(path: Path, leaf: Any) -> LeafSpec:
    """The spec of a leaf: an array, an abstract array, a key or a Python scalar.

    Raises CheckpointLeafError for anything else, and for arrays that are traced or donated.

    >>> describe(("step",), 3)
    LeafSpec(kind='python', shape=(), dtype='int', impl=None, value=3)
    """
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return LeafSpec("python", (), type(leaf).__name__, value=leaf)
    if isinstance(leaf, jax.core.Tracer):
        raise CheckpointLeafError(show(path), "it is being traced", "Save outside of jax.jit.")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise CheckpointLeafError(
            show(path),
            f"it is a {type(leaf).__name__}, not an array or a number",
            "Make it a static field (struct.field(pytree_node=False)) or pass it in `extras`.",
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
        return LeafSpec("key", tuple(leaf.shape), str(leaf.dtype), impl=impl)
    if leaf.dtype.kind in "OSUMm":
        raise CheckpointLeafError(
            show(path), f"its dtype is {leaf.dtype}", "Only numbers and bools can be stored."
        )
    return LeafSpec("array", tuple(leaf.shape), leaf.dtype.name)


def store(path: Path, leaf: Any) -> Any:
    """The form of a leaf that goes to the writer.

    Host values are copied, so that the caller may change them right away.  JAX arrays that not
    every process holds a part of become host values: process 0 writes its own.
    """
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise CheckpointLeafError(
            show(path),
            "its buffer was deleted, most likely donated to a jitted function",
            "Save the state that the function returned.",
        )
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return leaf
    return np.array(leaf)


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
    if "key" in (saved.kind, target.kind):
        return False
    scalar, array = (saved, target) if saved.kind == "python" else (target, saved)
    dtype = jnp.dtype(array.dtype)
    if not jnp.issubdtype(dtype, _FAMILIES[scalar.dtype]):
        return False
    if scalar is saved and isinstance(scalar.value, int) and scalar.dtype == "int":
        return jnp.iinfo(dtype).min <= scalar.value <= jnp.iinfo(dtype).max
    return True
