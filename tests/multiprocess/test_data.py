"""The order of examples does not depend on how many processes read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

PROGRAM = """
import json, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from launch.distributed import initialize_from_env
initialize_from_env()
from shardflax.training.data import BatchLayout, Corpus, Loader, Windows

corpus = Corpus.of("digits", [f"document {i} " * 5 for i in range(100)])
auto = (jax.sharding.AxisType.Auto,) * 3
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
spec = {"dp": jax.P(("data", "fsdp", "tensor")), "fsdp_tp": jax.P(("data", "fsdp")),
        "context": jax.P("data", "tensor")}[sys.argv[1]]
layout = BatchLayout(8, 8, jax.NamedSharding(mesh, spec))
loader = Loader(Windows(corpus, 8), layout, seed=5)
if len(sys.argv) > 2:
    loader.set_state(json.loads(sys.argv[2]))
batches = [next(loader) for _ in range(3)]
loss = jax.jit(lambda b: sum(jax.numpy.sin(0.1 * v + 1).mean() for v in b.values()))
losses = [float(loss(b)).hex() for b in batches]
whole = [multihost_utils.process_allgather(b["inputs"], tiled=True).tolist() for b in batches]
state = loader.get_state()
print(json.dumps({"rows": len(layout.rows), "losses": losses, "inputs": whole, "state": state}))
"""

DIFFERENT = """
import jax
from launch.distributed import initialize_from_env
initialize_from_env()
from shardflax.training.data import BatchLayout, Corpus, Loader, Windows
corpus = Corpus.of("mine", ["x" * (100 + jax.process_index() // 2)])
layout = BatchLayout(4, 8, jax.NamedSharding(jax.make_mesh((4,), ("data",)), jax.P("data")))
Loader(Windows(corpus, 8), layout)
"""


def results(run_local, folder: Path, processes: int, *args: str) -> list[dict]:
    path = folder / "program.py"
    path.write_text(PROGRAM)
    done = run_local(processes, 8 // processes, path, *args)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == processes
    return [json.loads(line.partition("] ")[2]) for line in lines]


@pytest.mark.parametrize(
    ("layout", "rows"), [("dp", {1: 8, 2: 4, 4: 2}), ("fsdp_tp", {1: 8, 2: 4, 4: 2})]
)
def test_batches_are_the_same_on_1_2_and_4_processes(
    run_local, tmp_path: Path, layout: str, rows: dict[int, int]
) -> None:
    found = {n: results(run_local, tmp_path, n, layout) for n in (1, 2, 4)}
    reference = found[1][0]
    for n, each in found.items():
        for result in each:
            assert result["rows"] == rows[n]
            assert {**result, "rows": 0} == {**reference, "rows": 0}


def test_a_state_moves_to_another_number_of_processes(run_local, tmp_path: Path) -> None:
    first = results(run_local, tmp_path, 2, "context")[0]
    assert first["state"]["batches"] == 3
    on_two = results(run_local, tmp_path, 2, "context", json.dumps(first["state"]))
    on_one = results(run_local, tmp_path, 1, "context", json.dumps(first["state"]))
    assert on_two[0]["inputs"] == on_two[1]["inputs"] == on_one[0]["inputs"]
    assert on_two[0]["inputs"] != first["inputs"]


def test_processes_with_different_corpora_are_named(run_local, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(DIFFERENT)
    done = run_local(4, 1, path)
    assert done.returncode == 1
    assert "CorpusMismatchError: mine: expected the same corpus on every process" in done.stderr
    assert "on process 2, 3;" in done.stderr
