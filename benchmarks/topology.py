"""The train step of `sharded.py`, with names and by hand, compiled for TPUs that are not there.

The compiler is the real one (libtpu, no TPU needed).  It runs in a process of its own:

    python -m benchmarks.topology      # what it says of the two programs, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import sharded
from benchmarks.compiled import cost_of, differences
from benchmarks.report import Row
from shardflax import partitioning
from shardflax.partitioning.topology import libtpu_version

__all__ = ["TOPOLOGY", "compare", "compile_both", "row"]

TOPOLOGY = "v5e:2x4"
ROOT = Path(__file__).parent.parent


def compile_both() -> tuple[Any, Any, Any]:
    """The mesh, and the step compiled for it with names and by hand."""
    mesh = partitioning.make_mesh(sharded.AXES, partitioning.tpu_topology(TOPOLOGY))
    lowered = sharded.lowered_with_names(mesh), sharded.lowered_by_hand(mesh)
    return mesh, *(one.compile() for one in lowered)


def compare(ours: Any, hand: Any) -> dict[str, Any]:
    """The figures of the step with names, and those in which the step by hand differs."""
    cost = cost_of(ours)
    return {
        "differences": differences(cost, cost_of(hand)),
        "compiler": f"libtpu {libtpu_version()} for {TOPOLOGY}",
        **vars(cost),
    }


def row() -> Row:
    """The row of the table; without libtpu it says so."""
    what = f"the same, compiled for TPUs ({TOPOLOGY})"
    if libtpu_version() is None:
        return Row(what, 0, None, texts={"ours": "not measured: libtpu not installed"})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.topology"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    apart = found["differences"]
    return Row(
        what,
        budget=0,
        ours=len(apart),
        unit="differences",
        texts={"ours": ", ".join(apart) or "equal", "budget": "equal"},
        detail=found,
    )


if __name__ == "__main__":
    print(json.dumps(compare(*compile_both()[1:])))
