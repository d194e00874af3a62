"""Libraries that save checkpoints, behind one interface, for `benchmarks/checkpoints.py`."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = [
    "LARGE", "PLAIN", "SMALL", "Contender", "Saver", "State", "abstract", "contenders", "forget",
    "make_state", "plain_file", "read_plain", "renew", "timed", "write_plain",
]  # fmt: skip

State = dict[str, jax.Array]
PLAIN = "raw"
LARGE, SMALL = (1024, 2048), (16, 32)
"""Shapes of arrays: 8 MiB and 2 KiB."""


def _mesh(shape: tuple[int, int]) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def make_state(count: int, shape: tuple[int, int]) -> State:
    """f32 arrays over a mesh of 2 x 4 devices; random, so that nothing compresses well."""
    sharding = NamedSharding(_mesh((2, 4)), PartitionSpec("a", "b"))
    rng = np.random.default_rng(0)
    state: State = {}
    for i in range(count):
        value = rng.random(shape, np.float32)
        state[f"w{i}"] = jax.make_array_from_callback(shape, sharding, lambda at, v=value: v[at])
    return jax.block_until_ready(renew(state))  # on memory of JAX, not of numpy


@jax.jit
def renew(state: State) -> State:
    """Other arrays with other values: what a step of training leaves behind."""
    return {name: -x for name, x in state.items()}


def abstract(state: State, mesh_shape: tuple[int, int] = (2, 4)) -> Any:
    """The shapes of a state, on a mesh of some shape."""
    sharding = NamedSharding(_mesh(mesh_shape), PartitionSpec("a", "b"))
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in state.items()
    }


@dataclasses.dataclass(frozen=True)
class Saver:
    """One save: `save` returns when training may go on, `close` when all is on disk."""

    save: Callable[[State], Any]
    close: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Contender:
    """How a library saves into a folder, and restores from it; `alone`: one process only."""

    saver: Callable[[Path], Saver]
    load: Callable[[Path, Any], Any]
    alone: bool = False


def _ours() -> Contender:
    from shardflax.ckpt import CheckpointManager, load_checkpoint

    def saver(folder: Path) -> Saver:
        manager = CheckpointManager(folder)
        return Saver(lambda state: manager.save(1, state), manager.close)

    return Contender(saver, lambda folder, target: load_checkpoint(folder / "1", target).state)


def _orbax(tuned: bool) -> Contender:
    """The standard checkpointer, or OCDBT with zarr3 and without compression."""
    import orbax.checkpoint as ocp

    def saver(folder: Path) -> Saver:
        if not tuned:
            standard = ocp.StandardCheckpointer()
            return Saver(lambda state: standard.save(folder / "1", state), standard.close)
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        checkpointer = ocp.AsyncCheckpointer(handler)
        return Saver(
            lambda state: checkpointer.save(folder / "1", args=ocp.args.PyTreeSave(state)),
            checkpointer.close,
        )

    def load(folder: Path, target: Any) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "1", target)

    return Contender(saver, load)


def _orbax_v1() -> Contender:
    """The new API, without compression."""
    from orbax.checkpoint.experimental import v1

    def saver(folder: Path) -> Saver:
        responses: list[Any] = []

        def save(state: State) -> None:
            saving = v1.options.ArrayOptions.Saving(use_compression=False)
            with v1.Context(array_options=v1.options.ArrayOptions(saving=saving)):
                responses.append(v1.save_pytree_async(folder / "1", state))

        return Saver(save, lambda: responses.pop().result())

    return Contender(saver, lambda folder, target: v1.load_pytree(folder / "1", target))


def _flax_msgpack() -> Contender:
    """MessagePack, all of it blocking."""
    from flax import serialization

    def saver(folder: Path) -> Saver:
        folder.mkdir(parents=True)
        return Saver(
            lambda state: write_durably(folder / "1", [serialization.to_bytes(state)]),
        )

    def load(folder: Path, target: Any) -> Any:
        host = serialization.msgpack_restore((folder / "1").read_bytes())
        return {name: jax.device_put(host[name], target[name].sharding) for name in host}

    return Contender(saver, load, alone=True)


def _safetensors() -> Contender:
    """One contiguous file, all of it blocking; forced to the disk by us."""
    from safetensors import numpy as library

    def saver(folder: Path) -> Saver:
        folder.mkdir(parents=True)

        def save(state: State) -> None:
            host = {name: np.asarray(x) for name, x in state.items()}
            library.save_file(host, folder / "1")
            descriptor = os.open(folder / "1", os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        return Saver(save)

    def load(folder: Path, target: Any) -> Any:
        host = library.load_file(folder / "1")
        return {name: jax.device_put(host[name], target[name].sharding) for name in host}

    return Contender(saver, load, alone=True)


def contenders(names: Sequence[str] = ()) -> dict[str, Contender]:
    """All of them, or some."""
    makers: dict[str, Callable[[], Contender]] = {
        "ours": _ours,
        "Orbax default": lambda: _orbax(tuned=False),
        "Orbax tuned": lambda: _orbax(tuned=True),
        "Orbax v1 tuned": _orbax_v1,
        "Flax msgpack": _flax_msgpack,
        "safetensors": _safetensors,
    }
    return {name: make() for name, make in makers.items() if not names or name in names}


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache (a tmpfs has nothing else)."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(fn: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that a call takes until its arrays are there, and those of the processors."""
    gc.collect()
    os.sync()  # what was written before, and the deletion of files
    cpu, began = time.process_time(), time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - began, time.process_time() - cpu


def plain_file(folder: Path, parts: Sequence[Any]) -> dict[str, float]:
    """What all others are measured by: a file of the same bytes, written and read."""
    found = write_plain(folder, parts) | read_plain(folder)
    (folder / PLAIN).unlink()
    return found


def write_plain(folder: Path, parts: Sequence[Any]) -> dict[str, float]:
    """Writes the plain file; seconds."""
    write, cpu = timed(lambda: write_durably(folder / PLAIN, parts))
    return {"raw save": write, "raw save cpu": cpu}


def read_plain(folder: Path) -> dict[str, float]:
    """Reads the plain file, from a cold cache; seconds."""
    forget(folder)
    read, cpu = timed(lambda: read_by_four(folder / PLAIN))
    return {"raw restore": read, "raw restore cpu": cpu}


def write_durably(path: Path, parts: Sequence[Any]) -> None:
    """One sequential write, and fsync."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def read_by_four(path: Path) -> None:
    """Reads a file with four threads."""
    size = path.stat().st_size

    def read(part: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(part * size // 4)
            left = (part + 1) * size // 4 - part * size // 4
            buffer = bytearray(4 << 20)
            while left > 0:
                left -= file.readinto(memoryview(buffer)[: min(left, len(buffer))]) or left

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
