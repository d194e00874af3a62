"""State dicts and MessagePack against Flax's: the same dicts and the same bytes, both ways."""

from __future__ import annotations

import collections
import tracemalloc
from types import SimpleNamespace
from typing import Any

import flax.core
import flax.linen
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest

from shardflax import partitioning, serialization, struct
from shardflax.core import FrozenDict
from shardflax.errors import MsgpackError, StateDictError
from tests.core.harness import assert_equal, plain, registry

program, PROGRAMS = registry()
Point = collections.namedtuple("Point", "x y")


def namespace(serialization: Any, struct: Any, frozen: Any, partitioned: Any) -> SimpleNamespace:
    @struct.dataclass
    class Model:
        a: Any
        b: Any = struct.field(pytree_node=False, default=3)

    own = {"Model": Model, "FrozenDict": frozen, "Partitioned": partitioned}
    return SimpleNamespace(**{**vars(serialization), **own})


OURS = namespace(serialization, struct, FrozenDict, partitioning.Partitioned)
THEIRS = namespace(flax.serialization, flax.struct, flax.core.FrozenDict, flax.linen.Partitioned)

LEAVES = {
    "f32": np.arange(3, dtype="f4"), "jax": jnp.ones((2, 1)), "bf16": jnp.ones(2, "bfloat16"),
    "f16": np.ones(1, "f2"), "i64": np.arange(2), "u8": np.ones(2, "u1"), "bool": np.array([True]),
    "c64": np.array([1j], "c8"), "c128": np.array([1j]), "f8": jnp.ones(1, jnp.float8_e4m3fn),
    "zero": np.zeros((0, 3)), "rank 0": np.array(2.0), "jax rank 0": jnp.float32(3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)), "strided": np.arange(6)[::2],
    "scalar": np.float32(2), "int scalar": np.int64(3), "bool scalar": np.bool_(True),
    "complex scalar": np.complex64(1j), "complex": 1 + 2j, "float": 1.5, "int": -3, "big": 2**63,
    "true": True, "none": None, "str": "a", "bytes": b"x", "list": [1, [2, {"a": 3}]],
    "dict": {"b": 1, "a": {"c": [np.ones(1)]}}, "int keys": {2: 1, 1: 2}, "empty": {},
    "date": np.array(["2020-01-01"], "M8[D]"),
}  # fmt: skip


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_flax(run: Any) -> None:
    assert_equal(plain(run(OURS)), plain(run(THEIRS)))


@pytest.mark.parametrize("name", LEAVES)
def test_same_bytes(name: str) -> None:
    theirs = flax.serialization.msgpack_serialize(LEAVES[name])
    assert serialization.msgpack_serialize(LEAVES[name]) == theirs
    restored = flax.serialization.msgpack_restore(theirs)
    ours = serialization.msgpack_restore(theirs)
    assert_equal([ours], [restored])
    assert jax.tree.map(type, ours) == jax.tree.map(type, restored)


def test_big_arrays_are_cut_as_flax_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        "a": np.arange(10, dtype="f4").reshape(2, 5),
        "l": [np.arange(5)],
        "s": np.ones(2, "u1"),
    }
    for limit in (40, 17, 16, 3):
        for module in (serialization, flax.serialization):
            monkeypatch.setattr(module, "MAX_CHUNK_SIZE", limit)
        theirs = flax.serialization.msgpack_serialize(tree)
        assert serialization.msgpack_serialize(tree) == theirs
        assert_equal(serialization.msgpack_restore(theirs), tree)
    assert tree["a"].shape == (2, 5)  # what is given is changed only when that is allowed
    serialization.msgpack_serialize(tree, in_place=True)
    assert sorted(tree["a"]) == ["__msgpack_chunked_array__", "chunks", "shape"]


def test_arrays_too_big_for_a_list_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardflax._msgpack._MAX_IN_LIST", 16)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 8)
    data = serialization.msgpack_serialize([np.arange(5), np.arange(2)])
    assert data.count(b"__msgpack_chunked_array__") == 1
    assert_equal(serialization.msgpack_restore(data), [np.arange(5), np.arange(2)])


