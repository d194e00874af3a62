"""Saving and restoring in one process: values, layouts, policy, errors."""

import dataclasses
import functools
import json
import os
import shutil
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shardflax import ckpt
from shardflax.core.boxes import AxisMetadata
from shardflax.training.train_state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named(AxisMetadata):
    """A box with names."""

    value: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Named":
        return Named(val, self.names)

    def add_axis(self, index: int, params: Any) -> "Named":
        return self

    def remove_axis(self, index: int, params: Any) -> "Named":
        return self


def place(tree: Any, shape: tuple[int, int], spec: Any) -> Any:
    """The arrays of a tree on a 2-dim mesh: rank 2 by `spec`, the rest replicated."""
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def put(x: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec()))

    return jax.tree.map(put, tree)


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@functools.cache
def train_state(seed: int = 0) -> TrainState:
    """An adamw state with a step in it, f32 and bf16 parameters."""
    return _new_state(jnp.int32(seed))


@jax.jit
def _new_state(seed: jax.Array) -> TrainState:
    key = jax.random.key(seed)
    params = {
        "dense": {"kernel": jax.random.normal(key, (16, 8)), "bias": jnp.ones(8, jnp.bfloat16)},
        "embed": jax.random.normal(key, (8, 16)).astype(jnp.bfloat16),
    }
    state = TrainState.create(apply_fn=None, params=params, tx=TX)
    return state.apply_gradients(grads=state.params)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_identical(got: Any, want: Any) -> None:
    """Same structure, types, dtypes, shardings and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert isinstance(a, type(b)), where
        if isinstance(b, jax.Array):
            assert (a.dtype, a.sharding, a.committed) == (b.dtype, b.sharding, b.committed), where
        if hasattr(b, "dtype") and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if isinstance(b, jax.Array | np.ndarray | np.generic):
            a, b = np.asarray(a).tobytes(), np.asarray(b).tobytes()
        assert a == b, where


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize("as_shapes", [True, False], ids=["abstract", "arrays"])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 4), PartitionSpec("b", "a")),
        ((1, 8), PartitionSpec(None, "b")),
        ((8, 1), PartitionSpec(("a", "b"))),
        ((2, 2), PartitionSpec("a", "b")),
    ],
    ids=str,
)
def test_a_train_state_comes_back_bit_for_bit_in_another_layout(
    folder: Path, shape: tuple[int, int], spec: Any, as_shapes: bool
) -> None:
    state = place(train_state(), (2, 4), PartitionSpec("a", "b"))
    with ckpt.CheckpointManager(folder) as manager:
        assert manager.save(1, state)
        want = place(state, shape, spec)
        other = place(train_state(1), shape, spec)
        restored = manager.restore(abstract(other) if as_shapes else other)
    assert_identical(restored.state, want)
    assert (restored.step, restored.extras) == (1, {})


def test_every_kind_of_leaf_comes_back_in_its_own_type(folder: Path) -> None:
    state = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), (2, 3)),
        "bools": jnp.array([True, False]),
        "int8": jnp.int8(-3),
        "big": jnp.asarray(16777217, jnp.int32),
        "uint": jnp.arange(5, dtype=jnp.uint32),
        "half": jnp.arange(3, dtype=jnp.float16),
        "bf16": jnp.arange(3, dtype=jnp.bfloat16),
        "fp8": jnp.ones(4, jnp.float8_e4m3fn),
        "int4": jnp.arange(4, dtype=jnp.int4),
        "complex": jnp.ones(2, jnp.complex64) * 1j,
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "no_keys": jax.random.split(jax.random.key(0), 0),
        "numpy64": np.array([0.1, 0.2]),
        "numpy_empty": np.zeros((2, 0), np.int64),
        "numpy_scalar": np.float64(0.1),
        "python": [True, 3, 2**80, 0.1, float("inf"), 1 - 2j],
        "nothing": None,
        "no_leaves": {"a": (), "b": optax.EmptyState()},
        "named": optax.ScaleByAdamState(
            jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, [jnp.ones(3)]
        ),
    }
    zeros = jax.tree.map(lambda x: x, state)
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(0, state)
        restored = manager.restore(zeros).state
    assert_identical(restored, state)
    assert [type(x) for x in restored["python"]] == [bool, int, int, float, float, complex]


def test_weak_types_of_scalars_come_back_so_that_nothing_is_traced_again(folder: Path) -> None:
    traces = []

    @jax.jit
    def step(state: TrainState) -> TrainState:
        traces.append(1)
        return state.apply_gradients(grads=state.params)

    state = place(train_state(), (2, 4), PartitionSpec("a", "b"))
    state = step(step(state))
    before = len(traces)
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, state)
        step(manager.restore(state).state)
    assert len(traces) == before


def test_a_python_step_meets_an_array_step_exactly_or_not_at_all(folder: Path) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, {"step": 300, "rate": 0.1})
        got = manager.restore({"step": jnp.int32(0), "rate": jnp.float32(0)}).state
        assert (int(got["step"]), got["step"].dtype, float(got["rate"])) == (
            300,
            jnp.int32,
            float(np.float32(0.1)),
        )
        with pytest.raises(ckpt.CheckpointMismatchError, match=r"step.*int \(Python\).*int8\[\]"):
            manager.restore({"step": jnp.int8(0), "rate": 0.0})
        with pytest.raises(ckpt.CheckpointMismatchError, match="step"):
            manager.restore({"step": jnp.float32(0), "rate": 0.0})
        manager.save(2, {"step": jnp.int32(7), "rate": jnp.float32(0.5)})
        assert manager.restore({"step": 0, "rate": 0.0}).state == {"step": 7, "rate": 0.5}


def test_the_tree_on_disk_does_not_depend_on_boxes(folder: Path) -> None:
    plain = {"w": jnp.arange(6.0).reshape(2, 3)}
    boxed = {"w": Named(plain["w"], ("embed", "mlp"))}
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, boxed)
        manager.save(2, plain)
        manager.wait()
        one, two = ((folder / f"{i}/state/_METADATA").read_text() for i in (1, 2))
        assert one == two
        names = [json.loads((folder / f"{i}/MANIFEST.json").read_text())["body"]["leaves"][0]
                 ["names"] for i in (1, 2)]  # fmt: skip
        assert names == [["embed", "mlp"], None]
        assert_identical(manager.restore(plain, step=1).state, plain)
        assert_identical(manager.restore(boxed, step=2).state, boxed)


def test_stock_orbax_reads_our_steps(folder: Path) -> None:
    state = place(train_state(), (2, 4), PartitionSpec("a", "b"))
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(5, state, extras={"seen": 3})
    host = ocp.CheckpointManager(folder, item_handlers={"state": ocp.PyTreeCheckpointHandler()})
    assert host.latest_step() == 5
    tree = host.item_metadata(5)["state"].tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    got = host.restore(
        5, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(tree, restore_args=args))
    )["state"]
    host.close()
    np.testing.assert_array_equal(got["params"]["dense"]["kernel"], state.params["dense"]["kernel"])
    np.testing.assert_array_equal(
        got["opt_state"][1][0]["mu"]["embed"], state.opt_state[1][0].mu["embed"]
    )
    assert got["step"] == 1


def test_the_state_may_be_donated_and_host_arrays_changed_right_after_save(folder: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    values = np.arange(1024.0 * 1024, dtype=np.float32).reshape(1024, 1024)
    device = place({"w": jnp.asarray(values)}, (2, 4), PartitionSpec("a", "b"))
    host = values.copy()
    with ckpt.CheckpointManager(folder, keep=None) as manager:
        for i in range(4):
            manager.save(i, {"device": device, "host": host})
            host[:] = -1
            jax.block_until_ready(step(device))
            device = place({"w": jnp.asarray(values)}, (2, 4), PartitionSpec("a", "b"))
            host[:] = values
        for i in range(4):
            restored = manager.restore({"device": device, "host": host}, step=i).state
            np.testing.assert_array_equal(restored["device"]["w"], values)
            np.testing.assert_array_equal(restored["host"], values)


def test_extras_are_json_and_come_back(folder: Path) -> None:
    extras = {"data": {"position": [1, 2], "name": "a/é"}, "loss": 0.1, "big": 2**60, "none": None}
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, {"w": jnp.ones(1)}, extras=extras)
        assert manager.restore({"w": jnp.ones(1)}).extras == extras
        for bad, where in (({"a": [jnp.ones(1)]}, r"extras\['a'\]\[0\]"), ({"a": {1: 2}}, "key 1")):
            with pytest.raises(TypeError, match=where):
                manager.save(2, {"w": jnp.ones(1)}, extras=bad)
        assert manager.all_steps() == [1]


def test_only_committed_steps_are_visible(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds the rename back until the listing was looked at."""
    gate = threading.Event()
    rename = os.rename

    def held(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if str(target).endswith("/7"):
            gate.wait(300)
        rename(source, target, *args, **kwargs)

    with ckpt.CheckpointManager(folder) as manager:
        manager.save(3, {"w": jnp.ones(1)})
        manager.wait()
        monkeypatch.setattr(os, "rename", held)
        manager.save(7, {"w": jnp.ones(1)})
        seen = manager.latest_step(), manager.all_steps(), manager.pending_step
        gate.set()
        manager.wait()
        assert seen == (3, [3], 7)
        assert (manager.latest_step(), manager.pending_step) == (7, None)


def test_keep_policy(folder: Path) -> None:
    with ckpt.CheckpointManager(folder, keep=2, keep_every=20, save_every=5) as manager:
        saved = [
            step for step in range(1, 46) if manager.save(step, {"w": jnp.full(2, float(step))})
        ]
        manager.wait()
        assert saved == [5, 10, 15, 20, 25, 30, 35, 40, 45]
        assert manager.all_steps() == [20, 40, 45]
        assert manager.save(46, {"w": jnp.ones(2)}, force=True)
        assert not manager.save(46, {"w": jnp.ones(2)}, force=True)
        assert manager.restore({"w": jnp.ones(2)}, step=20).state["w"].tolist() == [20, 20]
    assert sorted(p.name for p in folder.iterdir()) == ["20", "40", "45", "46"]


def test_keep_none_keeps_all_and_bad_numbers_are_refused(folder: Path) -> None:
    with ckpt.CheckpointManager(folder, keep=None) as manager:
        for step in range(5):
            manager.save(step, {"w": jnp.ones(1)})
        manager.wait()
        assert manager.all_steps() == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="negative"):
            manager.save(-1, {"w": jnp.ones(1)})
    wrongs: list[dict[str, Any]] = [{"keep": 0}, {"save_every": 0}, {"keep_every": -2}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ckpt.CheckpointManager(folder, **wrong)


def test_a_step_of_another_run_is_not_overwritten(folder: Path) -> None:
    state = {"w": jnp.ones(1)}
    with ckpt.CheckpointManager(folder) as first:
        first.save(10, state)
        first.save(20, state)
    with ckpt.CheckpointManager(folder) as second:
        second.restore(state, step=10)
        assert not second.save(10, state)
        with pytest.raises(ckpt.CheckpointExistsError, match="Step 20"):
            second.save(20, {"w": jnp.zeros(1)})
        second.delete(20)
        assert second.save(20, {"w": jnp.zeros(1)})
        assert second.restore(state).state["w"].tolist() == [0.0]


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(folder: Path) -> None:
    saved = {
        "params": {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "same": jnp.ones(1)},
        "count": jnp.asarray(16777217, jnp.int32),
        "key": jax.random.key(0),
    }
    target = {
        "params": {"a": jnp.ones((2, 4)), "c": jnp.ones(4), "same": jnp.ones(1)},
        "count": jnp.float32(0),
        "key": jax.random.key(0, impl="rbg"),
    }
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, saved)
        manager.wait()
        shutil.rmtree(folder / "1" / "state")  # so that reading any array would fail
        with pytest.raises(ckpt.CheckpointMismatchError) as caught:
            manager.restore(target)
    assert caught.value.differences == (
        "dtype    count  saved int32[], target float32[]",
        "dtype    key  saved key<fry>[], target key<rbg>[]",
        "shape    params/a  saved float32[2,3], target float32[2,4]",
        "extra    params/b  saved float32[4] is not in the target",
        "missing  params/c  target float32[4] is not in the checkpoint",
    )
    assert str(folder) in str(caught.value) and "Step 1" in str(caught.value)


