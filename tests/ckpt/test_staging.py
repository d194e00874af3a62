"""What blocks in a save: on the CPU, nothing is copied, and nothing that is donated is lost."""

import io
import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax.ckpt import CheckpointManager
from shardflax.ckpt.plan import make_plan
from shardflax.ckpt.rendezvous import Rendezvous
from shardflax.ckpt.staging import Staged, stage


def spread(value: Any, *spec: Any) -> jax.Array:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


def staged_of(state: Any) -> list[Staged]:
    plan, leaves = make_plan(state)
    return [staged for parcel in plan.parcels for staged in stage(parcel, leaves)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn", "bool"])
@pytest.mark.parametrize("spec", [("a", "b"), (None, ("a", "b")), ()])
def test_buffers_are_held_and_outlive_a_donation(dtype: str, spec: tuple[Any, ...]) -> None:
    values = (np.arange(64 * 64).reshape(64, 64) % 5).astype(jnp.dtype(dtype))
    own = jax.jit(jnp.copy)  # on buffers of JAX
    array, other = jax.block_until_ready((own(spread(values, *spec)), own(spread(values, *spec))))
    want = np.array(array)
    places = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
    staged = staged_of({"w": array})
    views = [view for item in staged for view in item.arrays()]
    assert {view.ctypes.data for view in views} <= places
    assert not any(item.moving for item in staged)
    step = jax.jit(lambda x: jnp.where(x == 0, x, 0).astype(x.dtype), donate_argnums=0)
    got = jax.block_until_ready((step(array), step(other)))
    assert other.is_deleted(), "the step donates what nobody holds on to"
    assert not any(np.asarray(x).any() for x in got)
    for item in staged:
        for piece, view in zip(item.lot.pieces, item.arrays(), strict=True):
            np.testing.assert_array_equal(view, want[piece.box.slices])


def test_arrays_of_numpy_are_copied() -> None:
    host = np.arange(5)
    (staged,) = staged_of({"w": host})
    host[:] = -1
    assert staged.arrays()[0].tolist() == [0, 1, 2, 3, 4]


def test_a_save_calls_no_file_system_and_waits_for_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the thread that calls it; that others do it shows that it is noticed."""
    saving, here, elsewhere = [False], list[str](), list[str]()
    caller = threading.get_ident()

    def notice(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noticed(*args: Any, **options: Any) -> Any:
            if saving[0]:
                (here if threading.get_ident() == caller else elsewhere).append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, noticed)

    for name in ("open", "stat", "mkdir", "listdir", "scandir", "rename", "unlink", "fsync"):
        notice(os, name)
    notice(io, "open")
    for name in ("tell", "hear", "peek", "gather"):
        notice(Rendezvous, name)
    state = {"w": spread(jnp.ones((64, 64)), "a", "b"), "host": np.ones(5), "step": 3}
    with CheckpointManager(tmp_path) as manager:
        for step in range(3):
            saving[0] = True
            manager.save(step, state)
            saving[0] = False
            manager.wait()
        assert here == []
        saving[0] = True
        manager.save(3, state)
        manager.wait()
        saving[0] = False
    assert {"open", "stat", "mkdir", "rename", "fsync", "tell"} <= set(elsewhere)
