"""Flat dicts and traversals against Flax's."""

from __future__ import annotations

import collections
import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.core
import flax.traverse_util
import pytest

from shardflax import struct, traverse_util
from shardflax.core import FrozenDict
from tests.core.harness import plain, registry

pytestmark = pytest.mark.filterwarnings("ignore:`flax.traverse_util:DeprecationWarning")
program, PROGRAMS = registry()
NESTED = {"a": {"b": 1, "c": {}}, "d": {}, "e": {"f": {"g": 2}}, 3: {4: 5}}
Point = collections.namedtuple("Point", "x y")
OURS = SimpleNamespace(**{**vars(traverse_util), "FrozenDict": FrozenDict})
THEIRS = SimpleNamespace(**{**vars(flax.traverse_util), "FrozenDict": flax.core.FrozenDict})


@dataclasses.dataclass(frozen=True)
class Leaf:
    bar: int = 1
    rest: Any = None


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_flax(run: Any) -> None:
    assert plain(run(OURS)) == plain(run(THEIRS))


@program
def flat_dicts(t: Any) -> Any:
    named = {k: v for k, v in NESTED.items() if k != 3}
    kept = t.flatten_dict(NESTED, keep_empty_nodes=True)
    return [
        t.flatten_dict(NESTED), t.flatten_dict(named, sep="/"), t.flatten_dict({}),
        {k: "empty" if v is t.empty_node else v for k, v in kept.items()},
        t.unflatten_dict(kept), t.unflatten_dict({}), t.unflatten_dict({"a/b": 1, "c": 2}, sep="/"),
        t.unflatten_dict(t.flatten_dict(named, keep_empty_nodes=True, sep="."), sep="."),
        t.flatten_dict(t.FrozenDict(NESTED)), t.flatten_dict({}, keep_empty_nodes=True),
        t.flatten_dict(NESTED, is_leaf=lambda path, x: path == ("a",)),
        t.flatten_dict(named, is_leaf=lambda path, x: "b" in x, sep="/"),
        t.flatten_dict(NESTED, is_leaf=lambda path, x: True),
    ]  # fmt: skip


@program
def path_aware_map(t: Any) -> Any:
    def pair(path: Any, x: Any) -> Any:
        return path, x

    return [t.path_aware_map(pair, NESTED), t.path_aware_map(pair, t.FrozenDict(NESTED))]


@program
def traversals(t: Any) -> Any:
    one, double = t.t_identity, lambda x: x + x
    data = [{"foo": 1, "bar": 2}, {"foo": 3, "bar": 4}]
    cases = [
        (one, 3), (one.each()["foo"], data), (one["foo"].bar, {"foo": Leaf(2)}),
        (one.x, Point(1, 2)), (one[1], (1, 2)), (one[1], [1, 2]), (one[0], Point(1, 2)),
        (one.each(), {"a": 1, "b": 2}), (one.each(), (1, 2)), (one.tree(), {"a": [1, (2,)]}),
        (one.each().filter(lambda x: x > 1), [1, 2, 3]), (one.merge(one[0], one[2]), [1, 2, 3]),
        (one.each().merge(one["foo"], one["bar"]), data), (one[0].compose(one[1]), [[1, 2]]),
        (one["a"]["b"].each(), {"a": {"b": [1, 2]}}), (one.each().tree(), [{"a": 1}, [2]]),
        (t.TraverseId(), 1), (t.TraverseItem("a"), {"a": 1}), (t.TraverseAttr("x"), Point(1, 2)),
        (t.TraverseEach(), [1]), (t.TraverseTree(), [1]), (t.TraverseFilter(bool), 0),
        (t.TraverseMerge(one, one), 1), (t.TraverseCompose(one[0], one[0]), [[1]]),
    ]  # fmt: skip
    found = []
    for traversal, x in cases:
        values = list(traversal.iterate(x))
        found.append((values, traversal.update(double, x)))
        if len(values) < 3 and not isinstance(traversal, t.TraverseMerge):
            found.append(traversal.set(values[::-1], x))
    return found, data


@program
def parameters(t: Any) -> Any:
    params = {"d": {"kernel": 1, "bias": 2, "none": {}}, "a": {"kernel": 3}}
    seen: list[str] = []
    kernels = t.ModelParamTraversal(lambda path, x: seen.append(path) or path.endswith("/kernel"))
    big = t.ModelParamTraversal(lambda path, x: x > 1)
    frozen = t.FrozenDict(params)
    updated = kernels.update(lambda x: 10 * x, frozen)
    return [
        list(kernels.iterate(params)), seen, kernels.update(lambda x: 10 * x, params),
        list(big.iterate(params)), big.set([7, 8], params), updated, type(updated).__name__,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda t: t.flatten_dict([1]), (TypeError, AssertionError)),
        (lambda t: t.unflatten_dict([1]), (TypeError, AssertionError)),
        (lambda t: t.unflatten_dict({("a",): 1, ("a", "b"): 2}), (ValueError, TypeError)),
        (lambda t: t.t_identity.each().set([7], [1, 2]), ValueError),
        (lambda t: t.t_identity.each().set([7, 8, 9], [1, 2]), ValueError),
        (lambda t: t.t_identity.each().update(abs, 3), ValueError),
        (lambda t: t.t_identity.each().update(abs, Point(1, 2)), ValueError),
        (lambda t: list(t.t_identity["z"].iterate({})), KeyError),
        (lambda t: t.t_identity.foo.update(abs, object()), AttributeError),
        (lambda t: list(t.ModelParamTraversal(abs).iterate([1])), ValueError),
    ],
)
def test_errors(wrong: Any, error: Any) -> None:
    for t in (THEIRS, OURS):
        with pytest.raises(error):
            wrong(t)


def test_what_lies_below_a_value_is_an_error_in_either_order() -> None:
    for flat in ({("a",): {}, ("a", "b"): 2}, {("a", "b"): 2, ("a",): {}}):
        with pytest.raises(ValueError, match="below"):
            traverse_util.unflatten_dict(flat)


def test_dataclasses_of_struct_are_updated() -> None:
    @struct.dataclass
    class Model:
        a: Any

    assert traverse_util.t_identity.a["w"].update(abs, Model({"w": -1})) == Model({"w": 1})


def test_frozen_dicts_stay_frozen() -> None:
    each = traverse_util.t_identity.each()["w"]
    updated = each.update(abs, FrozenDict({"a": {"w": -1}}))
    assert isinstance(updated, FrozenDict) and updated == {"a": {"w": 1}}