@program
def state_dicts(z: Any) -> Any:
    adam = optax.chain(optax.adam(1e-3), optax.masked(optax.trace(0.9), {"w": True}))
    return [
        z.to_state_dict(x)
        for x in (
            Point(1, [2, 3]), z.Model({"z": jnp.ones(1)}), (1, {"a": 2}), [np.float32(1), None],
            z.FrozenDict({"a": {"b": 1}}), {1: 2}, {}, (), z.Partitioned(jnp.ones(1), ("a",)), 3,
            adam.init({"w": jnp.ones(1)}), {"a": [Point(1, z.Model(2))]}, {"o": optax.EmptyState()},
        )
    ]  # fmt: skip


@program
def restored(z: Any) -> Any:
    box = z.Partitioned(jnp.ones(1), ("a",))
    model = z.from_state_dict(z.Model(1, b=4), {"a": 5})
    frozen = z.from_state_dict(z.FrozenDict({"a": 1}), {"a": 2})
    old = {"name": "P", "fields": {"0": "x", "1": "y"}, "values": {"0": 7, "1": 8}}
    return [
        z.from_state_dict(Point(1, 2), {"x": 3, "y": 4}), model.a, model.b, frozen,
        type(frozen).__name__, z.from_state_dict([1, [2, 3]], {"0": 3, "1": {"0": 4, "1": 5}}),
        z.from_state_dict({"a": {"b": 1}}, {"a": {"b": 3, "z": 2}}),
        z.from_state_dict({1: 2}, {"1": 5}), z.from_state_dict(None, {"a": 2}),
        z.from_state_dict({"a": 1}, {"a": {"q": 2}}), z.from_state_dict(box, {"value": 3}).names,
        z.from_state_dict(Point(1, 2), old), z.from_state_dict(np.ones(2), np.zeros(3)),
    ]  # fmt: skip


@program
def through_bytes(z: Any) -> Any:
    tx = optax.adam(1e-3)
    params = {"w": jnp.arange(2.0), "b": jnp.ones(1, jnp.bfloat16)}
    target = z.Model((z.FrozenDict(params), tx.init(params), Point(1, "a")))
    data = z.to_bytes(target)
    zeros = jax.tree.map(lambda x: x * 0, target)
    back = z.from_bytes(zeros, data)
    return [
        np.frombuffer(data, "u1"), jax.tree.leaves(back), str(jax.tree.structure(back.a[1])),
        z.from_bytes(None, data),
    ]  # fmt: skip


@program
def registered_types(z: Any) -> Any:
    class Own:
        def __init__(self, value: Any) -> None:
            self.value = value

    def to_state(own: Any) -> Any:
        return {"value": z.to_state_dict(own.value)}

    def from_state(own: Any, state: Any) -> Any:
        return Own((z.current_path(), z.from_state_dict(own.value, state["value"], name="value")))

    before = z.is_serializable(Own(1))
    z.register_serialization_state(Own, to_state, from_state)
    state = z.to_state_dict({"a": Own([1])})
    z.register_serialization_state(Own, to_state, from_state, override=True)
    return [
        before, z.is_serializable(Own(1)), state, z.current_path(),
        z.from_state_dict({"a": Own([1])}, {"a": {"value": {"0": 2}}})["a"].value,
        [z.is_serializable(x) for x in (3, {}, [], (), z.Model(1), z.FrozenDict())],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        (lambda z: z.from_state_dict({"k": Point(1, 2)}, {"k": {"x": 3}}), "./k"),
        (lambda z: z.from_state_dict({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}), "./a"),
        (lambda z: z.from_state_dict({"l": [1, 2]}, {"l": {"0": 3}}), "./l"),
        (lambda z: z.from_state_dict({"m": z.Model(1)}, {"m": {}}), "./m"),
        (lambda z: z.from_state_dict({"m": z.Model(1)}, {"m": {"a": 1, "zz": 2}}), "./m"),
        (lambda z: z.from_state_dict({"a": [1]}, {"a": {}}, name="root"), "root/a"),
        (lambda z: z.to_state_dict({1: 2, "1": 3}), ""),
        (lambda z: z.register_serialization_state(dict, abs, abs), ""),
    ],
)
def test_errors_name_the_path(wrong: Any, path: str) -> None:
    for z in (THEIRS, OURS):
        with pytest.raises(ValueError) as info:
            wrong(z)
        assert path in str(info.value)
        assert z.current_path() == ""


