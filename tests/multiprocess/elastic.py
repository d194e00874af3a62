"""A train state whose every number is known from its path, laid out under every preset.

This file is also a script: `elastic.py FOLDER` reads what `write` wrote, on the devices that there
are, under every preset; it has nothing of the values but their paths.
"""

import functools
import math
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardflax import partitioning
from shardflax.ckpt import CheckpointManager, CheckpointMismatchError
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.paths import leaves_by_path
from shardflax.partitioning import PRESETS, LogicallyPartitioned
from shardflax.training import TrainState

LAYERS = 2
LAYER: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "up": ((32, 64), ("embed", "mlp")),
    "query": ((32, 16, 3), ("embed", "heads", "head_dim")),
    "experts": ((16, 32, 5), ("expert", "expert_embed", "qkv")),
    "stages": ((16, 3), ("stage", "norm")),
    "scale": ((7,), ("norm",)),
}
EMBEDDING = (512, 1024), ("vocab", "vocab_embed")
"""Large enough to be read by TensorStore itself."""

# The axes of a mesh for each preset; the first has most of the devices.
AXES = {
    "dp": "data tensor",
    "zero1": "data tensor",
    "fsdp": "fsdp data",
    "hsdp": "fsdp data",
    "fsdp2d": "fsdp fsdp2",
    "tp_sp": "tensor data",
    "tp_embed": "tensor data",
    "fsdp_tp": "fsdp tensor",
    "cp": "context data",
    "ep": "expert data",
    "ep_as_cp": "expert data",
    "cp_as_ep": "context data",
    "ep_as_dp": "expert data",
    "pp": "stage data",
    "decode": "tensor expert",
}
SAVED = {1: True, 2: False}
"""Whether the layers of a step are scanned."""


def mesh_of(preset: str, devices: int) -> Any:
    """A mesh of two axes over all devices."""
    first, second = AXES[preset].split()
    few = 2 if devices > 1 else 1
    return partitioning.make_mesh(f"{first}={devices // few},{second}={few}")


def init(scan: bool, dtype: Any) -> dict[str, Any]:
    """The state: parameters with names, those of Adam, a key; its numbers are of no use."""

    def made(shape: tuple[int, ...], names: tuple[str, ...], stack: bool) -> Any:
        shape, names = ((LAYERS, *shape), ("layers", *names)) if stack else (shape, names)
        kind = jnp.bfloat16 if names[-1] == "head_dim" else dtype
        return LogicallyPartitioned(jnp.zeros(shape, kind), names)

    layer = {name: made(*about, stack=scan) for name, about in LAYER.items()}
    layers: Any = {"layers": layer} if scan else {f"layers_{i}": layer for i in range(LAYERS)}
    params = {"decoder": layers, "embedding": made(*EMBEDDING, stack=False)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    return {"train": state, "key": jax.random.key(0)}


def abstract(preset: str, scan: bool, dtype: Any = jnp.float32) -> Any:
    """The state as shapes and shardings."""
    return partitioning.abstract_layout(
        functools.partial(init, scan, dtype),
        mesh=mesh_of(preset, jax.device_count()),
        rules=partitioning.preset(preset),
    ).abstract


@functools.cache
def content(path: LeafPath, shape: tuple[int, ...], dtype: str) -> Any:
    """The value of a leaf; that of scanned layers is the stack of the single ones."""
    if "layers" in path:
        at = path.index("layers")
        single = [(*path[:at], f"layers_{i}", *path[at + 1 :]) for i in range(LAYERS)]
        return np.stack([content(one, shape[1:], dtype) for one in single])
    rng = np.random.default_rng(zlib.crc32("/".join(path).encode()))
    return np.asarray(rng.integers(0, 2**16, shape), jnp.dtype(dtype))


def words_of(path: LeafPath, leaf: Any) -> tuple[Any, bool]:
    """What the buffers of a leaf hold, and whether it is a key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return content(path, (*leaf.shape, 2), "uint32"), True
    return content(path, tuple(leaf.shape), leaf.dtype.name), False


def filled(target: Any) -> Any:
    """The state with its values, each process making its own part."""
    made = []
    for path, leaf in leaves_by_path(target).items():
        value, key = words_of(path, leaf)
        array = jax.make_array_from_callback(
            value.shape, leaf.sharding, lambda index, value=value: value[index]
        )
        made.append(jax.random.wrap_key_data(array) if key else array)
    return jax.tree.unflatten(jax.tree.structure(target), made)


def check(state: Any, target: Any, where: Any) -> None:
    """Every bit that this process holds, and where it holds it."""
    assert jax.tree.structure(state) == jax.tree.structure(target), where
    for (path, want), got in zip(
        leaves_by_path(target).items(), jax.tree.leaves(state), strict=True
    ):
        value, key = words_of(path, want)
        assert (got.dtype, got.sharding) == (want.dtype, want.sharding), (where, path)
        data = jax.random.key_data(got) if key else got
        for shard in data.addressable_shards:
            same = np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
            assert same, (where, path, shard.index)


def write(folder: Path) -> None:
    """Two steps under fsdp_tp: scanned layers, and single ones."""
    assert set(AXES) == set(PRESETS)
    with CheckpointManager(folder, timeout=300) as manager:
        for step, scan in SAVED.items():
            manager.save(step, filled(abstract("fsdp_tp", scan)), metrics={"loss": step})
        manager.wait()
        # Of what is cut over all devices, each process reads its own part and no more.
        target = abstract("fsdp_tp", scan=True)
        with pytest.MonkeyPatch.context() as patch:
            taken = counted(patch)
            check(manager.restore(target, step=1).state, target, "fsdp_tp")
        needed, total = map(sum, zip(*map(sizes, jax.tree.leaves(target["train"])), strict=True))
        assert needed < 0.9 * total and needed * 0.9 < sum(taken) < needed * 1.05, (needed, taken)


def sizes(leaf: Any) -> tuple[int, int]:
    """How many bytes of a leaf this process holds, each once, and how many there are."""
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return len(set(map(str, indices))) * part, leaf.size * leaf.dtype.itemsize


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of files with arrays from now on."""
    taken: list[int] = []
    preadv = os.preadv

    def noted(*args: Any) -> int:
        taken.append(preadv(*args))
        return taken[-1]

    patch.setattr(os, "preadv", noted)
    return taken


def read(folder: Path) -> None:
    """Every preset reads one of the steps, as it is or with its layers stacked or cut, in turn."""
    with CheckpointManager(folder, read_only=True, timeout=300) as manager:
        for number, preset in enumerate(AXES):
            step, restack = 1 + number // 2 % 2, bool(number % 2)
            target = abstract(preset, scan=SAVED[step] ^ restack)
            restored = manager.restore(target, step=step)
            check(restored.state, target, (preset, step))
            assert bool(restored.report.restacked) == restack
        half = abstract("fsdp", scan=True, dtype=jnp.bfloat16)
        with pytest.raises(CheckpointMismatchError, match=r"saved float32.*, target bfloat16"):
            manager.restore(half, step=1)
        restored = manager.restore(half, step=1, cast="train").state
        got = restored["train"].params["embedding"]
        path = ("train", "params", "embedding")
        value = content(path, EMBEDDING[0], "float32").astype(jnp.bfloat16)
        for shard in got.addressable_shards:
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
        assert (
            got.dtype == jnp.bfloat16 and got.sharding == half["train"].params["embedding"].sharding
        )


if __name__ == "__main__":
    from launch.distributed import initialize_from_env

    initialize_from_env()
    print("read on", jax.process_count(), "x", jax.local_device_count())
    read(Path(sys.argv[1]))
