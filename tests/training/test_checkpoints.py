"""`training.checkpoints`: the files, rules and results of Flax, and nothing lost or half restored.

Flax is the oracle: it reads what is written here, and the other way round.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import flax.training.checkpoints as theirs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardflax.training.checkpoints as ours
from shardflax import config, errors
from shardflax.partitioning import make_mesh
from shardflax.training import orbax_utils, step_files

pytestmark = pytest.mark.filterwarnings("ignore:Flax Checkpointing will:DeprecationWarning")


@pytest.fixture(params=["orbax", "msgpack"])
def backend(request: Any) -> Iterator[str]:
    """Both formats, in both libraries."""
    before = flax.config.flax_use_orbax_checkpointing
    wanted = request.param == "orbax"
    flax.config.update("flax_use_orbax_checkpointing", wanted)
    with config.temp_flip_flag("use_orbax_checkpointing", wanted):
        yield request.param
    flax.config.update("flax_use_orbax_checkpointing", before)


def state() -> dict[str, Any]:
    """A train state with all that both formats hold."""
    params = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "h": jnp.ones(2, jnp.bfloat16)}
    return {
        "params": params,
        "opt": optax.adam(1e-3).init(params),
        "step": 3,
        "pair": (1, [2.5]),
        "none": None,
    }


def same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_flax_restores_what_is_saved_here(backend: str, tmp_path: Path) -> None:
    path = ours.save_checkpoint(tmp_path, state(), 3)
    assert path == str(tmp_path / "checkpoint_3")
    same(theirs.restore_checkpoint(tmp_path, state()), state())


def test_what_flax_saved_is_restored(backend: str, tmp_path: Path) -> None:
    theirs.save_checkpoint(tmp_path, state(), 3)
    same(ours.restore_checkpoint(tmp_path, state()), state())
    bare = ours.restore_checkpoint(tmp_path, None)
    assert bare["pair"] == {"0": 1, "1": {"0": 2.5}}
    assert type(bare["params"]["w"]) is np.ndarray


SAVES = [
    (1, {}),
    (3, {"keep": 2}),
    (5, {"keep": 2}),
    (6, {"keep": 2, "keep_every_n_steps": 4}),
    (8, {"keep": 2, "keep_every_n_steps": 4}),
    (12, {"keep": 2, "keep_every_n_steps": 4}),
    (12, {"keep": 9, "overwrite": True}),
    (7, {"keep": 9, "overwrite": True}),
    (7.5, {"keep": 3, "prefix": "loss_"}),
    (10, {"keep": 3, "prefix": "loss_"}),
]


def test_the_rules_of_keeping_and_overwriting_are_those_of_flax(tmp_path: Path) -> None:
    tree = {"w": np.ones(1)}
    folders = tmp_path / "ours", tmp_path / "theirs"
    flax.config.update("flax_use_orbax_checkpointing", False)  # the rules are of both formats
    try:
        with config.temp_flip_flag("use_orbax_checkpointing", False):
            for step, options in SAVES:
                paths = [
                    module.save_checkpoint(folder, tree, step, **options)  # pyright: ignore[reportArgumentType]
                    for module, folder in zip((ours, theirs), folders, strict=True)
                ]
                assert Path(paths[0]).name == Path(paths[1]).name
                assert names(folders[0]) == names(folders[1]), (step, options)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", True)
    for prefix, kind in (("checkpoint_", int), ("loss_", float)):
        assert ours.available_steps(folders[0], prefix, kind) == theirs.available_steps(
            folders[1], prefix, kind
        )
        latest = (
            ours.latest_checkpoint(folders[0], prefix),
            theirs.latest_checkpoint(folders[1], prefix),
        )
        assert Path(str(latest[0])).name == Path(str(latest[1])).name


def test_the_guide_on_migrating_to_orbax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative folders, keys in their order, and a number that holds the place of an array."""
    monkeypatch.chdir(tmp_path)
    flax.config.update("flax_use_orbax_checkpointing", False)
    saved = [12, {"foo": "str", "bar": np.array((2, 3))}, [1, 4, 10]]
    target = [0, {"foo": "", "bar": np.array(0)}, [0, 0, 0]]
    with config.temp_flip_flag("use_orbax_checkpointing", False):
        for module, folder in ((theirs, "./theirs"), (ours, "./ours")):
            path = module.save_checkpoint(folder, saved, 4, prefix="test_")
            assert path == f"{folder[2:]}/test_4"
            assert module.latest_checkpoint(folder, "test_") == f"{folder}/test_4"
        assert Path("ours/test_4").read_bytes() == Path("theirs/test_4").read_bytes()
        assert list(ours.restore_checkpoint("./ours", None, prefix="test_")["1"]) == ["foo", "bar"]
        with pytest.warns(UserWarning, match=r"single numbers: 1/bar is int64\[2\]"):
            restored = ours.restore_checkpoint("./ours", target, 4, "test_")
        same(restored, saved)
        with pytest.raises(errors.CheckpointTargetError, match="1/bar: saved int64"):
            other = [0, {"foo": "", "bar": np.array(0.0)}, [0] * 3]
            ours.restore_checkpoint("./ours", other, 4, "test_")
    flax.config.update("flax_use_orbax_checkpointing", True)