def test_an_optimizer_of_another_kind_is_a_mismatch(folder: Path) -> None:
    params = {"w": jnp.ones((4, 2))}
    states = [
        TrainState.create(apply_fn=len, params=params, tx=tx)
        for tx in (optax.adamw(0.1), optax.sgd(0.1, momentum=0.9))
    ]
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(0, states[0])
        with pytest.raises(ckpt.CheckpointMismatchError, match="opt_state/0/mu/w"):
            manager.restore(states[1])


def test_a_dtype_that_jax_would_narrow_is_a_mismatch(folder: Path) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(0, {"n": np.arange(3)})
        assert manager.restore({"n": np.zeros(3, np.int64)}).state["n"].tolist() == [0, 1, 2]
        with pytest.raises(ckpt.CheckpointMismatchError, match="jax_enable_x64"):
            manager.restore({"n": jax.ShapeDtypeStruct((3,), np.int64)})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"n": OrderedDict([(1, 1.0), ("1", 2.0)])}, "Rename"),
        ({"name": b"mlp"}, "'name': it is a bytes.*extras"),
        ({"fn": len}, "'fn'.*static field"),
        ({"w": np.array(["a"])}, "dtype is <U1"),
        ({"w": np.zeros(2, np.longdouble)}, "dtype is"),
        ({"w": jax.ShapeDtypeStruct((2,), np.float32)}, "'w': it is a ShapeDtypeStruct, without"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_states_that_cannot_be_stored_are_refused(folder: Path, state: Any, message: str) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        with pytest.raises(ckpt.CheckpointLeafError, match=message):
            manager.save(1, state)
        assert manager.all_steps() == [] and manager.pending_step is None


def test_keys_with_dots_and_slashes_are_fine_also_where_they_collide(folder: Path) -> None:
    state = {
        "a.b": jnp.ones(1),
        "a": {"b": jnp.zeros(1), "b/c": jnp.full(1, 3.0), "c": {"0": jnp.full(1, 4.0)}},
        "": jnp.full(1, 5.0),
        "name": "a string",
        "none": None,
        "c/d": {"e f": jnp.zeros(2)},
        "%": jnp.full(3, 2.0),
        "n": {5: jnp.ones(4)},
    }
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, state)
        assert_identical(manager.restore(state).state, state)
        manager.save(2, {"w": None})
        assert manager.restore({"w": None}).state == {"w": None}


