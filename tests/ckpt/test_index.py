"""The index of chunks: TensorStore reads what we write, and the other way round; hostile ones."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts

from shardflax.ckpt import ocdbt
from shardflax.ckpt.index import DATA, merge_indices, read_index, write_index
from shardflax.ckpt.ocdbt import Place, Value

COUNT = 400


def some_values(folder: Path, start: str = "") -> tuple[dict[str, Value], dict[str, bytes]]:
    """Values in the index and in a file, and all of them as bytes."""
    (folder / DATA).mkdir(parents=True)
    values: dict[str, Value] = {}
    plain: dict[str, bytes] = {}
    data = bytearray()
    for i in range(COUNT):
        key, value = f"{start}k{i % 7}/é/x{i}", bytes([i % 251]) * (i % 40)
        if i % 3 == 0:
            value = bytes([i % 251]) * (1100 + i)
            values[key] = Place(f"{DATA}/0", len(data), len(value))
            data += value
        else:
            values[key] = value
        plain[key] = value
    (folder / DATA / "0").write_bytes(data)
    return values, plain


def fetched(folder: Path, values: dict[str, Value]) -> dict[str, bytes]:
    """Values as bytes, wherever they are."""
    found: dict[str, bytes] = {}
    for key, value in values.items():
        if isinstance(value, Place):
            data = (folder / value.file).read_bytes()
            value = data[value.offset : value.offset + value.length]
        found[key] = value
    return found


def opened(folder: Path) -> Any:
    base = {"driver": "file", "path": f"{folder}/"}
    return ts.KvStore.open({"driver": "ocdbt", "base": base}).result()


@pytest.mark.parametrize("node", [300, 4000, 1 << 20])
def test_tensorstore_reads_ours_however_high_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: int
) -> None:
    monkeypatch.setattr(ocdbt, "_NODE_BYTES", node)
    values, plain = some_values(tmp_path)
    write_index(tmp_path, values)
    assert read_index(tmp_path) == dict(sorted(values.items()))
    store = opened(tmp_path)
    assert {key.decode() for key in store.list().result()} == set(plain)
    reads = {key: store.read(key) for key in plain}
    assert {key: read.result().value for key, read in reads.items()} == plain
    version = ts.ocdbt.dump(store.base).result()["versions"][-1]
    assert (version["root_height"] > 0) == (node < 1 << 20)
    numbers = version["root"]["statistics"]
    assert numbers["num_keys"] == COUNT
    assert numbers["num_indirect_value_bytes"] == (tmp_path / DATA / "0").stat().st_size
    store.write("later", b"1").result()  # it may go on from there
    assert fetched(tmp_path, read_index(tmp_path)) == plain | {"later": b"1"}


def test_ours_reads_tensorstores(tmp_path: Path) -> None:
    """Several versions, deleted keys, and parts copied from another database below."""
    _, plain = some_values(tmp_path / "not used")
    spec = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{tmp_path}/part/"},
        "config": {"compression": None, "max_decoded_node_bytes": 2000},
    }
    context = ts.Context()
    part = ts.KvStore.open(spec, context=context).result()
    for number in range(3):
        transaction = ts.Transaction(atomic=True)
        writes = part.with_transaction(transaction)
        kept = [writes.write(k, v) for k, v in [*plain.items()][number::3]]
        transaction.commit_async().result()
        assert all(write.result() for write in kept)
    part.write("gone", b"x" * 2000).result()
    part.write("gone", None).result()
    assert fetched(tmp_path / "part", read_index(tmp_path / "part")) == plain
    whole_spec = spec | {"base": {"driver": "file", "path": f"{tmp_path}/"}}
    whole = ts.KvStore.open(whole_spec, context=context).result()
    part.experimental_copy_range_to(whole).result()
    assert fetched(tmp_path, read_index(tmp_path)) == plain


def test_indices_of_parts_become_one(tmp_path: Path) -> None:
    expected: dict[str, bytes] = {}
    for name in ("p0", "p1"):
        values, plain = some_values(tmp_path / name, start=name)
        write_index(tmp_path / name, values)
        expected |= plain
    records = merge_indices(tmp_path, ["p0", "p1"])
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*") if p.is_file()} >= {
        name for name in records if "/" in name
    }
    assert fetched(tmp_path, read_index(tmp_path)) == expected
    store = opened(tmp_path)
    assert all(store.read(key).result().value == value for key, value in expected.items())


def test_every_flipped_bit_of_an_index_is_noticed(tmp_path: Path) -> None:
    values, _ = some_values(tmp_path)
    for name in write_index(tmp_path, values):
        path = tmp_path / name
        content, rng = path.read_bytes(), random.Random(3)
        for _ in range(60):
            at = rng.randrange(8 * len(content))
            broken = bytearray(content)
            broken[at // 8] ^= 1 << at % 8
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=path.name):
                read_index(tmp_path)
        path.write_bytes(content)
    assert read_index(tmp_path)


def resealed(content: bytes) -> bytes:
    """With the right length and checksum, whatever it says."""
    text = content[:4] + struct.pack("<Q", len(content)) + content[12:-4]
    return text + struct.pack("<I", google_crc32c.value(text))


def test_hostile_indices_are_refused_or_read(tmp_path: Path) -> None:
    """Changed, and with the right checksums: a ValueError, or some values, and nothing else."""
    values, _ = some_values(tmp_path)
    records = write_index(tmp_path, values)
    rng = random.Random(4)
    for name in records:
        path = tmp_path / name
        content = path.read_bytes()
        for _ in range(60):
            broken = bytearray(content)
            for _ in range(rng.choice((1, 1, 3, 20))):
                broken[rng.randrange(12, min(len(broken), 4000) - 4)] = rng.randrange(256)
            path.write_bytes(resealed(bytes(broken)))
            try:
                found = read_index(tmp_path)
            except ValueError:
                continue
            for value in found.values():
                assert isinstance(value, bytes) or not value.file.startswith(("/", ".."))
        path.write_bytes(content)


def test_names_that_lead_out_of_the_folder_are_refused() -> None:
    for name in ("../x", "/etc/passwd", "d/../../x", "d//x"):
        tree = ocdbt.write_tree({"a": Place(name, 0, 2000)}, "d/0")
        with pytest.raises(ValueError, match="outside of its folder"):
            ocdbt.read_tree(tree.manifest, lambda place, t=tree: t.nodes)


def test_little_data_does_not_become_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is larger than any, a node that is there twice, names that repeat others."""
    values: dict[str, Value] = {"x" * 60_000 + f"{i:04}": b"" for i in range(1200)}
    monkeypatch.setattr(ocdbt, "_NODE_BYTES", 1 << 30)
    flat = ocdbt.write_tree(values, "d/0")
    assert len(flat.nodes) < 200_000
    with pytest.raises(ValueError, match="too long"):
        ocdbt.read_tree(flat.manifest, lambda place: flat.nodes)
    monkeypatch.setattr(ocdbt, "_MOST_NODE_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"a node of height 0 with [\d,]+ bytes"):
        ocdbt.read_tree(flat.manifest, lambda place: flat.nodes)
    monkeypatch.setattr(ocdbt, "_NODE_BYTES", 100)
    monkeypatch.setattr(ocdbt, "_append", lambda out, node, file: _same_place(out, node, file))
    looped = ocdbt.write_tree({f"{i:05}": b"" for i in range(9)}, "d/0")
    with pytest.raises(ValueError, match="twice"):
        ocdbt.read_tree(looped.manifest, _reader(looped))


def _same_place(out: bytearray, node: bytes, file: str) -> Place:
    """Every leaf of a tree is said to be where the first one is."""
    leaf = node[14] == 0
    place = Place(file, 0 if leaf else len(out), len(out) if leaf and out else len(node))
    if not out or not leaf:
        out += node
    return place


def _reader(tree: ocdbt.Tree) -> Callable[[Place], bytes]:
    return lambda place: tree.nodes[place.offset : place.offset + place.length]


def test_numbers_of_any_size_come_back() -> None:
    numbers = [0, 1, 127, 128, 300, 2**20, 2**35, 2**62, 2**63 + 5, 2**64 - 1]
    data = ocdbt._Bytes(ocdbt._varints(numbers) + b"rest")
    assert data.varints(len(numbers)) == numbers
    assert data.take(4) == b"rest"
    for broken in (b"\x80" * 11 + b"\x01", b"\x80", b""):
        with pytest.raises(ValueError):
            ocdbt._Bytes(broken).varints(1)
    assert np.all(ocdbt._Bytes(b"").varints(0) == [])