@pytest.mark.parametrize("step", [1, 3])
def test_an_outdated_step_is_refused(backend: str, tmp_path: Path, step: int) -> None:
    ours.save_checkpoint(tmp_path, {"w": np.ones(1)}, 3)
    with pytest.raises(errors.InvalidCheckpointError, match=r"this or a later step.*overwrite"):
        ours.save_checkpoint(tmp_path, {"w": np.zeros(1)}, step)
    assert ours.restore_checkpoint(tmp_path, None)["w"].tolist() == [1]


def test_names_sort_by_their_numbers() -> None:
    files = ["ckpt_1e5", "ckpt_-1.0", "ckpt_10", "ckpt_9", "ckpt_0.1", "a", "ckpt_9_x"]
    assert ours.natural_sort(files) == theirs.natural_sort(files)
    for path in ("gs://a//b/../c", "a//b/../c", "/x/./y/"):
        assert ours.safe_normpath(path) == theirs.safe_normpath(path)


def test_no_checkpoint_gives_the_target_back(tmp_path: Path) -> None:
    target = {"w": 1}
    assert ours.restore_checkpoint(tmp_path, target) is target
    assert ours.restore_checkpoint(tmp_path / "none", target) is target
    assert ours.latest_checkpoint(tmp_path) is None
    with pytest.raises(errors.StepNotFoundError, match="checkpoint_7'; the folder holds none"):
        ours.restore_checkpoint(tmp_path, target, step=7)


def test_a_step_that_is_not_there_lists_those_that_are(backend: str, tmp_path: Path) -> None:
    for step in (1, 2):
        ours.save_checkpoint(tmp_path, {"w": np.ones(1)}, step, keep=5)
    with pytest.raises(ValueError, match="the steps 1, 2"):
        ours.restore_checkpoint(tmp_path, None, step=7)
    assert ours.restore_checkpoint(tmp_path / "checkpoint_1", None)["w"].tolist() == [1]


def test_what_does_not_fit_is_never_restored_in_part(backend: str, tmp_path: Path) -> None:
    ours.save_checkpoint(tmp_path, {"a": np.ones(3, np.float32), "b": {"c": 1}}, 1)
    target = {"a": np.zeros(4, np.float32), "b": {"c": 1, "d": np.ones(2)}}
    with pytest.raises(errors.CheckpointTargetError) as caught:
        ours.restore_checkpoint(tmp_path, target)
    assert caught.value.differences == (
        "a: saved float32[3], target float32[4]",
        "b/d: not in the checkpoint",
    )
    with pytest.raises(errors.CheckpointTargetError, match=r"float32\[3\], target int32\[3\]"):
        ours.restore_checkpoint(tmp_path, {"a": np.zeros(3, np.int32), "b": {"c": 1}})


def test_what_the_target_leaves_out_is_said(backend: str, tmp_path: Path) -> None:
    ours.save_checkpoint(tmp_path, {"a": np.ones(3), "b": {"c": 1}}, 1)
    with pytest.warns(UserWarning, match=r"checkpoint_1' holds at b/c"):
        restored = ours.restore_checkpoint(tmp_path, {"a": np.zeros(3)})
    assert restored["a"].tolist() == [1, 1, 1]


