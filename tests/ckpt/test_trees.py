"""Property: any tree of storable leaves comes back equal, whatever the layouts on both sides."""

import dataclasses
import functools
import math
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardflax.ckpt import CheckpointManager

SIX = [name for name in dir(ml_dtypes) if name.startswith("float6_")]
HOST_ONLY = ["int64", "uint64", "float64", "complex128", ">i4", ">f8", *SIX]
"""What JAX would narrow, or XLA does not know: numpy arrays alone have it."""
DTYPES = [
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "int2", "int4", "uint4"),
    *("float16", "bfloat16", "float32", "complex64"),
    *(name for name in dir(ml_dtypes) if name.startswith(("float8", "float4"))),
]
MESHES = [((8,), "a"), ((2, 4), "ab"), ((4, 2), "ab"), ((2, 2, 2), "abc"), ((3,), "a"), ((1,), "a")]


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


@functools.cache
def mesh_of(number: int) -> Mesh:
    """A mesh of the list; not all of them take all devices."""
    shape, axes = MESHES[number]
    devices = np.array(jax.devices()[-math.prod(shape) :]).reshape(shape)
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """A JAX or numpy array of up to three small dims, some of them 0."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 7, 8]), max_size=3))
    name = draw(st.sampled_from(DTYPES + HOST_ONLY))
    dtype = np.dtype(name) if name[0] == ">" else jnp.dtype(name)
    values = np.arange(math.prod(shape)) * 7 % 128 - 40 * (dtype.kind not in "bu")
    array = values.astype(np.float32).astype(dtype).reshape(shape)
    if name in HOST_ONLY or draw(st.booleans()):
        return array[()] if not shape and draw(st.booleans()) else array
    return jnp.asarray(array)


@st.composite
def keys(draw: st.DrawFn) -> Any:
    """One key or an array of them, of any generator."""
    key = jax.random.key(
        draw(st.integers(0, 9)), impl=draw(st.sampled_from(["threefry2x32", "rbg"]))
    )
    return jnp.broadcast_to(key, draw(st.sampled_from([(), (8,), (0, 2)])))


leaves = (
    arrays()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.complex_numbers(allow_nan=False)
    | st.booleans()
    | st.text(max_size=3)
    | st.none()
    | keys()
)
names = st.text("ab./ 0é%", max_size=3)
OPTIMIZERS = [optax.adam(1e-3), optax.sgd(0.1, momentum=0.9), optax.adafactor(1e-3), optax.sgd(1.0)]


@st.composite
def optimized(draw: st.DrawFn) -> Any:
    """Parameters, and the state of an optimizer for them."""
    shape = draw(st.sampled_from([(4, 8), (8,), (6, 2, 2)]))
    params = {"w": jnp.asarray(np.arange(math.prod(shape), dtype=np.float32).reshape(shape))}
    return params, OPTIMIZERS[draw(st.integers(0, len(OPTIMIZERS) - 1))].init(params)


trees = st.recursive(
    leaves | optimized(),
    lambda inner: (
        st.dictionaries(names, inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.builds(Node, inner, st.just("n"))
    ),
    max_leaves=6,
)


def sharding_of(draw: Any, shape: tuple[int, ...]) -> NamedSharding:
    """Some mesh, and axes that divide the dims, one for each or both for one."""
    mesh = mesh_of(draw(st.integers(0, len(MESHES) - 1)))
    free, spec = list(mesh.axis_names), []
    for size in shape:
        taken: list[str] = []
        for _ in range(draw(st.integers(0, 2))):
            parts = math.prod(mesh.shape[axis] for axis in taken)
            fits = [axis for axis in free if size % (parts * mesh.shape[axis]) == 0]
            if fits:
                taken.append(draw(st.sampled_from(fits)))
                free.remove(taken[-1])
        spec.append(tuple(taken))
    return NamedSharding(mesh, PartitionSpec(*spec))


def laid_out(draw: Any, leaf: Any) -> Any:
    """A leaf in some layout, if it is an array of JAX: sharded, or as it was."""
    if not isinstance(leaf, jax.Array) or draw(st.integers(0, 3)) == 0:
        return leaf
    return jax.device_put(leaf, sharding_of(draw, leaf.shape))


def target_of(draw: Any, leaf: Any) -> Any:
    """The same leaf as the target of a restore, in some other layout, its value unknown."""
    leaf = laid_out(draw, leaf)
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else leaf


def form(leaf: Any) -> Any:
    """Everything about a leaf that must come back."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        value = np.asarray(leaf)
        native = value.astype(value.dtype.newbyteorder("="))
        return isinstance(leaf, jax.Array), native.dtype, leaf.shape, native.tobytes()
    return type(leaf), repr(leaf)


@settings(max_examples=40)
@given(tree=trees.filter(lambda tree: tree is not None), data=st.data())
def test_whatever_is_saved_comes_back_in_whatever_layout(tree: Any, data: st.DataObject) -> None:
    saved = jax.tree.map(lambda leaf: laid_out(data.draw, leaf), tree)
    target = jax.tree.map(lambda leaf: target_of(data.draw, leaf), tree)
    with tempfile.TemporaryDirectory() as folder, CheckpointManager(folder) as manager:
        manager.save(1, saved)
        got = manager.restore(target).state
        host = manager.restore().state
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert list(map(form, jax.tree.leaves(got))) == list(map(form, jax.tree.leaves(tree)))
    for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(target), strict=True):
        if isinstance(wanted, jax.ShapeDtypeStruct):
            assert leaf.sharding == wanted.sharding
    assert len(jax.tree.leaves(host)) == len(jax.tree.leaves(tree))
