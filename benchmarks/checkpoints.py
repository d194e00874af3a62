"""Checkpoints beside Orbax's, Flax's and safetensors: `python benchmarks/checkpoints.py`.

Everything is timed in turn and reported as a ratio: writes to one sequential write and fsync of
the same bytes, reads to one read of such a file by four threads from a cold cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import dataclasses
import gc
import json
import logging
import platform
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["main"]

State = dict[str, jax.Array]


def make_state(count: int, shape: tuple[int, int], mesh_shape: tuple[int, int]) -> State:
    """f32 arrays over a mesh of eight devices; random, so that nothing compresses well."""
    mesh = jax.make_mesh(mesh_shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    rng = np.random.default_rng(0)
    values = (rng.random(shape, np.float32) for _ in range(count))
    return {f"w{i}": jax.device_put(x, sharding) for i, x in enumerate(values)}


def abstract(state: State, mesh_shape: tuple[int, int] | None = None) -> Any:
    """The shapes of a state, in its own layout or on another mesh, transposed."""

    def shaped(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding: Any = x.sharding
        if mesh_shape is not None:
            mesh = jax.make_mesh(mesh_shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
            sharding = NamedSharding(mesh, PartitionSpec("b", "a"))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shaped, state)


# --- contenders: save(folder, state) -> seconds of blocking; load(folder, target)


@dataclasses.dataclass(frozen=True)
class Contender:
    """How one library saves, durably, and restores."""

    save: Callable[[Path, State], float]
    load: Callable[[Path, Any], Any]


def ours() -> Contender:
    """`shardflax.ckpt`."""
    from shardflax.ckpt import CheckpointManager, load_checkpoint

    def save(folder: Path, state: State) -> float:
        with CheckpointManager(folder) as manager:
            began = time.perf_counter()
            manager.save(1, state)
            return time.perf_counter() - began

    return Contender(save, lambda folder, target: load_checkpoint(folder / "1", target).state)


def orbax(tuned: bool) -> Contender:
    """Orbax: the standard checkpointer, or OCDBT with zarr3 and without compression."""
    import orbax.checkpoint as ocp

    def save(folder: Path, state: State) -> float:
        if not tuned:
            with ocp.StandardCheckpointer() as checkpointer:
                began = time.perf_counter()
                checkpointer.save(folder / "1", state)
                return time.perf_counter() - began
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        with ocp.AsyncCheckpointer(handler) as checkpointer:
            began = time.perf_counter()
            checkpointer.save(folder / "1", args=ocp.args.PyTreeSave(state))
            return time.perf_counter() - began

    def load(folder: Path, target: Any) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "1", target)

    return Contender(save, load)


def flax_msgpack() -> Contender:
    """Flax's MessagePack, all of it blocking."""
    from flax import serialization

    def save(folder: Path, state: State) -> float:
        began = time.perf_counter()
        folder.mkdir(parents=True)
        data = serialization.to_bytes(state)
        write_durably(folder / "1", [data])
        return time.perf_counter() - began

    def load(folder: Path, target: Any) -> Any:
        host = serialization.msgpack_restore((folder / "1").read_bytes())
        return {k: jax.device_put(host[k], target[k].sharding) for k in host}

    return Contender(save, load)


def safetensors() -> Contender:
    """One contiguous file with a header of JSON, all of it blocking: the format of safetensors."""

    def save(folder: Path, state: State) -> float:
        began = time.perf_counter()
        folder.mkdir(parents=True)
        header: dict[str, Any] = {}
        at = 0
        for name, x in state.items():
            header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [at, at + x.nbytes]}
            at += x.nbytes
        text = json.dumps(header).encode()
        parts = (np.asarray(jax.device_get(x)).data for x in state.values())
        write_durably(folder / "1", [len(text).to_bytes(8, "little"), text, *parts])
        return time.perf_counter() - began

    def load(folder: Path, target: Any) -> Any:
        with (folder / "1").open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(folder / "1", np.uint8, "r", offset=8 + size)
        return {
            name: jax.device_put(
                data[slice(*about["data_offsets"])].view(np.float32).reshape(about["shape"]),
                target[name].sharding,
            )
            for name, about in header.items()
        }

    return Contender(save, load)


def contenders() -> dict[str, Contender]:
    """All of them."""
    return {
        "ours": ours(),
        "Orbax default": orbax(tuned=False),
        "Orbax tuned": orbax(tuned=True),
        "Flax msgpack": flax_msgpack(),
        "one file (safetensors)": safetensors(),
    }


# --- the measure: a plain file


