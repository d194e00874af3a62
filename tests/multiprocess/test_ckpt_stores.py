"""Checkpoints in object stores: against servers of S3 and of Google's on this machine.

This file is also the script that processes run: `test_ckpt_stores.py MODE URL`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if __name__ != "__main__":
    from tests.multiprocess import stores

    pytestmark = pytest.mark.multiprocess


def host_state(step: int = 1) -> dict[str, Any]:
    """Large and small leaves, compressible and not, that tell their step."""
    noise = np.random.default_rng(step).normal(size=(512, 640)).astype(np.float32)
    return {
        "noise": noise,
        "zeros": np.zeros((1024, 512), np.float32) + step,
        "small": np.arange(5) * step,
        "empty": np.zeros((0, 3)),
        "step": step,
        "name": "run",
    }


def sharded(state: dict[str, Any], shape: tuple[int, int], *spec: str | None) -> dict[str, Any]:
    """The matrices of a state over all devices."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))

    def put(x: Any) -> Any:
        if np.ndim(x) != 2 or not x.size:
            return x
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return {name: put(value) for name, value in state.items()}


def is_same(got: dict[str, Any], want: dict[str, Any]) -> bool:
    """What this process holds, bit for bit."""

    def parts(x: Any) -> list[Any]:
        shards = getattr(x, "addressable_shards", None)
        return [np.asarray(s.data) for s in shards] if shards else [np.asarray(x)]

    assert got.keys() == want.keys()
    return all(
        np.array_equal(a, b)
        for name in want
        for a, b in zip(parts(got[name]), parts(want[name]), strict=True)
    )


def run_together(url: str) -> None:
    """Two processes save, restore in another layout, and keep one step."""
    from shardflax.ckpt import CheckpointManager

    with CheckpointManager(url, keep=1, timeout=300) as manager:
        for step in (1, 2):
            manager.save(step, sharded(host_state(step), (2, 2), "a", "b"))
        want = sharded(host_state(2), (4, 1), None, "a")
        assert is_same(manager.restore(want).state, want)
        assert manager.all_steps() == [2]


def run_killed(url: str) -> None:
    """Has saved step 1, and is killed when all of step 2 but its manifest is there."""
    from shardflax.ckpt import CheckpointManager, faults

    manager = CheckpointManager(url)
    manager.save(1, host_state())
    manager.wait()
    faults.listen(lambda point: point == "rename" and os.kill(os.getpid(), signal.SIGKILL))
    manager.save(2, host_state(2))
    manager.wait()


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """A bucket, to which the environment leads."""
    start = {"s3": stores.s3, "gs": stores.google}[request.param]
    with start("bucket") as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield f"{request.param}://bucket"


AMAZON = pytest.mark.parametrize("bucket", ["s3"], indirect=True, scope="module")
"""For tests of what is the same in all stores."""


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    """A folder of one's own."""
    return f"{bucket}/{request.node.originalname}/run"


def names(url: str) -> list[str]:
    """All objects below."""
    from shardflax.ckpt.place import place

    return [str(path.relative_to(place(url))) for path in place(url).files()]


def test_saved_listed_kept_and_restored_in_another_layout(url: str) -> None:
    from etils import epath

    from shardflax import ckpt

    with ckpt.CheckpointManager(epath.Path(url), keep=1, keep_every=2) as manager:
        for step in (1, 2, 3):
            manager.save(
                step,
                sharded(host_state(step), (2, 4), "a", "b"),
                extras={"seen": step},
                metrics={"loss": 1 / step},
                process_extras={"at": step},
            )
        want = sharded(host_state(3), (8, 1), None, "a")
        restored = manager.restore(want)
        assert is_same(restored.state, want)
        assert (restored.step, restored.extras) == (3, {"seen": 3})
        assert manager.all_steps() == [2, 3] and str(manager.directory) == url
        manager.delete(2)
        with pytest.raises(ckpt.CheckpointNotFoundError, match="it has: 3"):
            manager.restore(want, step=2)
    assert {name.partition("/")[0] for name in names(url)} == {"3"}
    host = ckpt.load_checkpoint(f"{url}/3", host_state())
    assert is_same(host.state, host_state(3))
    with ckpt.CheckpointManager(url, read_only=True) as onlooker:
        assert onlooker.latest_step() == 3
    # One that did not go on from there.
    with (
        ckpt.CheckpointManager(url) as other,
        pytest.raises(ckpt.CheckpointExistsError, match="Step 3"),
    ):
        other.save(3, host_state())