def test_a_single_array_is_a_state(folder: Path) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, jnp.arange(3))
        assert_identical(manager.restore(jnp.zeros(3, jnp.int32)).state, jnp.arange(3))


def test_a_donated_state_and_a_traced_one_are_named(folder: Path) -> None:
    state = {"w": jnp.ones(4)}
    jax.jit(lambda s: jax.tree.map(jnp.sin, s), donate_argnums=0)(state)
    with ckpt.CheckpointManager(folder) as manager:
        with pytest.raises(ckpt.CheckpointLeafError, match=r"'w'.*donated"):
            manager.save(1, state)
        with pytest.raises(ckpt.CheckpointLeafError, match="traced"):
            jax.jit(lambda x: manager.save(1, {"w": x}))(jnp.ones(1))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong, message in (
        (file, "it is a file"),
        (file / "run", "cannot be written"),
        ("/proc/run", "cannot be written"),
    ):
        with pytest.raises(ckpt.CheckpointFolderError, match=message) as caught:
            ckpt.CheckpointManager(wrong)
        assert str(wrong) in str(caught.value)
    for other in ("az://bucket/run", "s3://"):
        with pytest.raises(ckpt.CheckpointFolderError, match=f"{other}.*s3://BUCKET"):
            ckpt.CheckpointManager(other)


