"""Formats into one another, and what `inspect`, `compare` and `verify` say of them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from shardflax import ckpt
from shardflax.ckpt import regions, tree_source
from shardflax.ckpt.convert import write_step
from shardflax.ckpt.locate import find_checkpoint
from shardflax.ckpt.tree_source import TreeSource, pieces

STATE: dict[str, Any] = {
    "params": {"w": np.arange(600_000, dtype=np.float32).reshape(600, 1000), "b": np.ones(3)},
    "half": np.arange(4).astype(ml_dtypes.bfloat16),
    "step": 3,
    "name": "run",
    "none": None,
    "empty": np.zeros((0, 2)),
    "key": jax.random.key(5),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with step 10."""
    root = tmp_path_factory.mktemp("run")
    with ckpt.CheckpointManager(root) as manager:
        manager.save(10, STATE, extras={"seen": [1, 2]})
    return root


def same(a: Any, b: Any, **options: Any) -> bool:
    result = ckpt.compare_checkpoints(a, b, values=True, **options)
    return not result and result.same == 7


def test_there_and_back(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_source, "_PIECE", 100_000)  # several pieces of 100 kB
    file, heard = tmp_path / "w.safetensors", list[int]()
    ckpt.convert_checkpoint(run, file)
    monkeypatch.setattr(regions, "CHUNK_BYTES", 100_000)
    done = ckpt.convert_checkpoint(file, tmp_path / "back", as_step=4, progress=heard.append)
    assert done.path == tmp_path / "back" / "4" and (done.format, done.leaves) == ("shardflax", 7)
    assert len(heard) > 24 and sum(heard) >= 2_400_000
    assert same(run, file) and same(done.path, run) and ckpt.verify_checkpoint(done.path).ok
    with ckpt.CheckpointManager(tmp_path / "back") as manager:
        restored = manager.restore(STATE)
    assert restored.step == 4 and restored.extras == {"seen": [1, 2]}
    assert restored.state["params"]["w"].tobytes() == STATE["params"]["w"].tobytes()
    assert jax.random.key_data(restored.state["key"]).tolist() == [0, 5]


def test_through_msgpack(run: Path, tmp_path: Path) -> None:
    done = ckpt.convert_checkpoint(run, tmp_path / "x", to="msgpack", rename={"params": "weights"})
    assert done.format == "msgpack" and ckpt.inspect_checkpoint(done.path).format == "flax msgpack"
    found = ckpt.compare_checkpoints(run, done.path, rename={"params": "weights"}, values=True)
    # The format has no PRNG keys: their words are arrays.
    assert [(x.kind, x.path) for x in found.unlike] == [("shape", ("key",))]


