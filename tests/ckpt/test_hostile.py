"""Checkpoints made to do harm: nothing is unpickled, nothing outside is read, memory is bounded.

This file is also the script that has the bounded memory: `test_hostile.py FOLDER`.
"""

import ast
import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from shardflax import ckpt
from shardflax.serialization import MsgpackError, msgpack_restore, msgpack_serialize

ROOT = Path(__file__).parents[2]
EXECUTE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "torch", "runpy"}
"""Modules that run, or may run, what they read."""


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def called(tree: ast.AST) -> Iterator[str]:
    """Names of functions, and of arguments given by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.id if isinstance(function, ast.Name) else ast.unparse(function)
            yield from (f"{keyword.arg}=" for keyword in node.keywords)


def test_what_reads_checkpoints_imports_nothing_that_executes() -> None:
    readers = [
        *(ROOT / "shardflax" / "ckpt").glob("*.py"),
        *(ROOT / "shardflax" / "training").glob("*checkpoint*.py"),
        ROOT / "shardflax" / "serialization.py",
        ROOT / "shardflax" / "_msgpack.py",
    ]
    assert len(readers) > 30
    for path in readers:
        tree = ast.parse(path.read_text())
        assert not EXECUTE & set(imported(tree)), path
        calls = set(called(tree))
        assert not calls & {"eval", "exec", "compile", "__import__", "np.load", "np.fromfile"}, path
        assert "allow_pickle=" not in calls, path


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each kind."""
    root = tmp_path_factory.mktemp("seeds")
    write_seeds(root)
    return root


TREE = {
    "a": {"w": np.arange(700, dtype=np.float32), "h": np.ones((2, 3), np.float16)},
    "large": np.arange(140_000, dtype=np.int64),
    "n": 3,
}