@AMAZON
def test_compressed_unless_one_does_not_want_it(url: str) -> None:
    from shardflax import ckpt

    sizes = {}
    for asked in ("auto", None):
        with ckpt.CheckpointManager(f"{url}/{asked}", compression=asked) as manager:
            manager.save(1, host_state())
        assert is_same(ckpt.load_checkpoint(f"{url}/{asked}/1").state, host_state())
        sizes[asked] = ckpt.inspect_checkpoint(f"{url}/{asked}").bytes_on_disk
    assert sizes["auto"] < 0.7 * sizes[None]


def test_the_command_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shardflax import ckpt
    from shardflax.cli import main

    with ckpt.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, host_state(), extras={"a": 1}, process_extras={"at": 3})
    assert main(["ckpt", "convert", str(tmp_path / "run"), url]) == 0
    for command in (["ls", url], ["show", url, "--step", "7"], ["verify", url], ["gc", url]):
        assert main(["ckpt", *command]) == 0, command
    out = capsys.readouterr().out
    assert "committed" in out and "float32[512,640]" in out and "all checksums right" in out
    assert main(["ckpt", "diff", "--values", url, str(tmp_path / "run")]) == 0
    assert main(["ckpt", "convert", url, str(tmp_path / "w.safetensors")]) == 0
    assert main(["ckpt", "convert", url, str(tmp_path / "back"), "--as-step", "8"]) == 0
    assert is_same(ckpt.load_checkpoint(tmp_path / "back/8").state, host_state())
    assert main(["ckpt", "convert", str(tmp_path / "run"), url]) == 2
    assert "Step 7 is already" in capsys.readouterr().err


@AMAZON
def test_damage_is_found_and_named(url: str) -> None:
    from shardflax import ckpt
    from shardflax.ckpt.place import place

    with ckpt.CheckpointManager(url) as manager:
        manager.save(1, host_state())
    step = place(url) / "1"
    for number, path in enumerate(step.files()):
        content = path.read_bytes()
        for wrong in (_flipped(content), None)[: 1 if number % 3 else 2]:
            path.write_bytes(wrong) if wrong is not None else path.unlink()
            about = "MANIFEST.json" if path.name == "MANIFEST.json" else path.name
            if not (path.name == "MANIFEST.json" and wrong is None):
                problems = ckpt.verify_checkpoint(step).problems
                assert any(about in problem for problem in problems), path
            try:
                state = ckpt.load_checkpoint(step).state
            except ckpt.CheckpointReadError as error:
                assert str(url) in str(error)
            else:
                assert is_same(state, host_state()), path
        path.write_bytes(content)
    assert ckpt.verify_checkpoint(step).ok
    assert ckpt.verify_checkpoint(step).stray == ()


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def test_a_save_that_fails_leaves_nothing_and_one_that_is_killed_nothing_visible(
    url: str, run_quick: Callable[..., Any]
) -> None:
    from shardflax import ckpt
    from shardflax.ckpt import faults

    with ckpt.CheckpointManager(url) as manager:
        manager.save(1, {"w": np.ones(3)})
        manager.wait()
        before = names(url)
        for point in ("group", "described", "rename"):
            end = faults.listen(_failing(point))
            manager.save(2, {"w": np.ones(3)})
            with pytest.raises(ckpt.CheckpointSaveError, match=point):
                manager.wait()
            end()
            assert names(url) == before, point
    done = run_quick(1, 1, __file__, "killed", f"{url}/killed")
    assert done.returncode == 128 + signal.SIGKILL
    folder = f"{url}/killed"
    assert any(name.startswith("2/state/") for name in names(folder))
    assert [(s.name, s.state) for s in ckpt.list_steps(folder)] == [
        ("1", "committed"),
        ("2", "saving"),  # for all that one can see from here
    ]
    assert ckpt.find_leftovers(folder) == []
    assert ckpt.load_checkpoint(f"{folder}/1").step == 1
    with pytest.raises(ckpt.CheckpointReadError, match=r"MANIFEST\.json is missing"):
        ckpt.load_checkpoint(f"{folder}/2")
    with ckpt.CheckpointManager(folder) as manager:
        assert manager.all_steps() == [1]
        assert {name.partition("/")[0] for name in names(folder)} == {"1"}
        manager.restore(host_state())
        manager.save(2, host_state(2))
        assert is_same(manager.restore(host_state()).state, host_state(2))


def _failing(point: str) -> Callable[[str], None]:
    def fail(now: str) -> None:
        if now == point:
            raise OSError(f"told to fail at {point}")

    return fail