def test_from_orbax(tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "theirs", {"enc": {"w": jnp.arange(6.0)}, "n": 1})
    done = ckpt.convert_checkpoint(tmp_path / "theirs", tmp_path / "run", rename={"enc": "dec"})
    assert ckpt.inspect_checkpoint(tmp_path / "theirs").format == "orbax"
    assert done.path.name == "0" and not ckpt.verify_checkpoint(tmp_path / "theirs").checksums
    found = ckpt.load_checkpoint(done.path).state
    assert found["dec"]["w"].tolist() == [0, 1, 2, 3, 4, 5] and found["n"] == 1


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(ckpt.CheckpointError, match="is there already"):
        ckpt.convert_checkpoint(run, tmp_path / "w.safetensors")
    with pytest.raises(ckpt.CheckpointExistsError):
        ckpt.convert_checkpoint(run, run)
    with pytest.raises(ckpt.CheckpointError, match="no saved leaf has it in its path"):
        ckpt.convert_checkpoint(run, tmp_path / "v.safetensors", rename={"nope": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert [step.name for step in ckpt.list_steps(run)] == ["10"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    class Broken(TreeSource):
        def read(self, path: Any, box: Any) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_step(tmp_path / "run", 3, Broken({"w": np.ones(2)}), {})
    assert list((tmp_path / "run").iterdir()) == []


def test_pieces_cover_a_leaf_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_source, "_PIECE", 64)
    source = TreeSource({"w": np.arange(7 * 6 * 5, dtype=np.int16).reshape(7, 6, 5)})
    for chunk in ((1, 1, 1), (7, 6, 5), (3, 2, 5), (2, 6, 1)):
        for ordered in (False, True):
            boxes = list(pieces(source, ("w",), chunk, ordered))
            read = np.concatenate([source.read(("w",), box)().reshape(-1) for box in boxes])
            assert sorted(read.tolist()) == list(range(210))
            assert (len(boxes) > 1) == (chunk != (7, 6, 5))
            if ordered:
                assert read.tolist() == list(range(210))


def test_a_description(run: Path) -> None:
    info = ckpt.inspect_checkpoint(run)
    assert (info.format, info.step, info.processes) == ("shardflax", 10, 1)
    assert info.extras == {"seen": [1, 2]} and info.nones == (("none",),)
    values = json.loads(info.to_json())
    leaves = {"/".join(leaf["path"]): leaf for leaf in values["leaves"]}
    assert leaves["params/w"]["shape"] == [600, 1000] and leaves["params/w"]["bytes"] == 2_400_000
    assert leaves["name"]["value"] == "run" and leaves["half"]["dtype"] == "bfloat16"
    odd = dataclasses.replace(info, metrics={"loss": float("inf")}, extras={"x": [float("nan")]})
    values = json.loads(odd.to_json(), parse_constant=pytest.fail)
    assert values["metrics"] == {"loss": "inf"} and values["extras"] == {"x": ["nan"]}
    with pytest.raises(ckpt.CheckpointNotFoundError, match="no committed step 11; it has: 10"):
        ckpt.inspect_checkpoint(run, 11)
    with pytest.raises(ckpt.CheckpointFolderError, match="neither a folder nor a file"):
        ckpt.inspect_checkpoint(run / "nowhere")
    with pytest.raises(ckpt.CheckpointReadError, match="neither a safetensors file"):
        ckpt.inspect_checkpoint(__file__)


def test_a_folder_that_is_no_checkpoint(run: Path) -> None:
    with pytest.raises(ckpt.CheckpointFolderError, match=r"that of a run, with steps 10\. Give"):
        ckpt.load_checkpoint(run)
    with pytest.raises(ckpt.CheckpointFolderError, match="there is no such folder"):
        ckpt.load_checkpoint(run / "11")
    with pytest.raises(ckpt.CheckpointFolderError, match="it has no name"):
        ckpt.CheckpointManager("")
    assert ckpt.load_checkpoint(f"file://{run}/10").step == 10


def test_differences_are_named(tmp_path: Path) -> None:
    nan = np.array([np.nan, 0.0, 1.0])
    ckpt.save_safetensors(tmp_path / "a", {"x": nan, "n": 3, "i": np.arange(2), "y": np.ones(2)})
    other = {"x": np.array([np.nan, -0.0, 3.0]), "n": np.int32(3), "i": np.ones(2), "y": np.ones(3)}
    found = ckpt.compare_checkpoints(tmp_path / "a", other, values=True)
    assert {(x.kind, x.path[0]) for x in found.unlike} == {
        ("value", "x"), ("dtype", "i"), ("shape", "y")}  # fmt: skip
    assert "value    x  2 of 3 elements differ, by up to 2" in str(found)
    other |= {"n": np.int32(4), "x": nan}
    found = ckpt.compare_checkpoints(tmp_path / "a", other, values=True)
    assert [str(x) for x in found.unlike if x.kind == "value"] == ["value    n  3 and 4"]


def test_verify_names_file_and_leaf(tmp_path: Path) -> None:
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, STATE)
    data = max((tmp_path / "1" / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    whole, heard = data.read_bytes(), list[int]()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 4  # in the middle of the largest leaf
    data.write_bytes(broken)
    (tmp_path / "1" / "stray").touch()
    found = ckpt.verify_checkpoint(tmp_path, progress=heard.append)
    assert [line for line in found.problems if str(data) in line and "checksum is wrong" in line]
    assert [line for line in found.problems if line.startswith("leaf 'params/w'")]
    assert found.stray == ("stray",) and len(found.problems) == 2 and not found.ok
    data.write_bytes(whole)
    assert ckpt.verify_checkpoint(tmp_path).ok
    (tmp_path / "1" / "MANIFEST.json").write_bytes(b"")
    assert "MANIFEST.json: it is empty" in ckpt.verify_checkpoint(tmp_path, 1).problems[0]
    assert [step.state for step in ckpt.list_steps(tmp_path)] == ["damaged"]


def test_leftovers_of_killed_runs(tmp_path: Path) -> None:
    write_step(tmp_path, 1, TreeSource({"a": 1}), {})
    for name in ("2.saving-x-1", "3.orbax-checkpoint-tmp", "4.deleting", "5", "mine.saving-"):
        (tmp_path / name).mkdir()
    (tmp_path / "2.saving-x-1" / "data").write_bytes(bytes(10))
    for name, age in (
        (".write-test-old", 7200), (".write-test-new", 0), ("3.orbax-checkpoint-tmp", 7200),
    ):  # fmt: skip
        (tmp_path / name).touch()
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    states = {step.name: step.state for step in ckpt.list_steps(tmp_path)}
    assert states["1"] == "committed" and states["5"] == states["4.deleting"] == "unfinished"
    found = ckpt.find_leftovers(tmp_path)
    names = [x.path.name for x in found]
    assert names == ["2.saving-x-1", "3.orbax-checkpoint-tmp", "4.deleting", ".write-test-old"]
    assert found[0].nbytes == 10
    assert ckpt.remove_leftovers(found) == found and ckpt.find_leftovers(tmp_path) == []
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"1", "5", "mine.saving-", ".write-test-new"}


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    from shardflax.ckpt.landing import lock

    (tmp_path / "7.saving-x-1").mkdir()
    found = ckpt.find_leftovers(tmp_path)
    descriptor = lock(tmp_path / "7.saving-x-1")
    assert ckpt.find_leftovers(tmp_path) == ckpt.remove_leftovers(found) == []
    assert [step.state for step in ckpt.list_steps(tmp_path)] == ["saving"]
    os.close(descriptor)
    assert len(ckpt.remove_leftovers(ckpt.find_leftovers(tmp_path))) == 1


def test_every_kind_of_path_is_found(run: Path, tmp_path: Path) -> None:
    ckpt.save_safetensors(tmp_path / "no_suffix", {"a": 1})
    ckpt.save_msgpack(tmp_path / "checkpoint_5", {"a": 1})
    kinds = {"no_suffix": "safetensors", "checkpoint_5": "flax msgpack"}
    assert {n: find_checkpoint(tmp_path / n).format for n in kinds} == kinds
    assert find_checkpoint(run / "10").path == find_checkpoint(run, 10).path
