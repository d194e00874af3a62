"""`training.checkpoints` with two real processes: arrays that no process holds whole.

This file is also the script that the processes run: `test_checkpoints.py FOLDER`.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

if __name__ != "__main__":
    pytestmark = pytest.mark.multiprocess


def value() -> Any:
    import numpy as np

    return np.arange(16.0, dtype=np.float32).reshape(8, 2)


def run(folder: Path) -> None:
    """Saves and restores in every way; each process checks what it gets."""
    import jax
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.experimental.array_serialization import serialization
    from jax.sharding import NamedSharding, PartitionSpec

    from shardflax import config, errors
    from shardflax.partitioning import make_mesh
    from shardflax.training import checkpoints

    mesh = make_mesh("fsdp=4")
    rows, columns = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("fsdp",), (None,)))
    big = jax.make_array_from_callback((8, 2), rows, lambda index: value()[index])
    state = {"big": big, "inner": {"step": 1, "pair": (big,)}, "opt": optax.EmptyState()}

    def whole(x: Any) -> bool:
        return all(np.array_equal(s.data, value()[s.index]) for s in x.addressable_shards)

    def refused(error: type[Exception], call: Any, *args: Any, **options: Any) -> None:
        try:
            call(*args, **options)
        except error:
            return
        raise AssertionError(f"{error.__name__} was not raised")

    # Orbax's format.
    for step in (1, 2, 3):
        checkpoints.save_checkpoint_multiprocess(folder / "orbax", state, step, keep=2)
    assert checkpoints.available_steps(folder / "orbax") == [2, 3]
    other = jax.ShapeDtypeStruct((8, 2), np.float32, sharding=columns)
    restored = checkpoints.restore_checkpoint(folder / "orbax", {**state, "big": other})
    assert restored["big"].sharding == columns
    assert whole(restored["big"])
    assert whole(restored["inner"]["pair"][0])
    refused(errors.InvalidCheckpointError, checkpoints.save_checkpoint_multiprocess,
            folder / "orbax", state, 2)  # fmt: skip

    # MessagePack, with the arrays beside it.
    config.update("flax_use_orbax_checkpointing", False)
    path, manager = folder / "msgpack", serialization.GlobalAsyncCheckpointManager()
    save, restore = checkpoints.save_checkpoint_multiprocess, checkpoints.restore_checkpoint
    refused(errors.MPACheckpointingRequiredError, save, path, state, 1)
    refused(errors.MPACheckpointingRequiredError, checkpoints.save_checkpoint, path, state, 1)
    for step in (1, 2, 3):
        save(path, state, step, keep=2, gda_manager=manager)
    manager.wait_until_finished()
    assert checkpoints.available_steps(path) == [2, 3]
    restored = restore(path, {**state, "big": other}, gda_manager=manager)
    assert restored["big"].sharding == columns
    assert whole(restored["big"])
    assert whole(restored["inner"]["pair"][0])
    refused(errors.MPACheckpointingRequiredError, restore, path, state)
    refused(errors.MPARestoreTargetRequiredError, restore, path, None, gda_manager=manager)
    partial = restore(path, None, gda_manager=manager, allow_partial_mpa_restoration=True)
    assert partial["inner"]["step"] == 1
    wrong = {**state, "big": jax.ShapeDtypeStruct((4, 2), np.float32, sharding=rows)}
    refused(errors.MPARestoreTypeNotMatchError, restore, path, wrong, gda_manager=manager)
    multihost_utils.sync_global_devices("read")
    if jax.process_index() == 0:
        (path / "checkpoint_3_gda" / "big" / ".zarray").unlink()
    multihost_utils.sync_global_devices("removed")
    refused(errors.MPARestoreDataCorruptedError, restore, path, state, gda_manager=manager)
    flax_reads(path, state, manager, whole)


def flax_reads(path: Path, state: Any, manager: Any, whole: Any) -> None:
    """Flax restores our files, and we its."""
    import warnings

    import flax
    from flax.training import checkpoints as theirs

    from shardflax.training import checkpoints

    warnings.simplefilter("ignore", DeprecationWarning)
    flax.config.update("flax_use_orbax_checkpointing", False)
    assert whole(theirs.restore_checkpoint(path, state, step=2, gda_manager=manager)["big"])
    theirs.save_checkpoint_multiprocess(path / "theirs", state, 5, gda_manager=manager)
    manager.wait_until_finished()
    restored = checkpoints.restore_checkpoint(path / "theirs", state, gda_manager=manager)
    assert whole(restored["inner"]["pair"][0])


def test_arrays_of_two_processes(run_quick: Any, tmp_path: Path) -> None:
    done = run_quick(2, 2, __file__, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    from launch.distributed import initialize_from_env

    initialize_from_env()
    run(Path(sys.argv[1]))