def write_seeds(root: Path) -> None:
    import orbax.checkpoint as ocp  # which the script does not need

    with ckpt.CheckpointManager(root / "ours") as manager:
        manager.save(1, TREE, extras={"seen": 1})
    for name, ocdbt, zarr3 in (("zarr2", 0, 0), ("zarr3", 0, 1), ("ocdbt", 1, 1)):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=bool(ocdbt), use_zarr3=bool(zarr3))
        ocp.Checkpointer(handler).save(root / name / "1", TREE)
    ckpt.save_safetensors(root / "weights.safetensors", TREE)
    ckpt.save_msgpack(root / "checkpoint_1", TREE)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_pickle_in_the_place_of_any_file_is_not_unpickled(seeds: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    payload = pickle.dumps(Payload(made))
    pickle.loads(payload)
    made.rmdir()  # it works
    root = tmp_path / "copy"
    shutil.copytree(seeds, root)
    seen = 0
    for path in files_of(root):
        if path.name in (".zgroup", "_sharding", "array_metadatas"):
            continue
        whole = path.read_bytes()
        path.write_bytes(payload)
        where = path if path.parent == root else root / path.relative_to(root).parts[0]
        try:
            found = restored(where)
        except ckpt.CheckpointError:
            seen += 1
        else:
            assert is_right(found), path
        assert not made.exists(), path
        path.write_bytes(whole)
    assert seen >= 12


def restored(where: Path) -> Any:
    """What is there, on the host."""
    if where.name.endswith("safetensors"):
        return ckpt.load_safetensors(where).state
    if where.is_file():
        return ckpt.load_msgpack(where).state
    return ckpt.load_checkpoint(where / "1").state


def is_right(state: Any) -> bool:
    same = np.array_equal(state["a"]["w"], TREE["a"]["w"]) and state["n"] == 3
    return bool(same and np.array_equal(state["large"], TREE["large"]))


@pytest.mark.parametrize("kind", ["zarr2", "zarr3", "ocdbt"])
def test_no_name_leads_out_of_the_folder(seeds: Path, tmp_path: Path, kind: str) -> None:
    """The arrays of another checkpoint, beside this one, cannot be got at through its metadata."""
    shutil.copytree(seeds / kind, tmp_path / "secret")
    shutil.copytree(seeds / kind, tmp_path / "run")
    about = tmp_path / "run" / "1" / "_METADATA"
    tree = json.loads(about.read_text())
    entry = next(e for e in tree["tree_metadata"].values() if e["key_metadata"][0]["key"] == "a")
    for outside in (
        ["../../secret/1/a.w"],
        ["x/../../../secret/1/a", "w"],
        ["", "", "/../secret/1/a", "w"],
        [str(tmp_path / "secret" / "1" / "a.w")],
        ["a\0b"],
    ):
        entry["key_metadata"] = [{"key": part, "key_type": 2} for part in outside]
        about.write_text(json.dumps(tree))
        with pytest.raises(ckpt.CheckpointReadError, match="leaf"):
            restored(tmp_path / "run")


# --- fuzzed, in a process with little memory

ROOM = 1 << 30
"""Bytes of address space beyond what the process has at the start."""
ATTACKS = 36
"""On each kind of checkpoint."""
PEAK = 256 << 20
"""Bytes of memory that it may really take."""
NUMBERS = [-1, 0, 2**31, 2**40, 2**62, 2**63, 2**64, 1e300, float("nan"), True]
THINGS = [None, [], {}, "", "../..", "\0", "x" * 10_000, [2**40] * 3, {"name": "x"}, *NUMBERS]


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and its key there."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from nodes(value[key])


def changed_json(rng: random.Random, text: bytes) -> bytes:
    """JSON with one or two of its parts replaced."""
    value = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        places = list(nodes(value))
        holder, key = rng.choice(places)
        if isinstance(holder[key], int | list) and rng.random() < 0.7:
            numbers = rng.choice(NUMBERS)
            size = len(holder[key]) if isinstance(holder[key], list) else 0
            holder[key] = [numbers] * size if size else numbers
        else:
            holder[key] = rng.choice(THINGS)
    return json.dumps(value).encode()


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them replaced, most of them near an end."""
    broken = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(broken), 400)) * rng.choice([1, -1])
        broken[at] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
    if rng.random() < 0.2:
        at = rng.randrange(len(broken))
        broken[at : at + 8] = b"\xff" * 8
    return bytes(broken)


def changed_manifest(rng: random.Random, data: bytes) -> bytes:
    """A manifest of ours with a right checksum."""
    body = changed_json(rng, data[data.index(b"\n") + 1 : -1]) + b"}"
    return b'{"crc32": "%08x", "body":\n' % zlib.crc32(body) + body


def changed_index(rng: random.Random, data: bytes) -> bytes:
    """A node, or the head, of a database, with a right length and checksum."""
    changed = changed_bytes(rng, data[12:-4])
    text = data[:4] + len(data).to_bytes(8, "little") + changed
    return text + google_crc32c.value(text).to_bytes(4, "little")


def change_of(rng: random.Random, path: Path, data: bytes) -> bytes:
    if path.name == "MANIFEST.json":
        return changed_manifest(rng, data)
    if data[:1] == b"{":
        return changed_json(rng, data)
    index = data[:4] in (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde")
    return changed_index(rng, data) if index and rng.random() < 0.8 else changed_bytes(rng, data)


def seal(manifest: Path) -> None:
    """Lets a manifest of ours say that all files are as they should be."""
    body = json.loads(manifest.read_bytes())["body"]
    for name in body["files"]:
        data = (manifest.parent / name).read_bytes()
        body["files"][name] = [len(data), f"{zlib.crc32(data):08x}"]
    rest = json.dumps(body).encode() + b"}"
    manifest.write_bytes(b'{"crc32": "%08x", "body":\n' % zlib.crc32(rest) + rest)


def attack(rng: random.Random, where: Path, path: Path) -> str:
    """Changes one file, reads all in two ways, and puts it back; what came of it."""
    whole = path.read_bytes()
    path.write_bytes(change_of(rng, path, whole))
    manifest = where / "1" / "MANIFEST.json"
    kept = manifest.read_bytes() if manifest.is_file() else b""
    try:
        if kept and path != manifest:
            seal(manifest)
        ckpt.verify_checkpoint(where)
        restored(where)
    except ckpt.CheckpointError:
        return "refused"
    finally:
        path.write_bytes(whole)
        if kept and path != manifest:
            manifest.write_bytes(kept)
    return "read"


def run(root: Path) -> None:
    """Many attacks on everything; what it took."""
    rng = random.Random(11)
    # Each thread takes address space of its own: as many of them on every machine.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    for where in sorted(root.iterdir()):
        restored(where)  # threads and arenas are there before the limit
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    peak = most()
    outcomes: dict[str, dict[str, int]] = {}
    for where in sorted(root.iterdir()):
        files = files_of(where) if where.is_dir() else [where]
        counts = outcomes[where.name] = {"read": 0, "refused": 0}
        for number in range(ATTACKS):
            path = files[number % len(files)]
            print(where.name, path.name, number, file=sys.stderr, flush=True)
            counts[attack(rng, where, path)] += 1
    for _ in range(300):
        with contextlib.suppress(MsgpackError):
            msgpack_restore(changed_bytes(rng, msgpack_serialize({"a": np.ones((3, 2)), "b": [1]})))
    print(json.dumps({"outcomes": outcomes, "grown": most() - peak}))


def most() -> int:
    """Bytes of memory that this process had at most; `ru_maxrss` counts those of its parent too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def test_fuzzed_checkpoints_are_refused_in_bounded_memory(seeds: Path, tmp_path: Path) -> None:
    root = shutil.copytree(seeds, tmp_path / "copy")
    done = subprocess.run(
        [sys.executable, __file__, str(root)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"},
        text=True, capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["grown"] < PEAK, said
    for name, counts in said["outcomes"].items():
        assert counts["refused"] >= 5 and sum(counts.values()) == ATTACKS, (name, counts)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