def test_arrays_are_restored_in_the_sharding_of_the_target(tmp_path: Path) -> None:
    saved = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    wanted = NamedSharding(make_mesh("fsdp=4,tensor=2"), PartitionSpec("tensor", "fsdp"))
    value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    ours.save_checkpoint_multiprocess(tmp_path, {"w": jax.device_put(value, saved)}, 1)
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=wanted)}
    restored = ours.restore_checkpoint(tmp_path, target)["w"]
    assert restored.sharding == wanted
    assert np.array_equal(restored, value)


def test_the_background_takes_the_values_of_the_call(backend: str, tmp_path: Path) -> None:
    manager, array = ours.AsyncManager(), np.ones(3)
    for step in (1, 2):
        array[:] = step
        ours.save_checkpoint(tmp_path, {"w": array}, step, keep=2, async_manager=manager)
        array[:] = -1
    manager.wait_previous_save()
    found = [ours.restore_checkpoint(tmp_path, None, step)["w"][0] for step in (1, 2)]
    assert found == [1, 2]


def test_an_error_of_the_background_is_raised_once(backend: str, tmp_path: Path) -> None:
    manager = ours.AsyncManager()
    ours.save_checkpoint(tmp_path, {"w": object()}, 1, async_manager=manager)
    with pytest.raises((TypeError, ValueError)):
        ours.save_checkpoint(tmp_path, {"w": np.ones(1)}, 2, async_manager=manager)
    manager.wait_previous_save()
    assert names(tmp_path) == []


