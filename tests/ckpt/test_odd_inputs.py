"""What nobody means to pass, and what must never be committed unreadable, lost, or waited for."""

from __future__ import annotations

import enum
import fcntl
import json
import math
import os
import signal
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt import CheckpointManager, ocdbt, opening
from shardflax.ckpt import place as places
from shardflax.ckpt.convert import _Heard, _plan
from shardflax.ckpt.durable import checksum
from shardflax.ckpt.folder import StepFolder
from shardflax.ckpt.index import merge_indices, read_index, write_index
from shardflax.ckpt.keeping import Note, Rules
from shardflax.ckpt.landing import in_use, lock
from shardflax.ckpt.manifest import Manifest
from shardflax.ckpt.match import Options
from shardflax.ckpt.metering import Meter
from shardflax.ckpt.opening import damage
from shardflax.ckpt.place import kvstore
from shardflax.ckpt.plan import Lot, _pack
from shardflax.ckpt.preemption import Preemption
from shardflax.ckpt.reading import restore_step
from shardflax.ckpt.remote import StoreFolder, StoreLanding
from shardflax.ckpt.rendezvous import meet
from shardflax.ckpt.timer import Timer
from shardflax.ckpt.tree_source import TreeSource
from shardflax.cli import main


class _Number(enum.IntEnum):
    TWO = 2


class _Text(enum.StrEnum):
    A = "a"


class _Share(float):
    pass


def test_enums_and_other_subclasses_are_stored_as_what_they_stand_for(tmp_path: Path):
    state = {"n": _Number.TWO, "t": _Text.A, "f": _Share(0.5)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        restored = manager.restore(state).state
        assert restored == {"n": 2, "t": "a", "f": 0.5} == manager.restore().state
    assert [type(x) for x in restored.values()] == [float, int, str]  # by sorted key


def test_what_could_not_be_read_back_is_refused_with_its_path(tmp_path: Path):
    arrays = (np.zeros(2, dtype) for dtype in ("V4", "S4", np.dtypes.StringDType()))
    with CheckpointManager(tmp_path) as manager:
        for leaf in (*arrays, 10**5000):
            with pytest.raises(ckpt.CheckpointLeafError, match="leaf 'a/b'"):
                manager.save(1, {"a": {"b": leaf}})
        assert manager.all_steps() == []


def test_odd_numbers_of_a_manager(tmp_path: Path):
    wrong: list[dict[str, Any]] = [
        {"save_every": None}, {"keep": 0}, {"timeout": math.inf}, {"timeout": -1},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ValueError, match="CheckpointManager: "):
            CheckpointManager(tmp_path, **options)
    with CheckpointManager(tmp_path) as manager:
        for step in (-1, 2**63):
            with pytest.raises(ValueError, match="must not be negative"):
                manager.save(step, {"a": 1})
        with pytest.raises(TypeError, match=r"process_extras\['x'\] is a object"):
            manager.save(1, {"a": 1}, process_extras={"x": object()})
    with pytest.raises(ckpt.CheckpointError, match="as_step=-1"):
        ckpt.save_msgpack(tmp_path / "w.msgpack", {"a": 1})
        ckpt.convert_checkpoint(tmp_path / "w.msgpack", tmp_path / "run", as_step=-1)
    with pytest.raises(ckpt.CheckpointError, match=r"w.msgpack' cannot be renamed so: rename b no"):
        ckpt.convert_checkpoint(tmp_path / "w.msgpack", tmp_path / "run", rename={"b": "c"})


def test_a_clock_that_never_asks():
    now = iter(range(9))
    timer = Timer(math.inf, meet(timeout=5), clock=lambda: next(now))
    assert not any(timer.due(step) for step in range(4))


def test_a_metric_that_is_nan_is_not_the_best():
    notes = {1: Note({"loss": math.nan}), 2: Note({"loss": 0.5}), 3: Note({"loss": 0.7})}
    for is_max, best in ((False, 2), (True, 3)):
        rules = Rules(keep=1, best="loss", best_is_max=is_max)
        assert rules.best_of(notes, notes.__getitem__) == best
    assert Rules(keep=1, best="loss").expired(notes, notes.__getitem__) == [1]
    assert Rules(best="loss").best_of([1], notes.__getitem__) is None


def test_an_error_callback_that_fails_keeps_nobody_waiting(tmp_path: Path):
    def fails(error: ckpt.CheckpointError) -> None:
        raise RuntimeError("nobody answers")

    manager = CheckpointManager(tmp_path / "run", on_error=fails)
    (tmp_path / "run").rmdir()
    manager.save(1, {"a": 1})
    with pytest.raises(ckpt.CheckpointSaveError) as caught:
        manager.close()
    assert "nobody answers" in caught.value.__notes__[0]
    manager = CheckpointManager(tmp_path / "run", on_error=lambda error: manager.close())
    (tmp_path / "run").rmdir()
    handle = manager.save(1, {"a": 1})
    assert handle is not None and isinstance(handle.committed.exception(), ckpt.CheckpointSaveError)
    manager.close()


def test_restores_leave_nothing_behind_in_the_place_where_processes_meet(tmp_path: Path):
    with CheckpointManager(tmp_path) as manager:
        for step in range(3):
            manager.save(step, {"a": 1})
            manager.restore()
            manager.delete(step)
        told = manager._meeting.here
        assert {key.split("/")[1] for key in told if key.startswith("call/")} == {"6"}
        assert {key.split("/")[1] for key in told if key.startswith("save/")} == {"3"}


def test_who_looks_at_a_lock_does_not_keep_it_from_being_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_EX)
    waits = iter([lambda: None, lambda: None, lambda: os.close(looking)])
    sleeper = SimpleNamespace(sleep=lambda seconds: next(waits)())
    monkeypatch.setattr("shardflax.ckpt.landing.time", sleeper)
    descriptor = lock(tmp_path)
    assert next(waits, None) is None
    assert in_use(tmp_path)
    os.close(descriptor)
    assert not in_use(tmp_path)


