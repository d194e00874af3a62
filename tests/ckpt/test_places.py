"""What a folder, a file or a name can be, and what is said where it cannot be that."""

import os
from pathlib import Path

import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt.leftovers import find_leftovers, remove_leftovers
from shardflax.cli import main


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("gs:/bucket/run", r"one slash of the two in gs://.*etils.epath.Path"),
        ("az://bucket/run", r"gs://BUCKET.*Mount"),
        ("a\0b", "NUL"),
        ("~nobody-has-this-name/run", r"no user ~nobody.*is it \./~nobody"),
        ("", "it has no name"),
    ],
)
def test_a_folder_that_cannot_be_one(
    where: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (ckpt.CheckpointManager, ckpt.load_checkpoint, ckpt.inspect_checkpoint):
        with pytest.raises(ckpt.CheckpointFolderError, match=why):
            use(where)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")
    with pytest.raises(ckpt.CheckpointFolderError, match="it is a link that leads nowhere"):
        ckpt.CheckpointManager(tmp_path / "run")


def test_files_of_weights_are_not_in_object_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in a folder `gs:` of this file system, where nobody would look for them."""
    monkeypatch.chdir(tmp_path)
    Path("gs:/bucket").mkdir(parents=True)
    for name in ("gs://bucket/w.safetensors", "gs:/bucket/w.safetensors"):
        for save in (ckpt.save_safetensors, ckpt.save_msgpack):
            with pytest.raises(ckpt.CheckpointFolderError, match="gs:"):
                save(name, {"w": np.ones(2)})
        for load in (ckpt.load_safetensors, ckpt.load_msgpack):
            with pytest.raises(ckpt.CheckpointFolderError, match="gs:"):
                load(name)
    assert list(Path("gs:/bucket").iterdir()) == []


def test_a_name_that_is_no_text_is_refused_at_once(tmp_path: Path) -> None:
    with ckpt.CheckpointManager(tmp_path) as manager:
        with pytest.raises(ckpt.CheckpointLeafError, match=r"'a/\\ud800': its name is no text"):
            manager.save(1, {"a": {"\ud800": np.ones(2)}})
        assert manager.save(1, {"a": {"é": np.ones(2), "e\u0301": np.zeros(2)}})
        twins = manager.restore().state["a"]
    assert [twins[name][0] for name in ("é", "e\u0301")] == [1, 0]


def test_nobody_waits_for_a_named_pipe_in_the_place_of_a_file(tmp_path: Path) -> None:
    state = {"w": np.arange(5000)}
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ckpt.CheckpointReadError, match=path.name):
            ckpt.load_checkpoint(tmp_path / "1", state)
        assert not ckpt.verify_checkpoint(tmp_path / "1").ok
        path.unlink()
        path.write_bytes(content)
    assert ckpt.verify_checkpoint(tmp_path / "1").ok


def test_a_step_without_its_manifest_is_listed_as_damaged(tmp_path: Path) -> None:
    """Not as one of Orbax, though all that Orbax wants is there."""
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(7, {"n": 1})
    (tmp_path / "7" / "MANIFEST.json").unlink()
    assert [step.state for step in ckpt.list_steps(tmp_path)] == ["damaged"]


def test_a_step_that_nobody_may_look_into_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ckpt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"n": step})
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent == tmp_path / "2":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    with ckpt.CheckpointManager(tmp_path) as manager:
        with pytest.raises(ckpt.CheckpointReadError, match=r"Step 2 .*Permission denied"):
            manager.restore({"n": 0})
        assert manager.restore({"n": 0}, fallback=True).step == 1
    assert [step.state for step in ckpt.list_steps(tmp_path)] == ["committed", "damaged"]


def test_a_number_that_no_step_has(tmp_path: Path) -> None:
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(7, {"n": 1})
        manager.wait()
        (tmp_path / "7").rename(tmp_path / str(2**63))
        assert manager.all_steps() == []


def test_what_orbax_may_still_be_writing_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It knows no locks: an hour must have passed, or somebody must be sure."""
    folder = tmp_path / "3.orbax-checkpoint-tmp"
    (folder / "state").mkdir(parents=True)
    ckpt.CheckpointManager(tmp_path).close()
    assert find_leftovers(tmp_path) == [] and folder.exists()
    assert main(["ckpt", "gc", str(tmp_path), "--yes"]) == 0
    assert f"left alone without --force: {folder.name}" in capsys.readouterr().out
    (found,) = find_leftovers(tmp_path, force=True)
    assert remove_leftovers([found]) == [] and folder.exists()
    os.utime(folder, (1, 1))  # a file in it was changed later
    assert find_leftovers(tmp_path) == []
    os.utime(folder / "state", (1, 1))
    assert [x.path for x in find_leftovers(tmp_path)] == [folder]
    assert remove_leftovers([found], force=True) == [found] and not folder.exists()
    folder.mkdir()
    os.utime(folder, (1, 1))
    ckpt.CheckpointManager(tmp_path).close()
    assert not folder.exists()