def test_nothing_to_restore(folder: Path) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        with pytest.raises(ckpt.CheckpointNotFoundError, match="it has: none"):
            manager.restore({"w": jnp.ones(1)})
        manager.save(2, {"w": jnp.ones(1)})
        with pytest.raises(ckpt.CheckpointNotFoundError, match="step 3; it has: 2"):
            manager.restore({"w": jnp.ones(1)}, step=3)


def break_saves(folder: Path) -> None:
    """Puts a file where the folder of the run was."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    folder.touch()


@pytest.mark.parametrize("call", ["save", "wait", "restore", "close"])
def test_an_error_of_the_background_is_raised_once_at_the_next_call(
    folder: Path, call: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": jnp.ones((512, 512))}
    rename = os.rename

    def fail(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if str(target).endswith("/6"):
            raise OSError(28, "No space left on device")
        rename(source, target, *args, **kwargs)

    monkeypatch.setattr(os, "rename", fail)
    manager = ckpt.CheckpointManager(folder)
    manager.save(5, state)
    handle = manager.save(6, state)
    assert handle and handle.committed.exception()
    calls = {
        "save": lambda: manager.save(7, state),
        "wait": manager.wait,
        "restore": lambda: manager.restore(state),
        "close": manager.close,
    }
    with pytest.raises(ckpt.CheckpointSaveError, match=r"step 6 .*No space left") as caught:
        calls[call]()
    assert caught.value.step == 6 and str(folder) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    if call == "save":
        assert manager.pending_step in (7, None)
    else:
        assert sorted(p.name for p in folder.iterdir()) == ["5"]
    if call != "close":
        assert bool(manager.save(7, state)) is (call != "save")  # which saved before it raised
        assert manager.restore(state).step == 7
        manager.close()
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_goes_away_while_it_is_written_to(folder: Path) -> None:
    state = place({"w": jnp.ones((2048, 2048))}, (2, 4), PartitionSpec("a", "b"))
    manager = ckpt.CheckpointManager(folder)
    manager.save(1, state)
    break_saves(folder)
    with pytest.raises(ckpt.CheckpointSaveError, match="step 1"):
        manager.wait()
    with pytest.raises(ckpt.CheckpointError, match=str(folder)):
        manager.save(2, state)
        manager.wait()
    folder.unlink()
    folder.mkdir()
    assert manager.save(3, state)
    assert manager.restore(state).step == 3
    manager.close()


def test_leaving_the_block_by_an_error_still_commits_and_keeps_the_error(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), ckpt.CheckpointManager(folder) as manager:
        manager.save(1, {"w": jnp.ones(3)})
        _ = 1 / 0
    with ckpt.CheckpointManager(folder) as manager:
        assert manager.all_steps() == [1]


def test_leftovers_of_a_killed_run_are_removed_at_the_next_start(folder: Path) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, {"w": jnp.ones(3)})
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    os.utime(folder / "2.orbax-checkpoint-tmp", (1, 1))
    shutil.copytree(folder / "1", folder / "3.deleting")
    shutil.copytree(folder / "1", folder / "3.saving-abc-1")
    (folder / "4").mkdir()
    (folder / "notes.txt").touch()
    onlooker = ckpt.CheckpointManager(folder, read_only=True)
    assert (folder / "2.orbax-checkpoint-tmp").exists()
    assert onlooker.restore({"w": jnp.zeros(3)}).state["w"].tolist() == [1, 1, 1]
    with pytest.raises(ckpt.CheckpointSaveError, match="read_only"):
        onlooker.save(9, {"w": jnp.ones(3)})
    onlooker.close()
    with ckpt.CheckpointManager(folder) as manager:
        assert manager.all_steps() == [1]
    assert sorted(p.name for p in folder.iterdir()) == ["1", "4", "notes.txt"]


@pytest.mark.parametrize("text", ["", "{", '{"format": "other"}', '{"format": "shardflax.ckpt"}'])
def test_a_damaged_manifest_is_named(folder: Path, text: str) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        manager.save(1, {"w": jnp.ones(3)})
        manager.wait()
        (folder / "1/MANIFEST.json").write_text(text)
        with pytest.raises(ckpt.CheckpointReadError, match="Step 1"):
            manager.restore({"w": jnp.ones(3)})


def test_a_newer_manifest_and_lost_arrays_are_named(folder: Path) -> None:
    with ckpt.CheckpointManager(folder) as manager:
        for step in (1, 2):
            manager.save(step, {"w": jnp.ones(3)})
        manager.wait()
        path = folder / "1/MANIFEST.json"
        body = path.read_bytes().split(b"\n")[1].replace(b'"version": 2', b'"version": 99')
        path.write_bytes(b'{"crc32": "%08x", "body":\n' % zlib.crc32(body) + body)
        with pytest.raises(ckpt.CheckpointReadError, match=r"version 99; this .*update it"):
            manager.restore({"w": jnp.ones(3)}, step=1)
        shutil.rmtree(folder / "2" / "state" / "d")
        with pytest.raises(ckpt.CheckpointReadError, match=r"Step 2.*/state/d/\w+ is missing"):
            manager.restore({"w": jnp.ones(3)})
