"""Two processes save at the same steps: because time has passed, and because one is to stop.

This file is also the script that the processes run: `test_ckpt_when.py FOLDER`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if __name__ != "__main__":
    pytestmark = pytest.mark.multiprocess


def main(folder: Path) -> dict[str, Any]:
    """What one process has seen."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from shardflax.ckpt import CheckpointManager
    from shardflax.ckpt.timer import Timer

    first = jax.process_index() == 0
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    state = jax.make_array_from_callback(
        (4,), NamedSharding(mesh, PartitionSpec("a")), lambda index: jnp.arange(4.0)[index]
    )
    seen: dict[str, Any] = {"index": jax.process_index(), "saved": []}
    with CheckpointManager(
        folder, save_every=100, temporary_every=60, preemptible=True, timeout=300
    ) as manager:
        # Process 0's clock goes on by 7 s a step, the other one stands still.
        step = 0
        manager._timer = Timer(60, manager._meeting, (lambda: 7.0 * step) if first else float)
        for step in range(1, 41):
            if manager.save(step, {"w": state}) is not None:
                seen["saved"].append(step)
        manager.wait()
        seen["steps"] = manager.all_steps()
        manager._timer = None

        # One of them evaluates when it is told; the other one compiles.  A second manager, for an
        # average of the weights, say, asks less often.
        other = CheckpointManager(folder.parent / "other", preemptible=True, timeout=300)
        batches, evaluate = 0, jax.jit(lambda x: x.sum())
        while not manager.reached_preemption():
            batches += 1
            if batches % 3 == 0 and other.reached_preemption():
                break
            jax.block_until_ready(evaluate(state))  # keeps them in step
            if batches == 1 and first:
                jax.jit(lambda x: sum(jnp.sin(x * i) for i in range(100))).lower(1.0).compile()
            elif batches == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
        seen["batches"] = batches
        assert manager.reached_preemption() and other.reached_preemption()
        other.close()
        assert manager.save(41, {"w": state}) is not None
        assert manager.reached_preemption(41)
    seen["after"] = manager.all_steps()
    return seen


def test_two_processes_save_at_the_same_steps(
    tmp_path: Path, run_quick: Callable[..., Any]
) -> None:
    done = run_quick(2, 1, __file__, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1))
    assert one.pop("index") != two.pop("index")
    assert one == two
    assert 3 <= len(one["saved"]) <= 5 and one["steps"] == one["saved"][-1:]
    assert one["batches"] >= 1 and one["after"] == [41]


if __name__ == "__main__":
    from launch.distributed import initialize_from_env

    initialize_from_env()
    where = Path(sys.argv[1])
    found = main(where)
    (where.parent / f"{found['index']}.json").write_text(json.dumps(found))
