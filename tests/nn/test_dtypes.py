"""Promotion: half precision, integers and weak types become what they become in Flax."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen.dtypes as theirs
import jax.numpy as jnp
import numpy as np
import pytest

from shardflax.core.errors import FlaxError
from shardflax.nn import dtypes

NARROW, HALF, WIDE = (jnp.ones(2, d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
INTS, COMPLEX = jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)
ARGUMENTS: list[tuple[Any, ...]] = [
    *itertools.combinations([NARROW, HALF, WIDE, INTS, COMPLEX], 2),
    (NARROW,),
    (INTS,),
    (NARROW, None, 2.0),
    (1, 2),
    (1.5, None),
    (np.ones(2, np.float32), HALF),
    (np.ones(2), INTS),
    (jnp.asarray(2.0), NARROW),
    (True, NARROW),
]
DTYPES = [None, jnp.bfloat16, jnp.float32, jnp.complex64, jnp.int32]


def outcome(module: Any, args: Any, dtype: Any, inexact: bool) -> Any:
    """The dtypes of what is promoted, and those it is said to have; or that it is an error."""
    try:
        found = module.promote_dtype(*args, dtype=dtype, inexact=inexact)
        said = module.canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
    except ValueError:
        return "error"
    kinds = [None if x is None else (jnp.shape(x), x.dtype.name) for x in found]
    return kinds, jnp.dtype(said).name


@pytest.mark.parametrize("inexact", [True, False])
@pytest.mark.filterwarnings("ignore:Casting complex values:numpy.exceptions.ComplexWarning")
def test_promotion_is_flax_s(inexact: bool) -> None:
    for args, dtype in itertools.product(ARGUMENTS, DTYPES):
        ours, expected = (outcome(m, args, dtype, inexact) for m in (dtypes, theirs))
        assert ours == expected, (args, dtype)


def test_integers_are_not_what_is_computed_in() -> None:
    with pytest.raises(FlaxError, match=r"Dtype must be inexact, found .*int32"):
        dtypes.promote_dtype(WIDE, dtype=jnp.int32)
