"""What `benchmarks/checkpoints.py` measures in processes of their own.

    python benchmarks/checkpoint_child.py memory NAME FOLDER LEAVES
    python -m launch.local --processes 2 --devices 4 -- benchmarks/checkpoint_child.py pair ...
    python -m launch.local ... -- benchmarks/checkpoint_child.py death FOLDER

The last line of what they print is JSON.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import ctypes
import gc
import itertools
import json
import logging
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import savers
from launch.distributed import initialize_from_env

__all__ = ["main"]


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) << 10


def memory(name: str, folder: str, leaves: str) -> None:
    """The most memory beyond the state, in MB: in a save, and (beyond what is read) a restore."""
    contender = savers.contenders([name])[name]
    state = savers.make_state(int(leaves), savers.LARGE)
    tiny = savers.make_state(2, savers.SMALL)
    size = sum(x.nbytes for x in state.values())
    found: dict[str, float] = {}

    def peak(what: str, fn: Callable[[], Any], expected: int) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = _status("VmRSS")
        kept = fn()
        found[what] = (_status("VmHWM") - before - expected) / 1e6
        del kept

    def save(state: Any, where: Path) -> None:
        saver = contender.saver(where)
        saver.save(state)
        saver.close()

    save(tiny, Path(folder) / "tiny")
    contender.load(Path(folder) / "tiny", savers.abstract(tiny))
    peak("save", lambda: save(state, Path(folder) / "run"), 0)
    target = savers.abstract(state)
    peak("restore", lambda: contender.load(Path(folder) / "run", target), size)
    print(json.dumps(found))


class _Counting:
    """JAX's client of the coordination service; counts barriers and waits."""

    def __init__(self, client: Any) -> None:
        self.uncounted, self.calls = client, 0

    def __getattr__(self, name: str) -> Any:
        main = threading.current_thread() is threading.main_thread()
        if name == "wait_at_barrier" or (main and name.startswith("blocking_key_value_get")):
            self.calls += 1
        return getattr(self.uncounted, name)


def _watched() -> _Counting:
    """The client, watched from now on."""
    from jax._src import distributed

    state: Any = distributed.global_state
    state.client = _Counting(state.client)
    return state.client


class _Pair:
    """One of the processes that save and restore together."""

    def __init__(self, folder: str) -> None:
        self.folder, self.first = Path(folder), jax.process_index() == 0
        self._client, self._meetings = _watched(), itertools.count()

    def hold(self, leaves: int) -> None:
        """Makes the state."""
        self.state = savers.make_state(leaves, savers.LARGE if leaves < 1000 else savers.SMALL)
        self.targets = {
            "restore": savers.abstract(self.state),
            "resharded": savers.abstract(self.state, (4, 2)),
        }

    def meet(self) -> None:
        """Waits for the others."""
        name = f"bench-{next(self._meetings)}"
        self._client.uncounted.wait_at_barrier(name, 600_000)

    def timed(self, fn: Callable[[], Any]) -> float:
        """Seconds until all processes have done it."""
        self.meet()
        began = time.perf_counter()
        jax.block_until_ready(fn())
        self.meet()
        return time.perf_counter() - began

    def turn(self, contender: savers.Contender, where: Path, number: int = 0) -> dict[str, float]:
        """A save beside a plain file, and two restores."""
        found: dict[str, float] = {}
        if self.first:
            block, size = os.urandom(8 << 20), sum(x.nbytes for x in self.state.values())
            parts = [block[: size - at] for at in range(0, size, len(block))]
            found |= savers.write_plain(self.folder, parts)
            os.sync()
        self.state = jax.block_until_ready(savers.renew(self.state))
        found["save"] = self.timed(lambda: found.update(self.save(contender, where)))
        # A file that was just written is read quicker than one that was read before, whatever
        # was dropped from the page cache: each of the two restores comes first in half the rounds.
        restores = sorted(self.targets, reverse=bool(number % 2))
        for what in ["raw restore", *restores]:
            found |= self.read(contender, where, what)
        self.meet()
        if self.first:
            shutil.rmtree(where)
            (self.folder / savers.PLAIN).unlink()
        return found

    def read(self, contender: savers.Contender, where: Path, what: str) -> dict[str, float]:
        """A restore, or (by one process) the plain file; seconds."""
        savers.forget(where)
        if what in self.targets:
            return {what: self.timed(lambda: contender.load(where, self.targets[what]))}
        self.meet()
        return savers.read_plain(self.folder) if self.first else {}

    def save(self, contender: savers.Contender, where: Path) -> dict[str, float]:
        """The part of a save that blocks; seconds, and how often it waits for others."""
        saver = contender.saver(where)
        before = self._client.calls
        began = time.perf_counter()
        saver.save(self.state)
        blocked = time.perf_counter() - began
        waits = self._client.calls - before
        saver.close()
        return {"blocking": blocked, "barriers": waits}


def pair(folder: str, leaves: str, rounds: str, names: str) -> None:
    """Seconds of two processes, until both are done; if there are rounds, few leaves warm up."""
    initialize_from_env()
    here, chosen = _Pair(folder), savers.contenders(names.split(","))
    if int(rounds) > 1:
        here.hold(2)
        for name, contender in chosen.items():
            here.turn(contender, here.folder / f"{name.replace(' ', '-')}-warm")
    here.hold(int(leaves))
    taken: dict[str, dict[str, list[float]]] = {}
    for number in range(int(rounds)):
        for name, contender in chosen.items():
            found = here.turn(contender, here.folder / f"{name.replace(' ', '-')}-{number}", number)
            for what, value in found.items():
                taken.setdefault(name, {}).setdefault(what, []).append(value)
    if here.first:
        (here.folder / "result.json").write_text(json.dumps(taken))


def death(folder: str, timeout: str) -> None:
    """How many seconds after the death of a process, while saving, the other one says so."""
    initialize_from_env()
    from shardflax.ckpt import CheckpointManager, CheckpointSaveError, faults

    manager = CheckpointManager(folder, timeout=float(timeout))
    if jax.process_index() == 1:
        faults.listen(
            lambda point: os.kill(os.getpid(), signal.SIGKILL) if point == "written" else None
        )
    began = time.perf_counter()
    try:
        manager.save(1, savers.make_state(4, savers.SMALL))
        manager.wait()
        error = ""
    except CheckpointSaveError as caught:
        error = str(caught)
    seconds = time.perf_counter() - began
    (Path(folder) / "result.json").write_text(json.dumps({"seconds": seconds, "error": error}))
    os._exit(0)  # the coordination service would wait for the dead one


def main() -> None:
    """One of them."""
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    modes: dict[str, Callable[..., None]] = {"memory": memory, "pair": pair, "death": death}
    modes[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
