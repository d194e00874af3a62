"""A thousand saves leave nothing behind: no file, thread, descriptor, object or memory."""

import gc
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax import ckpt

pytestmark = pytest.mark.slow

CYCLES = 1000
RUN = 50
"""Saves of each manager."""
SETTLED = 250
"""Cycles after which all caches are full."""
WORDS = 4096


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is enough: forcing files to the disk costs nothing there."""
    memory = Path("/dev/shm")
    there = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 << 30
    where = memory if there else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counts() -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    return {
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "Python threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
        "bytes": resident(),
    }


def test_a_thousand_saves_and_restores_leave_nothing_behind(folder: Path) -> None:
    """Faster than the disk, and each step read while the next one is written."""
    target = {"w": np.zeros(WORDS, int), "v": jnp.zeros(3), "n": 0}
    before: dict[str, int] = {}
    for begin in range(0, CYCLES, RUN):
        with ckpt.CheckpointManager(folder, keep=2) as manager:
            for step in range(begin + 1, begin + RUN + 1):
                manager.save(step, {"w": np.full(WORDS, step), "v": jnp.ones(3), "n": step})
                if step % 5 == 0:
                    assert manager.latest_step() in (step - 1, step)
                    read = ckpt.load_checkpoint(folder / str(step - 1)).state
                    assert (read["w"] == step - 1).all() and read["n"] == step - 1
            assert manager.restore(target).state["n"] == begin + RUN
        if begin + RUN == SETTLED:
            before = counts()
    after = counts()
    assert {path.name for path in folder.iterdir()} == {str(CYCLES - 1), str(CYCLES)}
    assert after["Python threads"] <= before["Python threads"]
    assert after["threads"] <= before["threads"] + 2
    assert after["descriptors"] <= before["descriptors"]
    grown = {name: after[name] - before[name] for name in before}
    # Less than one object and half an array for each cycle.
    assert grown["objects"] < CYCLES - SETTLED, grown
    assert grown["bytes"] < (CYCLES - SETTLED) * WORDS * 4, grown


def peak_during(work: Callable[[], object]) -> int:
    """How many bytes more than before this process held at most while something was done."""
    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    work()
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 - before


MOST = 64 << 20
"""Bytes that a save may take beyond what it has staged."""


def test_a_save_takes_little_more_memory_than_what_it_stages(folder: Path) -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("a",), ()))
    make = jax.jit(lambda: [jnp.ones((64, 1 << 17)) * i for i in range(6)], out_shardings=rows)
    large = make()  # 192 MiB, of which the CPU backend stages nothing: numpy looks at the buffers
    repeated = jax.device_put(np.ones(1 << 18, np.float32), whole)
    host = np.ones((8, 1 << 20), np.float32)  # 32 MiB, which are copied
    with ckpt.CheckpointManager(folder, keep=1) as manager:

        def save(step: int) -> None:
            manager.save(step, {"large": large, "repeated": repeated, "host": host})
            manager.wait()

        save(1)
        peaks = [peak_during(lambda: save(2)), peak_during(lambda: save(3))]
    assert min(peaks) < host.nbytes + MOST, peaks
