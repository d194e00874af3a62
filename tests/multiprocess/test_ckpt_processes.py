"""Checkpoints of two real processes: written together, read on any topology.

This file is also the script that the processes run: `test_ckpt_processes.py FOLDER`.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if __name__ != "__main__":
    pytestmark = pytest.mark.multiprocess


def host_state() -> dict[str, Any]:
    """What is saved, on the host; the same in every process."""
    import numpy as np

    rng = np.random.default_rng(7)
    return {
        "w": rng.normal(size=(16, 24)).astype(np.float32),
        "layers": {"kernel": rng.normal(size=(2, 8, 16)).astype(np.float32)},
        "bias": rng.normal(size=8).astype(np.float32),
        "count": np.int32(41),
    }


def placed(shape: tuple[int, int], transposed: bool = False) -> dict[str, Any]:
    """The state on a mesh over all devices of all processes, with a PRNG key and host leaves."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    axes = ("b", "a") if transposed else ("a", "b")
    state = host_state()

    def put(value: Any, *spec: Any) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    everywhere = NamedSharding(mesh, PartitionSpec())
    return {
        "w": put(state["w"], *axes),
        "layers": {"kernel": put(state["layers"]["kernel"], None, *axes)},
        "half": put(state["w"].astype(jnp.bfloat16), None, axes),
        "bias": put(state["bias"]),
        "count": put(state["count"]),
        "key": jax.jit(lambda: jax.random.key(5), out_shardings=everywhere)(),
        "local": jnp.arange(3),
        "numpy": state["bias"] * 2,
        "python": 17,
    }


