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
specs = {"dp": jax.P(("data", "fsdp", "tensor")), "fsdp_tp": jax.P(("data", "fsdp")),
         "context": jax.P("data", "tensor")}
total = jax.jit(lambda b: sum(jax.numpy.sin(0.1 * v + 1).mean() for v in b.values()))
for name, spec in specs.items():
    layout = BatchLayout(8, 8, jax.NamedSharding(mesh, spec))
    loader = Loader(Windows(corpus, 8), layout, seed=5)
    if len(sys.argv) > 1:
        loader.set_state(json.loads(sys.argv[1]))
    found = {"layout": name, "rows": len(layout.rows), "losses": [], "inputs": []}
    for batch in [next(loader) for _ in range(3)]:
        found["losses"].append(float(total(batch)))
        whole = multihost_utils.process_allgather(batch["inputs"], tiled=True)
        found["inputs"].append(whole.tolist())
    print(json.dumps({**found, "state": loader.get_state()}))
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


def results(run_local, folder: Path, processes: int, *args: str) -> dict[str, list[dict]]:
    """What each process found, by layout."""
    path = folder / "program.py"
    path.write_text(PROGRAM)
    done = run_local(processes, 8 // processes, path, *args)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line.partition("] ")[2]) for line in done.stdout.splitlines()]
    found = {n: [x for x in lines if x["layout"] == n] for n in ("dp", "fsdp_tp", "context")}
    assert all(len(each) == processes for each in found.values())
    return found


def test_batches_are_the_same_on_1_2_and_4_processes(run_local, tmp_path: Path) -> None:
    found = {n: results(run_local, tmp_path, n) for n in (1, 2, 4)}
    for layout, reference in found[1].items():
        for n, on_n in found.items():
            for result in on_n[layout]:
                # The losses are sums over processes, which may be added up in another order.
                losses = pytest.approx(reference[0]["losses"], rel=1e-6)
                assert {**result, "rows": 8} == {**reference[0], "losses": losses}
                held = 8 // n if layout != "context" else max(4, 8 // n)
                assert result["rows"] == held
    everywhere = [x["inputs"] for on_n in found.values() for each in on_n.values() for x in each]
    assert all(x == everywhere[0] for x in everywhere)


def test_a_state_moves_to_another_number_of_processes(run_local, tmp_path: Path) -> None:
    first = results(run_local, tmp_path, 2)["context"][0]
    assert first["state"]["batches"] == 3
    again = {n: results(run_local, tmp_path, n, json.dumps(first["state"])) for n in (1, 4)}
    assert again[1]["dp"][0]["inputs"] == again[4]["fsdp_tp"][3]["inputs"] != first["inputs"]


def test_processes_with_different_corpora_are_named(run_local, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(DIFFERENT)
    done = run_local(4, 1, path)
    assert done.returncode == 1
    assert "CorpusMismatchError: mine: expected the same corpus on every process" in done.stderr
    assert "on process 2, 3;" in done.stderr
