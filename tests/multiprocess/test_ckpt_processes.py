"""Checkpoints of two real processes: written together, read on any topology.

This file is also the script that the processes run: `test_ckpt_processes.py MODE FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if __name__ != "__main__":
    pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]


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


def run_save(folder: Path) -> None:
    """Saves three steps of which two are kept, and reads one in another layout."""
    from shardflax.ckpt import CheckpointManager

    with CheckpointManager(folder, keep=2, timeout=60) as manager:
        for step in (1, 2, 3):
            assert manager.save(step, placed((2, 4)), extras={"step": step})
        restored = manager.restore(zeros_like(placed((4, 2), transposed=True)))
        assert (restored.step, restored.extras, manager.all_steps()) == (3, {"step": 3}, [2, 3])
        assert_identical(restored.state, placed((4, 2), transposed=True))


def run_restore(folder: Path) -> None:
    """Reads what one process wrote; another model is refused everywhere."""
    from shardflax.ckpt import CheckpointManager, CheckpointMismatchError

    want = placed((2, 4), transposed=True)
    with CheckpointManager(folder, timeout=60) as manager:
        assert_identical(manager.restore(zeros_like(want)).state, want)
        with pytest.raises(CheckpointMismatchError, match="missing  more"):
            manager.restore({**zeros_like(want), "more": 1})
        manager.delete(1)
        assert manager.latest_step() is None


def run_leave(folder: Path) -> None:
    """Ends right after `save`, without a wait or a close."""
    from shardflax.ckpt import CheckpointManager

    manager = CheckpointManager(folder, timeout=60)
    manager.save(9, placed((2, 4)))


def run_blind(folder: Path) -> None:
    """Each process has a folder of its own."""
    import jax

    from shardflax.ckpt import CheckpointFolderError, CheckpointManager

    with pytest.raises(CheckpointFolderError, match="processes 1 do not see"):
        CheckpointManager(folder / str(jax.process_index()))


ELASTIC = {"w": ("vocab", "embed"), "up": ("embed", "mlp"), "odd": (None,)}


def by_preset(preset: str, spec: str) -> dict[str, Any]:
    """A state of some sizes, laid out by names, under a preset on a mesh."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from shardflax import partitioning

    mesh, rules = partitioning.make_mesh(spec), partitioning.preset(preset)
    made: dict[str, Any] = {}
    for name, names in ELASTIC.items():
        shape = (7,) if name == "odd" else (64, 32) if name == "w" else (32, 16384)
        value = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
        laid: Any = partitioning.logical_to_mesh_axes(names, rules)
        sharding = NamedSharding(mesh, laid)
        made[name] = jax.make_array_from_callback(shape, sharding, lambda i, v=value: v[i])
    return made


def run_elastic(folder: Path) -> None:
    """Small and large leaves under fsdp_tp; one of its own for each process."""
    import jax

    from shardflax.ckpt import CheckpointManager

    with CheckpointManager(folder, timeout=60) as manager:
        state = by_preset("fsdp_tp", "fsdp=4,tensor=2")
        manager.save(1, state, process_extras={"me": jax.process_index()})
        restored = manager.restore(zeros_like(by_preset("fsdp", "fsdp=8")), fallback=True)
        assert restored.process_extras == ({"me": 0}, {"me": 1})
        assert_identical(restored.state, by_preset("fsdp", "fsdp=8"))


def run(mode: str, folder: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Two processes with four devices each, until both end."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", "--processes", "2", "--devices", "4", "--",
         __file__, mode, str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_written_by_two_processes_read_by_one(tmp_path: Path) -> None:
    from shardflax.ckpt import CheckpointManager

    done = run("save", tmp_path / "run")
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr
    with CheckpointManager(tmp_path / "run") as manager:
        assert manager.all_steps() == [2, 3]
        for shape in ((2, 4), (1, 8), (8, 1)):
            want = placed(shape)
            assert_identical(manager.restore(zeros_like(want)).state, want)


def test_written_under_one_preset_read_under_others(tmp_path: Path) -> None:
    from shardflax.ckpt import load_checkpoint

    run("elastic", tmp_path / "run")
    step = tmp_path / "run" / "1"
    for preset, spec in (
        ("dp", "data=8"), ("fsdp", "data=2,fsdp=4"), ("tp_sp", "data=2,tensor=4"),
        ("fsdp_tp", "data=2,fsdp=2,tensor=2"), ("hsdp", "data=4,fsdp=2"),
    ):  # fmt: skip
        want = by_preset(preset, spec)
        assert_identical(load_checkpoint(step, zeros_like(want)).state, want)
    host = load_checkpoint(step).state
    assert all((host[name] == value).all() for name, value in want.items())


def test_written_by_one_process_read_by_two(tmp_path: Path) -> None:
    from shardflax.ckpt import CheckpointManager

    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, placed((4, 2)))
    run("restore", tmp_path / "run")


def test_processes_that_end_without_waiting_commit(tmp_path: Path) -> None:
    from shardflax.ckpt import CheckpointManager

    done = run("leave", tmp_path / "run")
    with CheckpointManager(tmp_path / "run") as manager:
        if sys.version_info[:3] in ((3, 12, 0), (3, 12, 1)):  # these start no thread at exit
            assert manager.all_steps() == [9] or "lost at exit" in done.stderr
        else:
            assert_identical(manager.restore(zeros_like(placed((1, 8)))).state, placed((1, 8)))


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    run("blind", tmp_path)


if __name__ == "__main__":
    from launch.distributed import initialize_from_env

    initialize_from_env()
    globals()[f"run_{sys.argv[1]}"](Path(sys.argv[2]))
