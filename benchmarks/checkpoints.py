"""Checkpoints beside Orbax's, Flax's and safetensors: `python benchmarks/checkpoints.py`.

Everything is timed in turn and reported as a ratio: writes to one sequential write and fsync of
the same bytes, reads to one read of such a file by four threads from a cold cache, both taken
right before.  The state is another one for each save, as after a step of training.
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

import gc
import itertools
import json
import logging
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from benchmarks.checkpoint_targets import Figures, verdicts
from benchmarks.savers import (
    LARGE,
    SMALL,
    Contender,
    State,
    abstract,
    contenders,
    forget,
    make_state,
    plain_file,
    renew,
    timed,
)
from launch.distributed import Cluster
from launch.local import child_environ, free_port

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
Samples = dict[str, dict[str, list[float]]]
_CHILD = "benchmarks/checkpoint_child.py"


class Turns:
    """Saves a state, and restores it, by any contender, into sub-folders of a folder."""

    def __init__(self, state: State, root: Path) -> None:
        self.state, self.root = state, root
        self._host = [np.array(x) for x in state.values()]
        self._same, self._other = abstract(state), abstract(state, (4, 2))

    def take(self, contender: Contender) -> dict[str, float]:
        """Seconds for a plain file, a save and two restores."""
        self.state = jax.block_until_ready(renew(self.state))
        scratch = Path(tempfile.mkdtemp(dir=self.root))
        found = plain_file(scratch, self._host)
        found |= one(contender, scratch / "run", self.state, self._same, self._other)
        shutil.rmtree(scratch)
        return found


def measure(state: State, root: Path, chosen: dict[str, Contender], rounds: int) -> Samples:
    """Seconds of each contender, in turn; of others than ours in the first half of the rounds.

    Before them, two leaves are saved and restored, to import and compile all that is needed.
    """
    warm = Turns(dict(itertools.islice(state.items(), 2)), root)
    for contender in chosen.values():
        warm.take(contender)
    turns, taken, names = Turns(state, root), Samples(), [*chosen]
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name == "ours" or 2 * number < rounds:
                note(taken, name, turns.take(chosen[name]))
    return {name: taken[name] for name in names}


def measure_small(state: State, root: Path, chosen: dict[str, Contender], rounds: int) -> Samples:
    """The same of many leaves: one round of what takes long, the libraries that write each alone.

    Ours copies many at once when such a state was saved twice; those first saves have a line.
    """
    turns, taken = Turns(state, root), Samples({"ours": {}})
    quick = {name: x for name, x in chosen.items() if name == "ours" or x.alone}
    for number in range(-2, rounds):
        for name, contender in quick.items():
            found = turns.take(contender)
            if number >= 0:
                note(taken, name, found)
            elif name == "ours" and number == -1:
                note(taken, "ours, second save", found)
    for name, contender in chosen.items():
        if name not in quick:
            note(taken, name, turns.take(contender))
    return taken


def note(taken: Samples, name: str, found: dict[str, float]) -> None:
    """Adds what was found to what is known of a contender."""
    for what, value in found.items():
        taken.setdefault(name, {}).setdefault(what, []).append(value)


def one(
    contender: Contender, folder: Path, state: State, same: Any, other: Any
) -> dict[str, float]:
    """A save, and two restores, of one contender."""
    blocked = [0.0]

    def save() -> None:
        saver = contender.saver(folder)
        began = time.perf_counter()
        saver.save(state)
        blocked[0] = time.perf_counter() - began
        saver.close()

    found = dict(zip(("save", "save cpu"), timed(save), strict=True)) | {"blocking": blocked[0]}
    for what, target in (("restore", same), ("resharded", other)):
        forget(folder)
        found[what], found[f"{what} cpu"] = timed(lambda t=target: contender.load(folder, t))
    return found


def median(taken: Samples, name: str, what: str, over: str = "") -> float:
    """The median over the rounds, of a ratio if there is something to take it over."""
    values = taken[name][what]
    if over:
        values = [a / b for a, b in zip(values, taken[name][over], strict=True)]
    return statistics.median(values)


def table(title: str, taken: Samples, ratios: bool) -> list[str]:
    """The lines of a table."""
    columns = {"blocking": "raw save", "save": "raw save", "restore": "raw restore",
               "resharded": "raw restore"}  # fmt: skip
    unit = "over a plain file" if ratios else "seconds"
    cpu = [] if "save cpu" not in next(iter(taken.values())) else ["save cpu", "restore cpu"]
    heads = [*columns, *(f"{what}, s" for what in cpu)]
    lines = [f"### {title} ({unit})", "", f"| | {' | '.join(heads)} |", "|---" * 5]
    lines[-1] += "|---" * len(cpu) + "|"
    for name in taken:
        found = {w: median(taken, name, w, over if ratios else "") for w, over in columns.items()}
        cells = [f"{x:.{3 if what == 'blocking' else 2}f}" for what, x in found.items()]
        cells += [f"{median(taken, name, what):.2f}" for what in cpu]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if ratios:
        first = next(iter(taken))
        seconds = [f"{median(taken, first, f'raw {what}'):.2f}" for what in ("save", "restore")]
        lines += ["", f"A plain file: written in {seconds[0]} s, read in {seconds[1]} s."]
    return [*lines, ""]


# --- what is measured in other ways


def child(*args: str, processes: int = 1) -> str:
    """Runs `checkpoint_child.py`; what it prints."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "launch.local", "--processes", str(processes), "--devices", "4", "--"]
    done = subprocess.run(
        [*start, _CHILD, *args], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    if done.returncode and processes == 1:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout


def pair(root: Path, leaves: int, rounds: int, names: Sequence[str]) -> Samples:
    """The same of two processes with four devices each."""
    folder = Path(tempfile.mkdtemp(dir=root))
    said = child("pair", str(folder), str(leaves), str(rounds), ",".join(names), processes=2)
    result = folder / "result.json"
    if not result.exists():
        raise RuntimeError(said)
    found = json.loads(result.read_text())
    shutil.rmtree(folder)
    return found


def memory(root: Path, name: str, leaves: int) -> dict[str, float]:
    """MB beyond the state, in a process that does nothing else."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        return json.loads(child("memory", name, folder, str(leaves)).splitlines()[-1])


def death(root: Path, timeout: float) -> dict[str, Any]:
    """How long one process waits for another that was killed."""
    with tempfile.TemporaryDirectory(dir=root) as folder, free_port() as port:
        address = f"127.0.0.1:{port}"
        processes = [
            subprocess.Popen(
                [sys.executable, _CHILD, "death", folder, str(timeout)], cwd=ROOT,
                env=os.environ
                | child_environ(Cluster(address, 2, index), 4)
                | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for index in range(2)
        ]  # fmt: skip
        for process in processes:
            process.wait(300)
        # Where it was is nobody else's concern.
        return json.loads((Path(folder) / "result.json").read_text().replace(folder, "RUN"))


@jax.jit
def _loss(state: State) -> Any:
    return sum(x[:64, :64].sum() for x in state.values())


def training(state: State, root: Path, chosen: dict[str, Contender], rounds: int) -> Samples:
    """Seconds by which a save prolongs a loop of steps that each replace the whole state.

    The state is donated to the next step right after `save` has returned.
    """
    step = jax.jit(lambda s: {k: x * 0.99 + 0.01 for k, x in s.items()}, donate_argnums=0)
    lost: Samples = {name: {"lost": []} for name in chosen}

    def loop(save: Callable[[State], object]) -> float:
        nonlocal state
        os.sync()
        began = time.perf_counter()
        for number in range(16):
            state = step(state)
            if number == 2:
                save(state)
            jax.block_until_ready(_loss(state))
        return time.perf_counter() - began

    loop(lambda state: None)
    for number in range(rounds + 1):
        for name, contender in chosen.items():
            folder = Path(tempfile.mkdtemp(dir=root))
            without = loop(lambda state: None)
            saver = contender.saver(folder / "run")
            seconds = loop(saver.save)
            saver.close()
            if number:
                lost[name]["lost"].append(seconds - without)
            shutil.rmtree(folder)
    return lost


# --- all of it


def run(args: argparse.Namespace) -> Figures:
    """Everything that is measured, by title."""
    everyone = contenders()
    parallel = [name for name, contender in everyone.items() if not contender.alone]
    few = {name: everyone[name] for name in ("ours", "Orbax default", "Orbax tuned")}
    figures = Figures()
    large = make_state(args.leaves, LARGE)
    for where in ("disk", "tmpfs"):
        figures.tables["large", where] = measure(large, getattr(args, where), everyone, args.rounds)
    figures.tables["training", "disk"] = training(large, args.disk, few, args.few // 2)
    del large
    small = make_state(args.small, SMALL)
    figures.tables["small", "disk"] = measure_small(small, args.disk, everyone, args.rounds)
    del small
    gc.collect()
    for where in ("disk", "tmpfs"):
        root = getattr(args, where)
        figures.tables["large, two processes", where] = pair(root, args.leaves, args.few, parallel)
    figures.tables["small, two processes", "disk"] = pair(args.disk, args.small, 1, ["ours"])
    with ThreadPoolExecutor(2) as pool:  # no matter of time
        found = pool.map(lambda name: memory(args.tmpfs, name, args.leaves), everyone)
        figures.memory = dict(zip(everyone, found, strict=True))
    figures.death = {"timeout": 5.0, **death(args.disk, 5.0)}
    return figures


def report(figures: Figures, args: argparse.Namespace) -> list[str]:
    """All tables, the verdicts first."""
    lines = ["### Targets", "", *verdicts(figures), ""]
    counts = {"large": f"{args.leaves} leaves of 8 MiB", "small": f"{args.small:,} leaves of 2 KiB"}
    for (what, where), taken in figures.tables.items():
        if what == "training":
            continue
        kind, _, rest = what.partition(", ")
        title = f"{counts[kind]} on {'2 x 4' if rest else 8} devices, {where}"
        lines += table(title, taken, ratios=kind == "large")
    lines += ["### Memory beyond the state (MB, in a process of its own)", ""]
    lines += ["| | save | restore |", "|---|---|---|"]
    lines += [f"| {n} | {x['save']:.0f} | {x['restore']:.0f} |" for n, x in figures.memory.items()]
    return lines


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4, help="of ours; others take half of them")
    parser.add_argument(
        "--few", type=int, default=4, help="rounds of what takes long: an even number"
    )
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
    before, began = os.getloadavg(), time.monotonic()
    figures = run(args)
    facts = {
        "python": platform.python_version(),
        **{n: version(n) for n in
           ("jax", "orbax-checkpoint", "tensorstore", "flax", "safetensors")},
        "cores": os.cpu_count(),
        "load average before": before,
        "load average after": os.getloadavg(),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }  # fmt: skip
    command = " ".join(["python benchmarks/checkpoints.py", *sys.argv[1:]])
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = "\n".join([f"`{command}`", "", about, "", *report(figures, args)])
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
        content = {"command": command, "machine": facts, **figures.json()}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