def zeros_like(tree: Any) -> Any:
    """The same types and layouts without the values."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def zero(x: Any) -> Any:
        if isinstance(x, jax.Array) and x.committed:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return jnp.zeros_like(x) if isinstance(x, jax.Array) else np.zeros_like(x)[()] * x

    return jax.tree.map(zero, tree)


def assert_identical(got: Any, want: Any) -> None:
    """Equal sharding, dtype and bits of what this process holds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def shards(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return [np.asarray(x).tobytes()]
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return [np.asarray(s.data).tobytes() for s in x.addressable_shards]

    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        if isinstance(b, jax.Array):
            assert (a.sharding, a.dtype) == (b.sharding, b.dtype), path
        assert shards(a) == shards(b), path


def run_blind(folder: Path) -> None:
    """Each process has a folder of its own."""
    import jax

    from shardflax.ckpt import CheckpointFolderError, CheckpointManager

    with pytest.raises(CheckpointFolderError, match="processes 1 do not see"):
        CheckpointManager(folder / str(jax.process_index()))


def run_restore(folder: Path) -> None:
    """Reads what one process wrote; another model is refused everywhere."""
    from shardflax.ckpt import CheckpointManager, CheckpointMismatchError

    want = placed((2, 4), transposed=True)
    with CheckpointManager(folder, timeout=300) as manager:
        assert_identical(manager.restore(zeros_like(want)).state, want)
        with pytest.raises(CheckpointMismatchError, match="missing  more"):
            manager.restore({**zeros_like(want), "more": 1})
        manager.delete(1)
        assert manager.latest_step() is None


def run_save(folder: Path) -> None:
    """Saves three steps of which two are kept, and reads one in another layout."""
    import jax

    from shardflax.ckpt import CheckpointManager

    mine = {"me": jax.process_index()}
    with CheckpointManager(folder, keep=2, timeout=300) as manager:
        for step in (1, 2, 3):
            state = placed((2, 4))
            assert manager.save(step, state, extras={"step": step}, process_extras=mine)
        want = placed((4, 2), transposed=True)
        restored = manager.restore(zeros_like(want), fallback=True)
        assert (restored.step, restored.extras, manager.all_steps()) == (3, {"step": 3}, [2, 3])
        assert restored.process_extras == ({"me": 0}, {"me": 1})
        assert_identical(restored.state, want)


def run_damaged(folder: Path) -> None:
    """What one process cannot read is an error in both; both fall back to the same step."""
    import jax
    from jax.experimental import multihost_utils

    from shardflax.ckpt import CheckpointManager, CheckpointReadError

    with CheckpointManager(folder, timeout=300) as manager:
        for step in (1, 2):
            manager.save(step, placed((2, 4)))
        manager.wait()
        multihost_utils.sync_global_devices("saved")
        if jax.process_index() == 0:
            path = next((folder / "2/state/ocdbt.process_1/d").iterdir())
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 1
            path.write_bytes(data)
        multihost_utils.sync_global_devices("damaged")
        want = placed((2, 4))
        with pytest.raises(CheckpointReadError, match="Step 2"):
            manager.restore(zeros_like(want))
        restored = manager.restore(zeros_like(want), fallback=True)
        assert restored.step == 1
        assert_identical(restored.state, want)


def run_elastic(folder: Path) -> None:
    from tests.multiprocess import elastic

    elastic.write(folder)


def global_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """What of a state Orbax can save with several processes."""
    return {name: x for name, x in state.items() if name not in ("local", "numpy", "python")}


def run_orbax(folder: Path) -> None:
    """Orbax, its standard and its new API, reads ours, and we read what they wrote."""
    import logging

    import orbax.checkpoint as ocp
    from orbax.checkpoint.experimental import v1

    from shardflax.ckpt import CheckpointManager

    logging.disable(logging.WARNING)
    state = global_arrays(placed((2, 4)))
    want = global_arrays(placed((4, 2), transposed=True))
    with CheckpointManager(folder / "ours", timeout=300) as manager:
        manager.save(7, state, extras={"seen": 1})
    with ocp.StandardCheckpointer() as checkpointer:
        assert_identical(checkpointer.restore(folder / "ours/7/state", zeros_like(want)), want)
        checkpointer.save(folder / "standard" / "7", state)
    assert_identical(v1.load_pytree(folder / "ours/7", zeros_like(want)), want)
    v1.save_pytree(folder / "v1" / "7", state)
    plain = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
    with ocp.Checkpointer(plain) as checkpointer:
        checkpointer.save(folder / "zarr2" / "7", state)
    for kind in ("standard", "v1", "zarr2"):
        with CheckpointManager(folder / kind, read_only=True, timeout=300) as manager:
            assert_identical(manager.restore(zeros_like(want)).state, want)
    logging.disable(logging.NOTSET)


def run_apart(folder: Path) -> None:
    """Arrays on devices of one process: the second's alone, and each its own; and none at all."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from shardflax.ckpt import CheckpointManager

    def on(devices: Any, value: Any) -> Any:
        sharding = NamedSharding(Mesh(np.array(devices), ("a",)), PartitionSpec("a"))
        index: Any = value.__getitem__
        return jax.make_array_from_callback(value.shape, sharding, index, dtype=value.dtype)

    value, second = np.arange(8.0, dtype=np.float32), [d for d in jax.devices() if d.process_index]
    state = {
        "second": on(second, value),
        "large": on(second, np.ones((4, 1 << 17), np.float32)),
        "own": on(jax.local_devices(), -value),
        **placed((2, 4)),
    }
    with CheckpointManager(folder, timeout=300) as manager:
        manager.save(1, state)
        assert_identical(manager.restore(state).state, state)
        manager.save(2, {"name": "nothing else"})
        assert manager.restore().state == {"name": "nothing else"}


def run_leave(folder: Path) -> None:
    """Ends right after `save`, without a wait or a close."""
    from shardflax.ckpt import CheckpointManager

    manager = CheckpointManager(folder, timeout=300)
    manager.save(9, placed((2, 4)))


PARTS = ("blind", "restore", "save", "damaged", "elastic", "orbax", "apart", "leave")


def run_parts(folder: Path) -> None:
    """All parts, each in a folder of its own; the last one ends the process."""
    for part in PARTS:
        globals()[f"run_{part}"](folder / part)
        print("done:", part, flush=True)


# --- the tests


@pytest.fixture(scope="module")
def ran(nursery: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two processes of four devices have done all parts: their folder and their words."""
    from shardflax.ckpt import CheckpointManager

    folder = tmp_path_factory.mktemp("run")
    with CheckpointManager(folder / "restore") as manager:
        manager.save(1, placed((4, 2)))
    done = nursery.run(2, 4, __file__, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def is_done(done: subprocess.CompletedProcess[str], part: str) -> bool:
    """True if both processes have passed all checks of a part."""
    return all(f"[{process}] done: {part}" in done.stdout for process in range(2))


def test_each_process_checked_what_it_read(ran: Any) -> None:
    """What one process wrote, what two wrote, in other layouts; damage; folders not shared."""
    _, done = ran
    assert all(is_done(done, part) for part in PARTS), done.stdout
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr


def test_what_the_second_process_has_alone_is_there(ran: Any) -> None:
    import numpy as np

    from shardflax import ckpt

    assert ckpt.verify_checkpoint(ran[0] / "apart", 1).ok
    state = ckpt.load_checkpoint(ran[0] / "apart" / "1").state
    assert (state["second"] == np.arange(8)).all() and (state["own"] == -np.arange(8)).all()
    assert state["large"].sum() == 4 << 17


def test_written_by_two_processes_read_by_one(ran: Any) -> None:
    from shardflax.ckpt import CheckpointManager

    with CheckpointManager(ran[0] / "save") as manager:
        assert manager.all_steps() == [2, 3]
        for shape in ((2, 4), (1, 8), (8, 1)):
            want = placed(shape)
            assert_identical(manager.restore(zeros_like(want)).state, want)


def test_written_under_fsdp_tp_read_on_any_devices_under_every_preset(
    ran: Any, run_quick: Any
) -> None:
    """On 1 x 8 here; on 4 x 2, 1 x 1 and 1 x 16 by other processes."""
    from tests.multiprocess import elastic

    folder = ran[0] / "elastic"
    elastic.read(folder)
    for processes, devices in ((4, 2), (1, 1), (1, 16)):
        done = run_quick(processes, devices, elastic.__file__, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"read on {processes} x {devices}" in done.stdout


def test_orbaxs_of_two_processes_are_read_by_one(ran: Any) -> None:
    from shardflax.ckpt import CheckpointManager

    want = global_arrays(placed((1, 8)))
    for kind in ("ours", "standard", "v1", "zarr2"):
        with CheckpointManager(ran[0] / "orbax" / kind, read_only=True) as manager:
            assert_identical(manager.restore(zeros_like(want)).state, want)


def test_processes_that_end_without_waiting_commit(ran: Any) -> None:
    from shardflax.ckpt import CheckpointManager

    folder, done = ran
    with CheckpointManager(folder / "leave") as manager:
        if sys.version_info[:3] in ((3, 12, 0), (3, 12, 1)):  # these start no thread at exit
            assert manager.all_steps() == [9] or "lost at exit" in done.stderr
        else:
            assert_identical(manager.restore(zeros_like(placed((1, 8)))).state, placed((1, 8)))


if __name__ == "__main__":
    from launch.distributed import initialize_from_env

    initialize_from_env()
    run_parts(Path(sys.argv[1]))
