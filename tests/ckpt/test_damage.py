"""Nothing that was damaged on disk is ever returned; each error names the file or the leaf."""

import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardflax import ckpt
from shardflax.ckpt import manifest as manifests
from shardflax.ckpt.opening import damage

STATE = {
    "small": np.arange(700, dtype=np.float32),
    "tiny": np.arange(3, dtype=np.int8),
    "large": np.random.default_rng(0).integers(0, 99, (600, 500)).astype(np.int64),
    "scalar": 7,
    "key": jax.random.key(1),
}
TARGET = jax.tree.map(lambda x: x * 0 if isinstance(x, np.ndarray) else x, STATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two steps, 1 and 2."""
    root = tmp_path_factory.mktemp("run")
    with ckpt.CheckpointManager(root) as manager:
        manager.save(1, STATE, extras={"step": 1})
        manager.save(2, STATE, extras={"step": 2})
    return root


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def is_right(restored: ckpt.Restored) -> bool:
    state = restored.state
    same = all(np.array_equal(state[k], STATE[k]) for k in ("small", "tiny", "large"))
    return same and state["scalar"] == 7 and restored.extras == {"step": restored.step}


def is_array_file(path: Path) -> bool:
    """True for files of the database, false for JSON."""
    return path.parent.name == "d" or path.name == "manifest.ocdbt"


def check_text(text: str, path: Path) -> None:
    """An error says which step, which file, and what to do."""
    assert "Step 2" in text and str(path) in text, text
    assert "Restore an earlier step with `restore(target, step=...)`" in text, text


def test_no_flipped_bit_is_ever_returned(saved: Path) -> None:
    """A restore raises, or the bit means nothing to it; verifying finds every one."""
    rng = random.Random(5)
    step = saved / "2"
    manifest = manifests.Manifest.read((step / "MANIFEST.json").read_bytes())
    whole = [(path, path.read_bytes()) for path in files_of(step)]
    assert len(whole) >= 7
    unread = leaves = 0
    for number in range(210):
        path, content = whole[number % len(whole)]
        at = rng.randrange(len(content) * 8)
        broken = bytearray(content)
        broken[at // 8] ^= 1 << at % 8
        path.write_bytes(broken)
        try:
            assert is_right(ckpt.load_checkpoint(step, TARGET)), (path, at)
        except ckpt.CheckpointReadError as error:
            check_text(str(error), path)
            leaves += "leaf '" in str(error)
        else:
            unread += 1
        if path.name == "MANIFEST.json":
            with pytest.raises(ValueError):
                manifests.Manifest.read(bytes(broken))
        else:
            name = str(path.relative_to(step))
            assert len(damage(step, {name: manifest.files[name]})) == 1, (path, at)
        if number < 3 * len(whole):
            problems = ckpt.verify_checkpoint(step).problems
            assert str(path) in "".join(problems), (path, at)
        path.write_bytes(content)
    assert unread <= 2  # nodes of the database that later ones replaced
    assert leaves > 40
    assert is_right(ckpt.load_checkpoint(step, TARGET))


def truncated(content: bytes) -> bytes | None:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes | None:
    del content
    return b""


def zeroed(content: bytes) -> bytes | None:
    middle = len(content) // 3
    size = min(4096, max(1, len(content) // 3))
    return content[:middle] + bytes(size) + content[middle + size :]


def removed(content: bytes) -> bytes | None:
    del content
    return None


def lengthened(content: bytes) -> bytes | None:
    return content + b"\0"


@pytest.mark.parametrize("change", [truncated, emptied, zeroed, removed, lengthened])
def test_damaged_files_are_found_and_an_earlier_step_is_taken_if_asked_for(
    saved: Path, tmp_path: Path, change: Callable[[bytes], bytes | None]
) -> None:
    shutil.copytree(saved, tmp_path / "copy")  # a folder may be copied elsewhere
    root = tmp_path / "copy"
    for path in files_of(root / "2"):
        content = path.read_bytes()
        changed = change(content)
        if changed == content:
            continue
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        with ckpt.CheckpointManager(root, read_only=True) as manager:
            with pytest.raises(ckpt.CheckpointReadError) as caught:
                assert is_right(manager.restore(TARGET)), path
            check_text(str(caught.value), path)
            if is_array_file(path) and change in (emptied, removed):
                assert "leaf '" in str(caught.value)
            restored = manager.restore(TARGET, fallback=True)
        assert restored.step == 1 and is_right(restored)
        path.write_bytes(content)
    assert is_right(ckpt.load_checkpoint(root / "2", TARGET))


def test_a_stray_file_does_no_harm(saved: Path) -> None:
    stray = [saved / "2/state/d/0123", saved / "2/notes.txt", saved / "README"]
    for path in stray:
        path.write_text("?")
    try:
        with ckpt.CheckpointManager(saved, read_only=True) as manager:
            assert manager.all_steps() == [1, 2] and is_right(manager.restore(TARGET))
    finally:
        for path in stray:
            path.unlink()


def test_files_are_told_apart_by_their_contents(saved: Path) -> None:
    """A database of another step is a whole one; it is still not this one."""
    path = saved / "2/state/manifest.ocdbt"
    own = path.read_bytes()
    path.write_bytes((saved / "1/state/manifest.ocdbt").read_bytes())
    try:
        with pytest.raises(ckpt.CheckpointReadError, match=r"manifest\.ocdbt"):
            ckpt.load_checkpoint(saved / "2", TARGET)
    finally:
        path.write_bytes(own)


def body_of(step: Path) -> dict[str, Any]:
    return json.loads((step / "MANIFEST.json").read_bytes())["body"]


def sealed(body: Any) -> bytes:
    """A manifest with the right checksum, whatever it says."""
    rest = json.dumps(body).encode() + b"}"
    return b'{"crc32": "%08x", "body":\n' % zlib.crc32(rest) + rest


@pytest.mark.parametrize("name", ["../1/MANIFEST.json", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_manifest_names_no_file_outside_of_its_folder(saved: Path, name: str) -> None:
    body = body_of(saved / "2")
    body["files"][name] = [3, "00000000"]
    with pytest.raises(ValueError, match="outside of its folder"):
        manifests.Manifest.read(sealed(body))


def test_a_manifest_that_promises_more_than_there_is_takes_no_memory(saved: Path) -> None:
    body = body_of(saved / "2")
    for leaf in body["leaves"]:
        if leaf["path"] == ["small"]:
            leaf["shape"] = leaf["store"]["shape"] = [1 << 50]
    with pytest.raises(ValueError, match="bytes, its files"):
        manifests.Manifest.read(sealed(body))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=80)
@given(data=st.data())
def test_hostile_manifests_are_refused_or_read(saved: Path, data: st.DataObject) -> None:
    """Any part replaced by anything: a ValueError, or a manifest, and nothing else."""
    body = body_of(saved / "2")
    node: Any = {"": body}
    key: Any = ""
    for _ in range(data.draw(st.integers(0, 5))):
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        choices = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        node, key = inner, data.draw(st.sampled_from(choices))
    node[key] = data.draw(values)
    try:
        found = manifests.Manifest.read(sealed(body))
    except ValueError:
        return
    assert isinstance(found.text(), bytes)


@settings(max_examples=60)
@given(text=st.binary(max_size=60))
def test_anything_may_be_in_the_place_of_a_manifest(text: bytes) -> None:
    for content in (text, b'{"crc32": "%08x", "body":\n' % zlib.crc32(text) + text):
        with pytest.raises(ValueError):
            manifests.Manifest.read(content)


def test_orbaxs_metadata_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    for text in (
        "",
        "[]",
        "{}",
        '{"tree_metadata": 3}',
        "[" * 100_000,
        '{"tree_metadata": {"a": 1}}',
    ):
        (tmp_path / "1/_METADATA").write_text(text)
        with pytest.raises(ckpt.CheckpointReadError, match="_METADATA"):
            ckpt.load_checkpoint(tmp_path / "1", {"w": jnp.ones(1)})


def test_verification_reads_everything_without_a_device(saved: Path) -> None:
    manifest = manifests.Manifest.read((saved / "2/MANIFEST.json").read_bytes())
    assert damage(saved / "2", manifest.files) == []
    assert damage(saved / "1", manifest.files) != []
    listed = {str(path.relative_to(saved / "2")) for path in files_of(saved / "2")}
    assert listed == {*manifest.files, "MANIFEST.json"}