def test_a_save_that_fails_leaves_all_as_it_was(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.save_checkpoint(tmp_path, {"w": np.ones(1)}, 1)

    def fail(_: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(ours, "sync_folder", fail)
    (tmp_path / ".checkpoint_2.unfinished").write_text("of a run that was killed")
    with pytest.raises((TypeError, ValueError)):
        ours.save_checkpoint(tmp_path, {"w": object()}, 2)
    assert names(tmp_path) == ["checkpoint_1"]
    with pytest.raises(OSError, match="no space"):
        ours.save_checkpoint(tmp_path, {"w": np.ones(1)}, 2)
    assert "checkpoint_1" in names(tmp_path)  # nothing is deleted before the new one is safe
    assert ours.restore_checkpoint(tmp_path, None, 1)["w"].tolist() == [1]


def test_what_a_save_left_that_was_killed_is_not_in_the_way(backend: str, tmp_path: Path) -> None:
    ours.save_checkpoint(tmp_path, {"w": np.ones(1)}, 1)
    (tmp_path / ".checkpoint_1.replaced" / "w").mkdir(parents=True)
    ours.save_checkpoint(tmp_path, {"w": np.zeros(1)}, 1, overwrite=True)
    assert names(tmp_path) == ["checkpoint_1"]
    assert ours.restore_checkpoint(tmp_path, None)["w"].tolist() == [0]


def test_what_is_overwritten_is_there_until_the_new_one_is(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, it has another name; who restores finds it, and who saves goes on."""
    prefix = "x_" if backend == "orbax" else "x[1]_"  # in brackets, Orbax finds nothing
    ours.save_checkpoint(tmp_path, {"w": np.ones(1)}, 1, prefix=prefix)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ours.save_checkpoint(tmp_path, {"w": np.zeros(1)}, 1, prefix=prefix, overwrite=True)
    monkeypatch.undo()
    assert names(tmp_path) == [f".{prefix}1.replaced"]
    assert ours.available_steps(tmp_path, prefix) == [1]
    for step in (1, None):
        got = ours.restore_checkpoint(tmp_path, None, step, prefix=prefix)
        assert got["w"].tolist() == [1]
    ours.save_checkpoint(tmp_path, {"w": np.full(1, 2)}, 2, prefix=prefix)
    assert names(tmp_path) == [f"{prefix}2"]


def test_a_checkpointer_of_the_users(tmp_path: Path) -> None:
    """An asynchronous one deletes old steps when the new one is there."""
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for step in (1, 2, 3):
            tree = {"w": np.full(2, step)}
            ours.save_checkpoint(tmp_path, tree, step, keep=2, orbax_checkpointer=checkpointer)
        restored = ours.restore_checkpoint(
            tmp_path, {"w": np.zeros(2, int)}, orbax_checkpointer=checkpointer
        )
    assert restored["w"].tolist() == [3, 3]
    assert ours.available_steps(tmp_path) == [2, 3]


def test_orbax_transforms_are_orbaxs(tmp_path: Path) -> None:
    ours.save_checkpoint(tmp_path, {"old": np.ones(2)}, 1)
    transforms = {"new": ocp.Transform(original_key="old")}
    restored = ours.restore_checkpoint(tmp_path, {"new": np.zeros(2)}, orbax_transforms=transforms)
    assert restored["new"].tolist() == [1, 1]


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Orbax saves trees, not one"):
        ours.save_checkpoint(tmp_path, np.ones(3), 1)
    with pytest.raises(ValueError, match="a/z: Orbax saves no arrays without elements"):
        ours.save_checkpoint(tmp_path, {"a": {"z": np.zeros((0, 3))}}, 1)
    with pytest.raises(ValueError, match="saves to file systems"):
        ours.save_checkpoint("gs://bucket/x", {}, 1)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        ours.save_checkpoint(tmp_path, {}, 1, keep=0)
    assert names(tmp_path) == []


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_4").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="no MessagePack"):
        ours.restore_checkpoint(tmp_path, None)


def test_another_program_that_saves_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ours.write_file

    def write_late(path: Path, data: bytes, mode: str) -> None:
        write(path, data, mode)
        (tmp_path / "checkpoint_1").write_bytes(b"of another")

    monkeypatch.setattr(ours, "write_file", write_late)
    with (
        config.temp_flip_flag("use_orbax_checkpointing", False),
        pytest.raises(errors.AlreadyExistsError),
    ):
        ours.save_checkpoint(tmp_path, {"w": 1}, 1)
    assert (tmp_path / "checkpoint_1").read_bytes() == b"of another"
    assert names(tmp_path) == ["checkpoint_1"]


PRE_LINEN = [
    {"Conv_0": {"kernel": 1}, "Dense_1": {"x": {"Dense_0": 2, "Conv_1": 3}}, "b": {"Dense_3": 1}},
    {"Conv_0": {"kernel": 1}, "Dense_0": {"k": 1}},
    {"Attention_2": {"k": 1}, "Dense_1": {"k": 1}, "Dense_10": {"k": 2}, "Dense_9": {"z": 1}},
]


@pytest.mark.parametrize("params", PRE_LINEN)
def test_names_from_before_linen(params: Any) -> None:
    assert ours.convert_pre_linen(params) == theirs.convert_pre_linen(params)
    assert ours.convert_pre_linen(ours.convert_pre_linen(params)) == ours.convert_pre_linen(params)


def test_arguments_for_orbax(tmp_path: Path) -> None:
    mesh = make_mesh("fsdp=8")
    target = {
        "w": jax.device_put(np.arange(8), NamedSharding(mesh, PartitionSpec("fsdp"))),
        "n": np.ones(3),
        "step": 4,
    }
    assert orbax_utils.is_multi_device_array(target["w"])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = orbax_utils.save_args_from_target(target)
        checkpointer.save(tmp_path / "c", target, save_args=args)
        other = make_mesh("fsdp=4", devices=jax.devices()[:4])
        args = orbax_utils.restore_args_from_target(target, mesh=other)
        restored = checkpointer.restore(tmp_path / "c", item=target, restore_args=args)
    assert restored["w"].sharding.mesh == other
    assert type(restored["n"]) is np.ndarray
    assert restored["step"] == 4


def test_what_is_not_a_step_is_not_seen(tmp_path: Path) -> None:
    for name in ("checkpoint_3", "checkpoint_3_gda", "checkpoint_tmp", ".checkpoint_4.unfinished"):
        (tmp_path / name).touch()
    assert [file.number for file in step_files.step_files(tmp_path, "checkpoint_")] == ["3"]