def write_durably(path: Path, parts: Sequence[Any]) -> None:
    """One sequential write, and fsync."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache (a tmpfs has nothing else)."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


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


def memory() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory that the process holds within a block, beyond what it held before."""

    def __enter__(self) -> Peak:
        self._done, self.before, self.most = threading.Event(), memory(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, memory() - self.before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def timed(fn: Callable[[], Any]) -> float:
    """Seconds that a call takes, until its arrays are there."""
    gc.collect()
    began = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - began


Samples = dict[str, dict[str, list[float]]]


def measure(state: State, root: Path, names: Sequence[str], rounds: int) -> Samples:
    """Seconds of each contender, one after the other in each round; the plain file is "raw"."""
    chosen = {name: x for name, x in contenders().items() if name in names}
    taken: Samples = {name: {} for name in ("raw", *chosen)}
    same, other = abstract(state), abstract(state, (4, 2))
    host = [np.asarray(jax.device_get(x)).data for x in state.values()]

    def note(name: str, what: str, value: float) -> None:
        taken[name].setdefault(what, []).append(value)

    for number in range(rounds + 1):  # the first one warms up and does not count
        order = [*chosen][number % len(chosen) :] + [*chosen][: number % len(chosen)]
        scratch = Path(tempfile.mkdtemp(dir=root))
        results = plain_file(scratch, host)
        for name in order:
            results += one(chosen[name], name, scratch / name.split()[0] / str(number), state,
                           same, other)  # fmt: skip
            shutil.rmtree(scratch / name.split()[0])
        shutil.rmtree(scratch)
        for result in results if number else []:
            note(*result)
    return taken


def plain_file(scratch: Path, host: Sequence[Any]) -> list[tuple[str, str, float]]:
    """What all others are measured by."""
    path = scratch / "raw"
    found = [("raw", "save", timed(lambda: write_durably(path, host)))]
    forget(scratch)
    found.append(("raw", "restore", timed(lambda: read_by_four(path))))
    path.unlink()
    return found


def one(
    contender: Contender, name: str, folder: Path, state: State, same: Any, other: Any
) -> list[tuple[str, str, float]]:
    """A save, and two restores, of one contender."""
    blocked = [0.0]

    def save() -> None:
        blocked[0] = contender.save(folder, state)

    with Peak() as peak:
        total = timed(save)
    found = [(name, "save", total), (name, "blocking", blocked[0])]
    found.append((name, "memory", peak.most / 1e6))
    forget(folder)
    found.append((name, "restore", timed(lambda: contender.load(folder, same))))
    forget(folder)
    found.append((name, "resharded", timed(lambda: contender.load(folder, other))))
    return found


def median_ratio(taken: Samples, name: str, what: str, over: str) -> float:
    """The median over the rounds of a time over that of the plain file in the same round."""
    pairs = zip(taken[name][what], taken["raw"][over], strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(title: str, taken: Samples, ratios: bool) -> list[str]:
    """The lines of a table."""
    columns = ("blocking", "save", "restore", "resharded")
    unit = "over a plain file" if ratios else "seconds"
    lines = [f"### {title} ({unit})", "", f"| | {' | '.join(columns)} | extra memory, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for name in taken:
        if name == "raw":
            continue
        cells: list[str] = []
        for what in columns:
            over = "save" if what in ("blocking", "save") else "restore"
            value = (
                median_ratio(taken, name, what, over)
                if ratios
                else statistics.median(taken[name][what])
            )
            cells.append(f"{value:.3f}" if what == "blocking" else f"{value:.2f}")
        lines.append(
            f"| {name} | {' | '.join(cells)} | {statistics.median(taken[name]['memory']):.0f} |"
        )
    return [*lines, ""]


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leaves", type=int, default=64, help="large leaves, of 8 MiB each")
    parser.add_argument("--small", type=int, default=2000, help="small leaves, of 2 KiB each")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))
    parser.add_argument(
        "--out", type=Path, help="a Markdown file; a JSON file is written beside it"
    )
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    before = os.getloadavg()
    everyone = [*contenders()]
    runs: dict[str, Samples] = {}
    lines: list[str] = []
    large = make_state(args.leaves, (1024, 2048), (2, 4))
    for where in ("disk", "tmpfs"):
        title = f"{args.leaves} leaves of 8 MiB on 8 devices, {where}"
        runs[title] = measure(large, getattr(args, where), everyone, args.rounds)
        lines += table(title, runs[title], ratios=True)
    del large
    small = make_state(args.small, (16, 32), (2, 4))
    title = f"{args.small:,} leaves of 2 KiB on 8 devices, disk"
    runs[title] = measure(small, args.disk, everyone[:3], max(1, args.rounds // 2))
    lines += table(title, runs[title], ratios=False)
    facts = {
        "python": platform.python_version(),
        **{n: version(n) for n in ("jax", "orbax-checkpoint", "tensorstore", "flax")},
        "cores": os.cpu_count(),
        "load average before": before,
        "load average after": os.getloadavg(),
    }
    command = f"python benchmarks/checkpoints.py {' '.join(sys.argv[1:])}"
    text = "\n".join(
        [f"`{command}`", "", ", ".join(f"{k} {v}" for k, v in facts.items()), "", *lines]
    )
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
        content = {"command": command, "machine": facts, "seconds": runs}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
