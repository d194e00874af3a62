"""Which dtype a computation runs in, by the rule of Linen: `dtype` if given, else promotion."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardflax.nn.errors import DtypeError
from shardflax.nn.policy import Policy
from shardflax.nn.types import Dtype

__all__ = ["canonicalize_dtype", "cast", "promote_dtype"]

# What arrays of one of these alone promote to is known without asking.
_FLOATS = frozenset(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))


def canonicalize_dtype(*args: Any, dtype: Dtype | None = None, inexact: bool = True) -> Dtype:
    """The dtype that `args` are computed in: `dtype`, or what they promote to together.

    Arguments that are `None` do not count; of a `Policy` its `compute` dtype does.  With `inexact`,
    integers promote to floating point, and an integer `dtype` is a `DtypeError`.

    >>> import jax.numpy as jnp
    >>> str(canonicalize_dtype(jnp.ones(2, jnp.bfloat16), None, jnp.ones(2)))
    'float32'
    >>> canonicalize_dtype(jnp.arange(2), dtype=jnp.bfloat16)
    <class 'jax.numpy.bfloat16'>
    """
    if type(dtype) is Policy:
        dtype = dtype.compute
    if dtype is None:
        found = {getattr(getattr(a, "aval", a), "dtype", None) for a in args if a is not None}
        if len(found) == 1 and found <= _FLOATS:
            return found.pop()
        dtype = jnp.result_type(
            *[a if hasattr(a, "dtype") else jnp.asarray(a) for a in _given(args)]
        )
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jax.dtypes.canonicalize_dtype(jnp.float32), dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise DtypeError(dtype)
    return dtype


def promote_dtype(*args: Any, dtype: Dtype | None = None, inexact: bool = True) -> list[Any]:
    """`args` as arrays of one dtype: `dtype`, or what they promote to together.

    `None` stays `None`.  See `canonicalize_dtype` for `inexact` and the error.

    >>> import jax.numpy as jnp
    >>> x, bias = promote_dtype(jnp.ones(2, jnp.bfloat16), None, dtype=jnp.float16)
    >>> x.dtype, bias
    (dtype('float16'), None)
    """
    if _settled(args, dtype):
        return [*args]
    dtype = canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
    return [None if a is None else cast(a, dtype) for a in args]


def _settled(args: tuple[Any, ...], dtype: Any) -> bool:
    """True for arrays of JAX that all have one floating dtype, the given one: the usual case."""
    found = dtype
    for a in args:
        if a is not None:
            aval = getattr(a, "aval", None)
            if aval is None or aval.weak_type:
                return False
            if found is None:
                found = aval.dtype
            elif aval.dtype != found:
                return False
    return isinstance(found, np.dtype) and found in _FLOATS


def _given(args: tuple[Any, ...]) -> list[Any]:
    return [a for a in args if a is not None]


def cast(x: Any, dtype: Dtype) -> Any:
    """`jnp.asarray(x, dtype)`, without its cost where `x` is what it would return.

    >>> cast(1, jnp.bfloat16).dtype
    dtype(bfloat16)
    """
    # Only arrays of JAX have an aval; to ask that is much cheaper than to ask a tracer.
    aval = getattr(x, "aval", None)
    if aval is not None and not aval.weak_type and aval.dtype == dtype:
        return x
    return jnp.asarray(x, dtype)
