"""The order of examples does not depend on how many processes read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
for begin in [None, *map(json.loads, sys.argv[1:])]:
    for name, spec in specs.items():
        layout = BatchLayout(8, 8, jax.NamedSharding(mesh, spec))
        loader = Loader(Windows(corpus, 8), layout, seed=5)
        if begin is not None:
            loader.set_state(begin)
        found = {"layout": name, "again": begin is not None, "rows": len(layout.rows)}
        batches = [next(loader) for _ in range(3)]
        found["losses"] = [float(total(batch)) for batch in batches]
        inputs = [multihost_utils.process_allgather(b["inputs"], tiled=True) for b in batches]
        found |= {"inputs": np.array(inputs).tolist(), "state": loader.get_state()}
        print(json.dumps(found))

corpus = Corpus.of("mine", ["x" * (100 + jax.process_index() // 2)])
try:
    Loader(Windows(corpus, 8), BatchLayout(8, 8, jax.NamedSharding(mesh, specs["dp"])))
except Exception as error:
    print("error", type(error).__name__, error)
"""


Results = dict[str, list[dict[str, Any]]]


def results(run_quick: Callable[..., Any], folder: Path, processes: int, *args: str) -> Any:
    """What each process found, by layout; the same from a state; what it said of a wrong corpus."""
    path = folder / "program.py"
    path.write_text(PROGRAM)
    done = run_quick(processes, 8 // processes, path, *args)
    assert done.returncode == 0, done.stderr
    said = [line.partition("] ")[2] for line in done.stdout.splitlines()]
    lines = [json.loads(line) for line in said if line[0] == "{"]
    names = ("dp", "fsdp_tp", "context")
    found, again = (
        {n: [x for x in lines if x["layout"] == n and x["again"] is after] for n in names}
        for after in (False, True)
    )
    assert all(len(each) == processes for each in found.values())
    return found, again, [line for line in said if line[0] != "{"]


def test_batches_are_the_same_on_1_2_and_4_processes(
    run_quick: Callable[..., Any], tmp_path: Path
) -> None:
    two, _, _ = results(run_quick, tmp_path, 2)
    state = json.dumps(two["context"][0]["state"])
    ran = {n: results(run_quick, tmp_path, n, state) for n in (1, 4)}
    found: dict[int, Results] = {2: two, **{n: ran[n][0] for n in ran}}
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

    # A state moves to another number of processes.
    assert two["context"][0]["state"]["batches"] == 3
    (_, one, _), (_, four, said) = ran[1], ran[4]
    assert one["dp"][0]["inputs"] == four["fsdp_tp"][3]["inputs"] != everywhere[0]

    # Processes with other texts are named.
    assert len(said) == 4
    for line in said:
        assert "error CorpusMismatchError mine: expected the same corpus on every process" in line
        assert "on process 2, 3;" in line
