"""Cursors against Flax's: the same changes, on the same structures."""

from __future__ import annotations

import collections
import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.core
import flax.cursor
import flax.struct
import jax.numpy as jnp
import pytest

import shardflax.cursor
from shardflax import core, nn, struct
from tests.core.harness import plain, registry

program, PROGRAMS = registry()
Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Plain:
    q: int = 1


def namespace(cursor: Any, struct: Any, core: Any) -> SimpleNamespace:
    @struct.dataclass
    class Model:
        a: Any
        b: Any = None

    def nested() -> Any:
        return {"a": {"b": [1, 2, (3, 4)]}, "p": Point(1, {"z": 5}), "m": Model(1)}

    return SimpleNamespace(
        cursor=cursor.cursor, Model=Model, freeze=core.freeze, nested=nested,
        fields=lambda x: (x.a, x.b), error=cursor.CursorFindError,
    )  # fmt: skip


OURS = namespace(shardflax.cursor, struct, core)
THEIRS = namespace(flax.cursor, flax.struct, flax.core)


def comparable(x: Any) -> Any:
    """Without dataclasses, of which each side has its own."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: comparable(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, dict | core.FrozenDict | flax.core.FrozenDict):
        return {k: comparable(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        items = map(comparable, x)
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_flax(run: Any) -> None:
    assert comparable(run(OURS)) == comparable(run(THEIRS))


@program
def set_one_place(n: Any) -> Any:
    return [
        n.cursor(n.nested())["a"]["b"][0].set(9), n.cursor(n.nested())["p"].x.set(7),
        n.cursor(n.nested())["m"].a.set({"w": 1}), n.cursor(n.nested())["a"]["b"][2][1].set(7),
        n.cursor(n.nested())["p"].y["z"].set(0), n.cursor(3).set(4), n.cursor({"a": 1}).set([2]),
        n.cursor(n.freeze({"a": {"b": 1}}))["a"]["b"].set(3), n.cursor(Plain()).q.set(3),
    ]  # fmt: skip


@program
def several_changes(n: Any) -> Any:
    data = n.nested()
    c = n.cursor(data)
    c["a"]["b"][0] = 10
    c["p"].x = 6
    c["m"].a += 3
    c["m"].b = {"k": 1}
    c["new"] = 4
    first = c.build()
    c["a"]["b"][2][0] *= 5
    c["m"].b["k"] = 2
    return [first, c.build(), c["a"].build(), c["a"]["b"][2].build(), data]


@program
def later_changes_win(n: Any) -> Any:
    over, under = n.cursor({"a": {"x": 0, "y": 5}}), n.cursor({"a": {"x": 0}})
    over["a"]["x"] = 1
    over["a"] = 3
    under["a"] = {"n": 1}
    under["a"]["x"] = 1
    return over.build(), under.build()


@program
def reading_changes_nothing(n: Any) -> Any:
    data = n.nested()
    c = n.cursor(data)
    seen = [len(c["a"]["b"]), c["m"].a == 1, [x.build() for x in c["a"]["b"]]]
    return seen, c.build()


@program
def operators(n: Any) -> Any:
    c = n.cursor({"v": 8, "w": -3, "l": [1]})
    v, w = c["v"], c["w"]
    return [
        v + 2, v - 2, v * 2, v / 2, v // 3, v % 3, v**2, v << 1, v >> 1, v & 12, v | 1, v ^ 9,
        2 + v, 2 - v, 2 * v, 2 / v, 20 // v, 20 % v, 2**v, 1 << v, 1024 >> v, 12 & v, 1 | v, 9 ^ v,
        v < 2, v <= 8, v > 2, v >= 9, v == 8, v != 8, v == w, v + w, -w, +w, abs(w), ~w,
        c["l"] + [2],
    ]  # fmt: skip


@program
def updates(n: Any) -> Any:
    paths: list[str] = []

    def times(path: str, x: Any) -> Any:
        paths.append(path)
        return x * 10 if isinstance(x, int) else x

    def cut(path: str, x: Any) -> Any:
        return "R" if path in ("a/b", "p/y/z") else x

    return [
        n.cursor(n.nested()).apply_update(times).build(), paths,
        n.cursor(n.nested()).apply_update(cut).build(),
        n.cursor({1: {"a": 2}}).apply_update(times).build(),
        n.cursor(n.freeze({"a": [1]})).apply_update(times).build(),
    ]  # fmt: skip


@program
def finds(n: Any) -> Any:
    def data() -> Any:
        return {"a": {"k": 1}, "b": {"k": 2, "l": [3]}}

    c = n.cursor(data())
    changed = n.cursor(data())
    for found in list(changed.find_all(lambda path, x: isinstance(x, dict))):
        found["new"] = 0
    return [
        c.find(lambda path, x: path == "a/k").set(5),
        [found.build() for found in n.cursor(data()).find_all(lambda path, x: "k" in path)],
        [found.set(9) for found in n.cursor(data()).find_all(lambda path, x: path[-1] == "k")],
        changed.build(), list(c.find_all(lambda path, x: False)),
    ]  # fmt: skip


@program
def a_mapping_stays_what_it_is(n: Any) -> Any:
    made = n.cursor({"o": collections.OrderedDict(b=1, a=2)})["o"]["a"].set(3)
    return type(made["o"]).__name__, list(made["o"].items())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda n: n.cursor({"a": 1})["zz"], KeyError),
        (lambda n: n.cursor(Plain()).zz, AttributeError),
        (lambda n: n.cursor({"a": 1}).zz, AttributeError),
        (lambda n: hash(n.cursor({"a": 1})), TypeError),
        (lambda n: iter(n.cursor({"a": 1})), NotImplementedError),
    ],
)
def test_errors(wrong: Any, error: Any) -> None:
    for n in (THEIRS, OURS):
        with pytest.raises(error):
            wrong(n)


def test_find_wants_one() -> None:
    for n in (THEIRS, OURS):
        with pytest.raises(n.error):
            n.cursor({"a": 1}).find(lambda path, x: False)
    with pytest.raises(OURS.error, match="2 do: a, b"):
        OURS.cursor({"a": 1, "b": 2}).find(lambda path, x: True)


def test_arrays_and_modules_are_changed_too() -> None:
    c = OURS.cursor({"w": jnp.arange(3)})
    assert c["w"].shape[0] == 3
    c["w"][0] = 7
    assert c.build()["w"].tolist() == [7, 1, 2]
    model = OURS.cursor(nn.Sequential([nn.Dense(3)])).layers[0].features.set(4)
    assert model == nn.Sequential([nn.Dense(4)])


def test_a_cursor_as_a_value_is_what_it_stands_for() -> None:
    c = OURS.cursor({"a": 1, "b": [2]})
    c["a"] = c["b"]
    assert c.build() == {"a": [2], "b": [2]}
    assert plain(c["b"].build()) == [2]