def test_what_a_run_saves_that_went_back_stays(tmp_path: Path):
    with CheckpointManager(tmp_path) as manager:
        for step in (10, 20, 30):
            manager.save(step, {"a": step})
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.restore({"a": 0}, step=10)
        for step in (11, 12):
            manager.save(step, {"a": step})
            manager.wait()
            assert manager.all_steps() == [step, 30]


def test_a_signal_goes_back_to_whom_it_belonged(tmp_path: Path):
    def others(number: int, frame: object) -> None:
        heard.append(number)

    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, others)
    try:
        first, second, third = (Preemption() for _ in range(3))
        first.start()
        signal.signal(signal.SIGTERM, others)
        first.stop()
        assert signal.getsignal(signal.SIGTERM) is others  # it has another owner by now
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        second.start()
        third.start()
        second.stop()
        os.kill(os.getpid(), signal.SIGTERM)  # the third hears of it, the second lets it pass
        assert third.reached() and not heard
        thread = threading.Thread(target=third.stop)
        thread.start()
        thread.join()
        signal.signal(signal.SIGTERM, second._notice)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_manager_can_be_closed_in_another_thread(tmp_path: Path):
    manager = CheckpointManager(tmp_path, preemptible=True)
    before = manager._preemption._before  # pyright: ignore[reportOptionalMemberAccess]
    thread = threading.Thread(target=manager.close)
    thread.start()
    thread.join()
    assert not any(thread.is_alive() for thread in manager._writer._threads)
    signal.signal(signal.SIGTERM, before)


def test_what_is_committed_is_said_to_be_though_nothing_can_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patched:
            patched.setattr(StepFolder, "steps", lambda folder: 1 / 0)
            handle = manager.save(1, {"a": 1})
            assert handle is not None and handle.committed.exception() is None
        with pytest.raises(ckpt.CheckpointError, match=r"Step 1 is committed .* by zero"):
            manager.wait()
        assert manager.all_steps() == [1]


def test_nothing_is_saved_with_a_manager_that_was_closed(tmp_path: Path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"a": 1})
    with pytest.raises(ckpt.CheckpointSaveError, match="was closed: make a new one"):
        manager.save(2, {"a": 1})
    assert manager.restore().state == {"a": 1}