def test_errors_of_our_own() -> None:
    with pytest.raises(StateDictError, match=r"at ./a: a list is restored from a dict; got list"):
        serialization.from_state_dict({"a": [1]}, {"a": [2]})
    with pytest.raises(StateDictError, match=r"at ./params: .*did you mean 'kernal'"):
        serialization.from_state_dict({"params": {"kernel": 1}}, {"params": {"kernal": 1}})
    with pytest.raises(TypeError, match="gave no dict"):
        serialization.register_serialization_state(frozenset, list, lambda x, s: x)
        serialization.to_state_dict(frozenset())


@pytest.mark.parametrize(
    "leaf",
    [
        (1,), {1}, np.array([object()]), np.array(["a"]), jax.random.key(0), 2**70, object(),
        np.zeros(1, "i4,f4"), {(1,): 2},
    ],
)  # fmt: skip
def test_what_cannot_be_written(leaf: Any) -> None:
    with pytest.raises(MsgpackError, match="at a/0: "):
        serialization.msgpack_serialize({"a": [leaf]})


def test_trees_are_as_deep_as_can_be_read() -> None:
    tree: Any = 1
    for _ in range(200):
        tree = {"a": tree}
    assert serialization.msgpack_restore(serialization.msgpack_serialize(tree)) == tree
    with pytest.raises(MsgpackError, match="more than 200 levels"):
        serialization.msgpack_serialize([tree])


def test_other_byte_orders_are_turned_round() -> None:
    data = serialization.msgpack_serialize(np.arange(2, dtype=">i4"))
    assert serialization.msgpack_restore(data).tolist() == [0, 1]


def _array(shape: Any, dtype: Any, data: Any, code: int = 1) -> Any:
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb((shape, dtype, data))))


def _chunked(shape: Any, chunks: Any) -> bytes:
    mark = {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}
    return serialization.msgpack_serialize(mark)


HOSTILE = {
    "nothing": b"", "no code": b"\xc1", "more after the end": b"\x01x",
    "cut off": serialization.msgpack_serialize(np.ones(9))[:-1],
    "an array of 4e9 items": b"\xdd\xff\xff\xff\xff", "a map of 4e9 items": b"\xdf\xff\xff\xff\xff",
    "a string of 4 GB": b"\xdb\xff\xff\xff\xff", "deep": b"\x91" * 100_000 + b"\xc0",
    "deep maps": b"\x81\xa1a" * 900 + b"\xc0",
    "objects": _array([1], "object", b"\0" * 8), "pickles": _array([1], "O", b"cos\nsystem\n"),
    "records": _array([1], "i4,f4", b"\0" * 8), "strings": _array([1], "S1000000000", b"a"),
    "no dtype": _array([1], 3, b"a"), "unknown dtype": _array([1], "float7", b"a"),
    "attribute as dtype": _array([1], "float0", b"a"),
    "huge shape": _array([2**40], "float32", b"\0" * 4), "short": _array([3], "float32", b"\0" * 8),
    "negative": _array([-1, -1], "uint8", b"a"), "no shape": _array(3, "uint8", b"a"),
    "no sizes": _array(["a"], "uint8", b"a"), "no bytes": _array([1], "uint8", "a b"),
    "no array": msgpack.packb(msgpack.ExtType(1, b"\xc1")),
    "unknown extension": msgpack.packb(msgpack.ExtType(9, b"")),
    "half a complex": msgpack.packb(msgpack.ExtType(2, msgpack.packb((1,)))),
    "pieces that do not fit": _chunked({"0": 5}, {"0": np.ones(2), "1": np.ones(2)}),
    "pieces of two dtypes": _chunked({"0": 4}, {"0": np.ones(2), "1": np.ones(2, "f4")}),
    "no pieces": _chunked({"0": 0}, {}), "pieces missing": _chunked({"0": 2}, {"1": np.ones(2)}),
    "pieces that are none": _chunked({"0": 2}, {"0": 1}),
    "no numbers": _chunked(3, {"0": np.ones(2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MsgpackError):
            serialization.msgpack_restore(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
