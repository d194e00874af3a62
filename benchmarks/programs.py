"""Rows about whole programs: what XLA compiles, and what an import costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from benchmarks import sharded, topology
from benchmarks.compiled import cost_of, differences
from benchmarks.report import Row
from benchmarks.timing import in_turn

__all__ = ["rows"]

ROOT = Path(__file__).parent.parent

_IMPORT = """
import time, jax, optax
start = time.process_time()
{statement}
print(time.process_time() - start)
"""


def rows(rounds: int) -> list[Row]:
    """The rows about the compiled step and the import."""
    return [_compiled(), topology.row(), _import(rounds)]


def _compiled() -> Row:
    mesh = sharded.make_mesh()
    ids = sharded.tokens(mesh)
    ours, state = sharded.with_names(mesh)
    hand, raw_state = sharded.by_hand(mesh, jax.tree.map(lambda x: x.copy(), state.params))
    cost = cost_of(ours.lower(state, ids).compile())
    apart = differences(cost, cost_of(hand.lower(raw_state, ids).compile()))
    return Row(
        "compiled step, against hand-written JAX: flops, bytes, collectives, memory",
        budget=0,
        ours=len(apart),
        unit="differences",
        texts={"ours": ", ".join(apart) or "equal", "budget": "equal"},
        detail={
            "differences": apart,
            "flops": cost.flops,
            "bytes accessed": cost.bytes_accessed,
            "collectives": sum(cost.collectives.values()),
            "temporary bytes": cost.temporary_bytes,
        },
    )


def _import(rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as cache:
        contenders = {
            "ours": lambda: _seconds("import shardflax.nn", cache),
            "flax": lambda: _seconds("import flax.linen", cache),
            "a layer": lambda: _seconds("from shardflax.nn import Dense", cache),
            "every layer": lambda: _seconds("from shardflax.nn import *", cache),
        }
        taken = in_turn(contenders, rounds, timed=lambda contender: float(str(contender())))
    return Row(
        "import of `shardflax.nn` (of `flax.linen`), beyond jax and optax",
        budget=0.15,
        ours=taken.median("ours"),
        flax=taken.median("flax"),
        unit="s",
        detail={
            "rounds": rounds,
            "seconds with what is imported on first use": {
                name: taken.median(name) for name in ("a layer", "every layer")
            },
        },
    )


def _seconds(statement: str, cache: str) -> float:
    """Processor time that an import takes in a process that has imported jax and optax.

    Compiled modules are in `cache` from the round that does not count.
    """
    argv = [sys.executable, "-c", _IMPORT.format(statement=statement)]
    env = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(argv, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return float(done.stdout)
