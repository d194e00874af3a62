"""Safetensors and MessagePack: equal to what others write and read, and nothing hostile gets in."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from shardflax import ckpt
from shardflax.ckpt.safetensors_header import CODES, header_bytes, read_header

WEIGHTS = {
    "model": {
        "layers": {
            str(i): {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) + i} for i in range(3)
        },
        "scale": np.float16(1.5) * np.ones(5, np.float16),
        "empty": np.zeros((0, 7), np.int8),
        "mask": np.array([True, False, True]),
    }
}


def file_of(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any, *offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def test_the_reference_reads_ours(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    ckpt.save_safetensors(path, WEIGHTS, metadata={"format": "np"})
    found = safetensors.numpy.load_file(path)
    assert (
        found["model.layers.2.kernel"].tolist()
        == WEIGHTS["model"]["layers"]["2"]["kernel"].tolist()
    )
    assert found["model.empty"].shape == (0, 7) and found["model.mask"].tolist() == [1, 0, 1]
    assert found["model.scale"].dtype == np.float16
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "np"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_we_read_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    flat = {"b.w": np.arange(5, dtype=np.int16), "a": np.array(3, np.float32)}
    flat["c.z"] = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(flat, path, metadata={"who": "me"})
    restored = ckpt.load_safetensors(path)
    assert restored.extras == {"who": "me"} and set(restored.state) == {"a", "b", "c"}
    assert restored.state["b"]["w"].tolist() == [0, 1, 2, 3, 4] and restored.state["a"] == 3
    assert restored.state["c"]["z"].dtype == ml_dtypes.bfloat16
    assert restored.state["c"]["z"].tobytes() == flat["c.z"].tobytes()


@pytest.mark.parametrize("name", sorted(CODES.values()))
def test_every_dtype_comes_back(tmp_path: Path, name: str) -> None:
    dtype = np.dtype(jnp.dtype(name))
    raw = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, 3 * dtype.itemsize)
    array = raw.astype(np.uint8).view(dtype)
    ckpt.save_safetensors(tmp_path / "w", {"odd": np.ones(3, np.int8), "w": array})
    found = ckpt.load_safetensors(tmp_path / "w").state["w"]
    assert found.dtype == dtype and type(found) is np.ndarray
    assert found.tobytes() == array.tobytes()


def test_what_the_format_lacks_is_kept_beside_it(tmp_path: Path) -> None:
    state = {"key": jax.random.key(3), "n": 7, "x": 2.5, "s": "text", "big": 2**70,
             "none": None, "a.b": np.ones(2), "t": (1, {"u": np.zeros(1)})}  # fmt: skip
    path = tmp_path / "w.safetensors"
    ckpt.save_safetensors(path, state)
    found = ckpt.load_safetensors(path, state).state
    assert jax.random.key_data(found["key"]).tolist() == [0, 3]
    same = ("n", "x", "s", "big", "none")
    assert {k: found[k] for k in same} == {k: state[k] for k in same}
    assert found["t"][0] == 1 and found["a.b"].tolist() == [1, 1]
    assert set(safetensors.numpy.load_file(path)) == {"key", "n", "x", "a.b", "t.0", "t.1.u"}


def test_into_a_layout_and_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({"enc.w": np.arange(32, dtype=np.float32).reshape(8, 4)}, path)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    target = {"body": {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=sharding)}}
    found = ckpt.load_safetensors(path, target, rename={"enc": "body"}, cast=True)
    value = found.state["body"]["w"]
    assert value.sharding == sharding and value[7].tolist() == [28, 29, 30, 31]
    assert found.report.cast == found.report.renamed == ("body/w",)
    with pytest.raises(
        ckpt.CheckpointMismatchError, match=r"w\.safetensors' does not fit"
    ) as caught:
        ckpt.load_safetensors(path, target, rename={"enc": "body"})
    assert caught.value.step is None and "saved float32[8,4], target bfloat16" in str(caught.value)


def test_several_files_and_their_index(tmp_path: Path) -> None:
    for i in range(2):
        safetensors.numpy.save_file({f"l.{i}": np.full(3, i)}, tmp_path / f"m-{i}.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"l.{i}": f"m-{i}.safetensors" for i in range(2)}}))
    for path in (tmp_path, index):
        assert ckpt.load_safetensors(path).state["l"]["1"].tolist() == [1, 1, 1]
    for name in ("l.1", "l.2"):
        index.write_text(json.dumps({"weight_map": {name: "m-0.safetensors"}}))
        with pytest.raises(
            ckpt.CheckpointReadError, match=f"'{name}' in m-0.safetensors, which has"
        ):
            ckpt.load_safetensors(index)
    for name in ("../w.safetensors", "/etc/passwd", "a\0b", 3, "", ".."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ckpt.CheckpointReadError, match="outside of its folder"):
            ckpt.load_safetensors(index)


def test_leaves_that_it_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ckpt.CheckpointLeafError, match="'a/w': safetensors files cannot hold int4"):
        ckpt.save_safetensors(path, {"a": {"w": np.ones(2, ml_dtypes.int4)}})
    with pytest.raises(ckpt.CheckpointLeafError, match=r"'a\.b', which is taken"):
        ckpt.save_safetensors(path, {"a": {"b": np.ones(2)}, "a.b": np.ones(2)})
    with pytest.raises(ckpt.CheckpointLeafError, match="it has no value"):
        ckpt.save_safetensors(path, {"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
    assert list(tmp_path.iterdir()) == []


HOSTILE = {
    "empty": b"",
    "short": b"\0\0\0",
    "length beyond the end": file_of({}, length=10**15),
    "huge length": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "not JSON": file_of(b"{oops}"),
    "a list": file_of([]),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "deep": file_of(b'{"a":' + b"[" * 100_000),
    "twice": file_of(b'{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},'
                     b'"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
    "surrogate": file_of({"\ud800": entry([0], 0, 0)}),
    "nan": file_of(b'{"a": NaN}'),
    "more digits than Python reads": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
    "gap": file_of({"a": entry([1], 4, 8)}, bytes(8)),
    "overlap": file_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "rest": file_of({"a": entry([1], 0, 4)}, bytes(5)),
    "beyond": file_of({"a": entry([2], 0, 8)}, bytes(4)),
    "backwards": file_of({"a": entry([0], 4, 0)}),
    "negative": file_of({"a": entry([-1], 0, -4)}),
    "shape": file_of({"a": entry([2**40, 2**40], 0, 4)}, bytes(4)),
    "shape that wraps": file_of({"a": entry([2**62, 4], 0, 0)}),
    "dims": file_of({"a": entry([1] * 65, 0, 4)}, bytes(4)),
    "float size": file_of({"a": entry([1.0], 0, 4)}, bytes(4)),
    "bool size": file_of({"a": entry([True], 0, 4)}, bytes(4)),
    "one offset": file_of({"a": entry([1], 4)}, bytes(4)),
    "dtype": file_of({"a": entry([1], 0, 4, dtype="O")}, bytes(4)),
    "dtype of numpy": file_of({"a": entry([1], 0, 4, dtype="float32")}, bytes(4)),
    "no dtype": file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "more keys": file_of({"a": {**entry([1], 0, 4), "path": "/etc"}}, bytes(4)),
    "metadata": file_of({"__metadata__": {"a": 1}}),
    "our metadata": file_of({"__metadata__": {"shardflax.leaves": '{"x": {"path": ["x"]}}'}}),
    "our spec": file_of(
        {"a": entry([1], 0, 4), "__metadata__": {"shardflax.leaves": json.dumps(
            {"a": {"path": ["a"], "kind": "array", "dtype": "float64", "shape": [10**9]}})}},
        bytes(4)),
    "a leaf without data": file_of({"__metadata__": {"shardflax.leaves": json.dumps(
        {"a": {"path": ["a"], "kind": "array", "dtype": "float64", "shape": [10**12]}})}}),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(HOSTILE[what])
    tracemalloc.start()
    with pytest.raises(ckpt.CheckpointReadError, match=r"w\.safetensors' cannot be read") as caught:
        ckpt.load_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert len(str(caught.value)) < 2000


ATOM = st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.sampled_from([*CODES])
VALUE = st.recursive(
    ATOM, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x)
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*CODES, "X"]), "shape": st.lists(st.integers(0, 3), max_size=3),
     "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2)}
) | VALUE  # fmt: skip


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=4), ENTRY, max_size=4), st.integers(0, 40))
def test_headers_are_right_or_refused(body: dict[str, Any], size: int) -> None:
    data = file_of(body, bytes(size))
    try:
        header = read_header(io.BytesIO(data))
    except ValueError:
        return
    assert sum(tensor.nbytes for tensor in header.tensors.values()) == size
    assert all(t.begin + t.nbytes <= len(data) for t in header.tensors.values())
    # What we take, the reference takes as well.
    assert len(safetensors.deserialize(data)) == len(header.tensors)


@settings(max_examples=60)
@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_never_leads_outside(at: int, value: int) -> None:
    head, _ = header_bytes({"a": ("float32", (2, 3)), "b": ("int8", (5,))}, {"k": "v"})
    data = bytearray(head + bytes(29))
    data[at % len(data)] = value
    try:
        header = read_header(io.BytesIO(bytes(data)))
    except ValueError:
        return
    assert all(t.begin + t.nbytes <= len(data) for t in header.tensors.values())


def test_msgpack_is_flaxs_in_both_directions(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.arange(4.0)}, "step": 3, "opt": (np.ones(2, np.int8), None)}
    ours, theirs = tmp_path / "ours.msgpack", tmp_path / "checkpoint_3"
    ckpt.save_msgpack(ours, state)
    back = flax.serialization.msgpack_restore(ours.read_bytes())
    assert back["params"]["w"].tolist() == [0, 1, 2, 3] and back["step"] == 3
    theirs.write_bytes(flax.serialization.to_bytes(state))
    found = ckpt.load_msgpack(theirs, state, cast="step")
    assert found.state["params"]["w"].tolist() == [0, 1, 2, 3]
    assert found.state["opt"][0].dtype == np.int8 and found.state["step"] == 3
    part = ckpt.load_msgpack(theirs, {"v": jnp.zeros(4)}, rename={"params/w": "v"}, extra=True)
    assert part.state["v"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("data", [b"", b"\x93\1\2\3", b"\x81\xa1a\xc7", b"\x81\xa1a\xc7\1\x09x"])
def test_msgpack_that_is_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "f.msgpack"
    path.write_bytes(data)
    with pytest.raises(ckpt.CheckpointReadError, match=r"f.msgpack.* cannot be read"):
        ckpt.load_msgpack(path)
