"""Property: any tree of storable leaves comes back equal."""

import dataclasses
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardflax.ckpt import CheckpointManager

DTYPES = [
    "bool",
    "int8",
    "int32",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "float8_e5m2",
    "int4",
    "uint4",
    "complex64",
]


class Pair(NamedTuple):
    """A named tuple."""

    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    """A dataclass with a static field."""

    value: Any
    name: str = dataclasses.field(metadata={"static": True})


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """A JAX or numpy array of up to three small dims, some of them 0."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    values = np.arange(int(np.prod(shape)) % 128).astype(np.float32)
    array = np.resize(values, shape).astype(dtype)
    return jnp.asarray(array) if draw(st.booleans()) else array


leaves = (
    arrays()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.text(max_size=3)
    | st.none()
    | st.integers(0, 9).map(jax.random.key)
)
names = st.text("ab./ 0é%", max_size=3)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.dictionaries(names, inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.builds(Node, inner, st.just("n"))
    ),
    max_leaves=6,
)


def form(leaf: Any) -> Any:
    """Everything about a leaf that must come back."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, jax.Array | np.ndarray):
        return isinstance(leaf, jax.Array), leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()
    return type(leaf), leaf


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(tree=trees)
def test_round_trip(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, CheckpointManager(folder) as manager:
        manager.save(1, tree)
        got = manager.restore(tree).state
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert list(map(form, jax.tree.leaves(got))) == list(map(form, jax.tree.leaves(tree)))