def test_what_is_no_checkpoint_is_not_overwritten(tmp_path: Path):
    (tmp_path / "3" / "notes").mkdir(parents=True)
    manager = CheckpointManager(tmp_path)
    manager.save(3, {"a": 1})
    with pytest.raises(ckpt.CheckpointSaveError, match=r"is no checkpoint\. Move it away"):
        manager.close()
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_step_that_was_copied_knows_its_number(tmp_path: Path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(300, {"a": 1})
    (tmp_path / "300").rename(tmp_path / "best")
    assert ckpt.load_checkpoint(tmp_path / "best").step == 300
    os.remove(tmp_path / "best" / "MANIFEST.json")
    with pytest.raises(ckpt.CheckpointReadError, match=r"^'.*/best' cannot be read") as caught:
        ckpt.load_checkpoint(tmp_path / "best")
    assert "earlier step" not in str(caught.value)


def test_a_file_of_weights_among_the_steps_of_a_run(tmp_path: Path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, {"a": 1})
    (tmp_path / "003").mkdir()
    assert manager.all_steps() == [3]
    file = tmp_path / "w.safetensors"
    ckpt.save_safetensors(file, {"b": np.ones(2)})
    for step in (None, 3):
        assert ckpt.inspect_checkpoint(tmp_path, step).format == "shardflax"
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.inspect_checkpoint(file, 3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_paths_that_go_up_are_read_by_tensorstore_too(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    run = tmp_path / "run"
    assert kvstore(tmp_path / "sub" / ".." / "link")["path"] == f"{run}/"


def test_damaged_extras_are_an_error_of_checkpoints(tmp_path: Path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, {"a": 1})
    (tmp_path / "3" / "extras" / "metadata").write_text("{ }")
    with pytest.raises(ckpt.CheckpointReadError, match="extras/metadata has 3 bytes"):
        ckpt.inspect_checkpoint(tmp_path)


def test_a_process_that_writes_nothing(tmp_path: Path):
    assert write_index(tmp_path / "ocdbt.process_0", {}) == {}


def test_what_no_process_has_written_is_not_committed(tmp_path: Path):
    for part, text in (("0", b"first"), ("1", b"second")):
        (tmp_path / part).mkdir()
        write_index(tmp_path / part, {"w/c/0": text, f"w/c/{part}": text})
    merge_indices(tmp_path, ["0", "1"], ["w/c/0", "w/c/1"])
    assert read_index(tmp_path) == {"w/c/0": b"first", "w/c/1": b"second"}
    with pytest.raises(ValueError, match="no process has written w/c/2"):
        merge_indices(tmp_path, ["0", "1"], ["w/c/2"])


def test_many_small_leaves_are_packed_in_one_pass():
    visits = 0

    class Counted(Lot):
        @property
        def nbytes(self) -> int:
            nonlocal visits
            visits += 1
            return 8

    fields = {"leaf": 0, "box": None, "pieces": (), "small": True}
    lots = [object.__new__(Counted) for _ in range(50)]
    for lot in lots:
        vars(lot).update(fields)
    assert [len(group) for group in _pack(lots)] == [50]
    assert visits <= 3 * len(lots)


def test_a_conversion_asks_whether_so_much_can_be_there():
    class Hostile(TreeSource):
        def check_size(self, nbytes: int) -> None:
            raise ValueError(f"{nbytes} bytes")

    with pytest.raises(ValueError, match="8 bytes"):
        _Heard(Hostile({"a": np.ones(1)}), print).check_size(8)
    assert _plan(TreeSource({"a": np.ones(1)})).sizes == (8,)


def test_a_manifest_of_dtypes_that_are_no_numbers():
    for kind in ("object", "S8", "datetime64[s]", "float128", "no such"):
        with pytest.raises(ValueError, match=r"dtype|data type"):
            _forged({"kind": "array", "shape": [0], "dtype": kind})
    with pytest.raises(ValueError, match="'a' is stored nowhere"):
        _forged({"kind": "array", "shape": [2], "dtype": "int8"})
    with pytest.raises(ValueError, match="not what a manifest is"):
        _forged({"kind": "python", "shape": [], "dtype": "complex", "value": [10**400, 0]})


def _forged(leaf: dict[str, object]) -> Manifest:
    """A manifest of one leaf, read."""
    body = json.loads(Manifest(1, {}, {}, {}).text().partition(b"\n")[2][:-1])
    rest = json.dumps(body | {"leaves": [{"path": ["a"], **leaf}]}).encode() + b"}"
    return Manifest.read(b'{"crc32": "%08x", "body":\n%s' % (zlib.crc32(rest), rest))


def test_what_the_command_line_cannot_open_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refused(folder: str) -> list[ckpt.StepInfo]:
        raise PermissionError(13, "Permission denied", folder)

    assert main(["ckpt", "ls", "ftp://host/run"]) == 2
    monkeypatch.setattr(ckpt, "list_steps", refused)
    assert main(["ckpt", "ls", "run"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: Checkpoint folder 'ftp://host/run': ")
    assert second == "error: [Errno 13] Permission denied: 'run'"


def test_a_step_of_somebody_else_in_a_store_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(places, "_spec", lambda scheme, bucket: {"driver": "memory"})
    root = places.StorePath("gs", "odd-inputs", "run")
    for name in ("3/_CHECKPOINT_METADATA", "3/state/_METADATA", "004/MANIFEST.json"):
        (root / name).write_bytes(b"{}")
    spot = StoreLanding(root, 3, "a-1")
    with pytest.raises(ckpt.CheckpointExistsError):
        spot.begin()
    spot.abandon()
    assert StoreFolder(root).steps() == [3]
    other = StoreLanding(root, 5, "a-2")
    other.begin()
    (other.folder / "state" / "d" / "0").write_bytes(b"x")
    other.abandon()
    assert not other.folder.exists()


def test_a_store_is_listed_once_to_be_verified(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(places, "_spec", lambda scheme, bucket: {"driver": "memory"})
    folder = places.StorePath("gs", "odd-inputs", "verified/1")
    for name in "abc":
        (folder / name).write_bytes(b"x")
    record = (1, checksum(b"x"))
    lists, list_files = list[places.StorePath](), places.StorePath.files
    monkeypatch.setattr(
        places.StorePath, "files", lambda path: (lists.append(path), list_files(path))[1]
    )
    heard: list[int] = []
    found = damage(folder, dict.fromkeys("abcd", record), heard=heard.append)
    assert found == [f"{folder}/d is missing"] and heard == [1] * 4 and len(lists) == 1


def test_what_names_its_file_is_not_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.arange(1 << 19)})
    (file,) = (path for path in (tmp_path / "1" / "state" / "d").iterdir()
               if path.stat().st_size > 1 << 20)  # fmt: skip
    with file.open("r+b") as opened:
        opened.seek(1 << 20)
        opened.write(b"?")
    read: list[Path] = []
    monkeypatch.setattr(opening, "checksum_file", lambda path, like: (read.append(path), like)[1])
    with pytest.raises(ckpt.CheckpointReadError, match=f"'w': {file}: the checksum of chunk"):
        ckpt.load_checkpoint(tmp_path / "1")
    assert file not in read and read


def test_a_step_that_is_damaged_here_and_does_not_fit_elsewhere(tmp_path: Path):
    class Two:
        def together(self, key: str, value: Any, doing: str) -> Any:
            return {0: value, 1: {"mismatch": ["missing  w"]}}

    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"a": 1})
    (tmp_path / "2" / "MANIFEST.json").write_text("")
    about: Any = Options(), Two(), "call/1", Meter("restoring")
    with pytest.raises(ckpt.CheckpointMismatchError, match=r"\(process 1\) missing  w"):
        restore_step(tmp_path, [2, 1], {"a": 0}, *about)


def test_an_index_hands_no_path_down_that_leads_out_of_its_folder():
    def table(name: str, base: int) -> bytes:
        return ocdbt._varints((1, len(name), base)) + name.encode()

    def tree(top: str, base: int, below: str) -> None:
        leaf = (b"\0", table(below, 0), ocdbt._varints((1, 1)), b"k", ocdbt._varints((5, 1, 0, 0)))
        nodes = {top: ocdbt._sealed(ocdbt._NODE_MAGIC, b"".join(leaf))}
        numbers = (0, 0, len(nodes[top]), 1, len(nodes[top]), 5)
        inner = (b"\1", table(top, base), ocdbt._varints((1, 1, 0)), b"k", ocdbt._varints(numbers))
        nodes["root"] = ocdbt._sealed(ocdbt._NODE_MAGIC, b"".join(inner))
        place = ocdbt.Place("root", 0, len(nodes["root"]))
        manifest = ocdbt._manifest([ocdbt._Node(b"k", b"k", place, 1, 0, 0)], 1)
        assert ocdbt.read_tree(manifest, lambda place: nodes[place.file])

    tree("d/0", 2, "1")
    for top, base, below in ((".d", 1, "./1"), ("d/.", 3, "./1"), ("d/0", 2, "./1")):
        with pytest.raises(ValueError, match="a file outside of its folder"):
            tree(top, base, below)