@AMAZON
def test_old_leftovers_are_removed(url: str) -> None:
    from shardflax import ckpt
    from shardflax.ckpt.place import place

    with ckpt.CheckpointManager(url) as manager:
        manager.save(1, {"w": np.ones(3)})
    root = place(url)
    (root / "5/state/d/0").write_bytes(b"half")
    (root / "5.saving-a-1").write_bytes(b'{"began": 1.0}')
    (root / "6.deleting").write_bytes(b"?")
    (root / "7/mine").write_bytes(b"not of a checkpoint")
    states = {step.name: step.state for step in ckpt.list_steps(url)}
    assert states == {"1": "committed", "5": "unfinished", "6": "unfinished", "7": "unfinished"}
    found = ckpt.find_leftovers(url)
    assert [x.path.name for x in found] == ["5", "6"]
    assert ckpt.remove_leftovers(found) == found and ckpt.find_leftovers(url) == []
    assert [name for name in names(url) if not name.startswith("1/")] == ["7/mine"]


@AMAZON
def test_steps_of_orbax_are_read_there(url: str, tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    from shardflax import ckpt
    from shardflax.ckpt.place import place

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "3", {"a": np.arange(4.0), "b": {"c": np.ones((2, 2))}})
    for path in (tmp_path / "3").rglob("*"):
        if path.is_file():
            (place(url) / str(path.relative_to(tmp_path))).write_bytes(path.read_bytes() or b"\n")
    assert [step.format for step in ckpt.list_steps(url)] == ["orbax"]
    with ckpt.CheckpointManager(url, read_only=True) as manager:
        assert manager.restore().state["a"].tolist() == [0, 1, 2, 3]


@AMAZON
def test_two_programs_save_one_step(url: str) -> None:
    """The one that is second finds the manifest of the other."""
    from shardflax import ckpt
    from shardflax.ckpt import faults
    from shardflax.ckpt.place import place

    manifest = place(url) / "1/MANIFEST.json"
    end = faults.listen(lambda point: point == "rename" and manifest.write_bytes(b"another's"))
    with ckpt.CheckpointManager(url) as manager:
        manager.save(1, {"w": np.ones(3)})
        with pytest.raises(ckpt.CheckpointSaveError, match="Step 1 is already"):
            manager.wait()
    end()
    assert manifest.read_bytes() == b"another's"


@AMAZON
@pytest.mark.parametrize("point", ["group", "rename"])
def test_two_runs_in_one_folder_spoil_nothing(url: str, point: str) -> None:
    """What one of them is writing is removed by the other: it fails, and says why."""
    from shardflax import ckpt
    from shardflax.ckpt import faults

    there, gate = threading.Event(), threading.Event()
    end = faults.listen(lambda now: now == point and (there.set() or gate.wait(300)))
    with ckpt.CheckpointManager(url, keep=None) as first:
        first.save(5, {"w": np.full(3, 1)})
        assert there.wait(300)
        end()
        with ckpt.CheckpointManager(url, keep=None) as second:
            second.save(5, {"w": np.full(3, 2)})
            second.wait()
            gate.set()
            with pytest.raises(ckpt.CheckpointSaveError, match=r"two runs|already in"):
                first.wait()
        assert ckpt.verify_checkpoint(url).ok
        assert ckpt.load_checkpoint(f"{url}/5").state["w"].tolist() == [2] * 3
        first.save(6, {"w": np.full(3, 1)})
        assert first.restore().step == 6
        first.delete(5)
        first.delete(6)
    assert names(url) == []


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    from shardflax import ckpt

    with pytest.raises(ckpt.CheckpointFolderError, match=f"{bucket[:2]}://nowhere"):
        ckpt.CheckpointManager(f"{bucket[:2]}://nowhere/run")
    with pytest.raises(ckpt.CheckpointFolderError, match="neither a folder nor a file"):
        ckpt.inspect_checkpoint(f"{bucket}/not/there")


@AMAZON
def test_two_processes_write_one_step(url: str, run_quick: Callable[..., Any]) -> None:
    from shardflax import ckpt

    done = run_quick(2, 2, __file__, "together", url)
    assert done.returncode == 0, done.stdout + done.stderr
    want = sharded(host_state(2), (2, 4), "b", "a")
    restored = ckpt.load_checkpoint(f"{url}/2", want)
    assert is_same(restored.state, want)
    assert ckpt.verify_checkpoint(url).ok


if __name__ == "__main__":
    from launch.distributed import initialize_from_env

    initialize_from_env()
    globals()[f"run_{sys.argv[1]}"](sys.argv[2])
