"""Nested dicts as flat ones, and traversals: selections of a tree that can be read and updated.

>>> data = [{"foo": 1, "bar": 2}, {"foo": 3, "bar": 4}]
>>> traversal = t_identity.each()["foo"]
>>> list(traversal.iterate(data))
[1, 3]
>>> traversal.update(lambda x: x * 10, data)
[{'foo': 10, 'bar': 2}, {'foo': 30, 'bar': 4}]
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from shardflax.core.frozen_dict import FrozenDict

__all__ = [
    "ModelParamTraversal",
    "Traversal",
    "TraverseAttr",
    "TraverseCompose",
    "TraverseEach",
    "TraverseFilter",
    "TraverseId",
    "TraverseItem",
    "TraverseMerge",
    "TraverseTree",
    "empty_node",
    "flatten_dict",
    "path_aware_map",
    "t_identity",
    "unflatten_dict",
]


# --- nested dicts


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _EmptyNode:
    """Stands for an empty dict in a flat one."""


empty_node = _EmptyNode()


def flatten_dict(
    xs: Mapping[Any, Any],
    keep_empty_nodes: bool = False,
    is_leaf: Callable[[tuple[Any, ...], Mapping[Any, Any]], bool] | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """A nested dict as one whose keys are tuples of keys, or strings joined by `sep`.

    Empty dicts are dropped, or kept as `empty_node`.  `is_leaf(path, dict)` says which of the dicts
    inside are values.  Raises TypeError if `xs` is no dict.

    >>> flatten_dict({"foo": 1, "bar": {"a": 2, "b": {}}})
    {('foo',): 1, ('bar', 'a'): 2}
    >>> flatten_dict({"bar": {"a": 2}}, sep="/")
    {'bar/a': 2}
    """
    if not isinstance(xs, Mapping):
        raise TypeError(f"flatten_dict takes a dict; got {type(xs).__name__}: {xs!r}.")

    def visit(x: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        if not isinstance(x, Mapping) or (is_leaf is not None and is_leaf(path, x)):
            yield path, x
        elif x:
            for key, value in x.items():
                yield from visit(value, (*path, key))
        elif keep_empty_nodes and path:
            yield path, empty_node

    flat = dict(visit(xs, ()))
    return flat if sep is None else {sep.join(path): value for path, value in flat.items()}


def unflatten_dict(xs: Mapping[Any, Any], sep: str | None = None) -> dict[Any, Any]:
    """The nested dict that `flatten_dict` flattened.

    Raises TypeError if `xs` is no dict, ValueError if one path goes on below another's value.

    >>> unflatten_dict({("foo",): 1, ("bar", "a"): 2})
    {'foo': 1, 'bar': {'a': 2}}
    >>> unflatten_dict({"bar/a": 2}, sep="/")
    {'bar': {'a': 2}}
    """
    if not isinstance(xs, Mapping):
        raise TypeError(f"unflatten_dict takes a dict; got {type(xs).__name__}: {xs!r}.")
    nested: dict[Any, Any] = {}
    made = {id(nested)}  # a dict that is a value is no branch
    for key, value in xs.items():
        path = key if sep is None else key.split(sep)
        branch = nested
        for part in path[:-1]:
            if part not in branch:
                branch[part] = {}
                made.add(id(branch[part]))
            branch = branch[part]
            if id(branch) not in made:
                raise ValueError(f"unflatten_dict: {key!r} lies below a value.")
        if id(branch.get(path[-1])) in made:
            raise ValueError(f"unflatten_dict: other values lie below {key!r}.")
        branch[path[-1]] = {} if value is empty_node else value
    return nested


def path_aware_map(f: Callable[[tuple[Any, ...], Any], Any], nested_dict: Any) -> dict[Any, Any]:
    """`f(path, value)` for each leaf of a nested dict; `path` is the tuple of its keys.

    >>> params = {"a": {"x": 10, "y": 3}, "b": {"x": 20}}
    >>> path_aware_map(lambda path, x: x + 5 if "x" in path else -x, params)
    {'a': {'x': 15, 'y': -3}, 'b': {'x': 25}}
    """
    flat = flatten_dict(nested_dict, keep_empty_nodes=True)
    return unflatten_dict({p: v if v is empty_node else f(p, v) for p, v in flat.items()})


# --- traversals


class Traversal(abc.ABC):
    """A selection of values of a tree: `iterate` reads them, `update` and `set` replace them.

    Nothing is changed in place.  Traversals are made from `t_identity`: `t.name` and `t[key]` go
    to an attribute or item of what `t` selects, `each`, `tree` and `filter` to several.

    >>> from collections import namedtuple
    >>> Point = namedtuple("Point", "x y")
    >>> t_identity["p"].x.set([5], {"p": Point(1, 2)})
    {'p': Point(x=5, y=2)}
    """

    @abc.abstractmethod
    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The selected values of `inputs`, in order."""

    @abc.abstractmethod
    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        """`inputs` with `fn` applied to each selected value."""

    def set(self, values: Iterable[Any], inputs: Any) -> Any:
        """`inputs` with the selected values replaced by `values`, one each.

        Raises ValueError if there are more or fewer values than selected.
        """
        rest = list(values)
        count = len(list(self.iterate(inputs)))
        if count != len(rest):
            raise ValueError(f"set got {len(rest)} values; the traversal selects {count}.")
        left = iter(rest)
        return self.update(lambda _: next(left), inputs)

    def compose(self, other: Traversal) -> Traversal:
        """What `other` selects of what this one selects."""
        return TraverseCompose(self, other)

    def merge(self, *traversals: Traversal) -> Traversal:
        """What any of `traversals` selects of what this one selects, one after the other."""
        return self.compose(TraverseMerge(*traversals))

    def each(self) -> Traversal:
        """The items of each selected dict, list or tuple."""
        return self.compose(TraverseEach())

    def tree(self) -> Traversal:
        """The leaves of each selected pytree."""
        return self.compose(TraverseTree())

    def filter(self, fn: Callable[[Any], bool]) -> Traversal:
        """The selected values for which `fn` is true."""
        return self.compose(TraverseFilter(fn))

    def __getattr__(self, attr: str) -> Traversal:
        if attr.startswith("__"):
            raise AttributeError(attr)
        return self.compose(TraverseAttr(attr))

    def __getitem__(self, key: Any) -> Traversal:
        return self.compose(TraverseItem(key))


class TraverseId(Traversal):
    """Selects the tree itself.

    >>> list(TraverseId().iterate(3))
    [3]
    """

    def iterate(self, inputs: Any) -> Iterator[Any]:
        yield inputs

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        return fn(inputs)


t_identity = TraverseId()


class TraverseMerge(Traversal):
    """Selects what several traversals select, one after the other.

    >>> TraverseMerge(t_identity[0], t_identity[2]).update(lambda x: -x, [1, 2, 3])
    [-1, 2, -3]
    """

    def __init__(self, *traversals: Traversal) -> None:
        self._traversals = traversals

    def iterate(self, inputs: Any) -> Iterator[Any]:
        for traversal in self._traversals:
            yield from traversal.iterate(inputs)

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        for traversal in self._traversals:
            inputs = traversal.update(fn, inputs)
        return inputs


class TraverseCompose(Traversal):
    """Selects what a second traversal selects of what a first one selects.

    >>> list(TraverseCompose(TraverseEach(), TraverseItem("a")).iterate([{"a": 1}, {"a": 2}]))
    [1, 2]
    """

    def __init__(self, x: Traversal, y: Traversal) -> None:
        self._x, self._y = x, y

    def iterate(self, inputs: Any) -> Iterator[Any]:
        for value in self._x.iterate(inputs):
            yield from self._y.iterate(value)

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        return self._x.update(lambda value: self._y.update(fn, value), inputs)


class TraverseFilter(Traversal):
    """Selects the tree itself if a function of it is true.

    >>> list(TraverseEach().compose(TraverseFilter(lambda x: x > 1)).iterate([1, 2, 3]))
    [2, 3]
    """

    def __init__(self, fn: Callable[[Any], bool]) -> None:
        self._fn = fn

    def iterate(self, inputs: Any) -> Iterator[Any]:
        if self._fn(inputs):
            yield inputs

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        return fn(inputs) if self._fn(inputs) else inputs


class TraverseAttr(Traversal):
    """Selects an attribute of an object.

    An update copies named tuples, dataclasses, and other objects of which `copy.copy` makes one.

    >>> from types import SimpleNamespace
    >>> TraverseAttr("x").update(lambda x: x + 1, SimpleNamespace(x=1))
    namespace(x=2)
    """

    def __init__(self, attr: str) -> None:
        self._attr = attr

    def iterate(self, inputs: Any) -> Iterator[Any]:
        yield getattr(inputs, self._attr)

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        value = fn(getattr(inputs, self._attr))
        if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
            return inputs._replace(**{self._attr: value})  # pyright: ignore[reportAttributeAccessIssue]
        if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
            return dataclasses.replace(inputs, **{self._attr: value})
        made = copy.copy(inputs)
        setattr(made, self._attr, value)
        return made


class TraverseItem(Traversal):
    """Selects an item of a dict, list or tuple.

    >>> TraverseItem(1).update(lambda x: x + 1, (1, 2))
    (1, 3)
    """

    def __init__(self, key: Any) -> None:
        self._key = key

    def iterate(self, inputs: Any) -> Iterator[Any]:
        yield inputs[self._key]

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        value = fn(inputs[self._key])
        if isinstance(inputs, FrozenDict):
            return inputs.copy({self._key: value})
        if isinstance(inputs, tuple):
            items = list(inputs)
            items[self._key] = value
            return type(inputs)(*items) if hasattr(inputs, "_fields") else tuple(items)
        made = copy.copy(inputs)
        made[self._key] = value
        return made


class TraverseEach(Traversal):
    """Selects the items of a list or tuple, or the values of a dict.

    >>> TraverseEach().update(lambda x: x + 1, {"a": 1, "b": 2})
    {'a': 2, 'b': 3}
    """

    def iterate(self, inputs: Any) -> Iterator[Any]:
        yield from inputs.values() if isinstance(inputs, Mapping) else inputs

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            made = {key: fn(value) for key, value in inputs.items()}
            return FrozenDict(made) if isinstance(inputs, FrozenDict) else made
        if type(inputs) not in (list, tuple):
            kind = type(inputs).__name__
            raise ValueError(f"each() goes to the items of a dict, list or tuple; got {kind}.")
        return type(inputs)(fn(value) for value in inputs)


class TraverseTree(Traversal):
    """Selects the leaves of a pytree.

    >>> TraverseTree().update(lambda x: x + 1, {"a": [1, (2,)]})
    {'a': [2, (3,)]}
    """

    def iterate(self, inputs: Any) -> Iterator[Any]:
        yield from jax.tree.leaves(inputs)

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        return jax.tree.map(fn, inputs)


class ModelParamTraversal(Traversal):
    """Selects parameters by their names.

    `filter_fn(path, value)` says which; `path` is like `/encoder/dense/kernel`.  Parameters come in
    the order of their paths.  Raises ValueError if the tree is no nested dict.

    >>> params = {"dense": {"kernel": 2, "bias": 1}}
    >>> kernels = ModelParamTraversal(lambda path, value: path.endswith("/kernel"))
    >>> list(kernels.iterate(params)), kernels.update(lambda x: 10 * x, params)
    ([2], {'dense': {'bias': 1, 'kernel': 20}})
    """

    def __init__(self, filter_fn: Callable[[str, Any], bool]) -> None:
        self._filter_fn = filter_fn

    def _flat(self, inputs: Any) -> list[tuple[tuple[Any, ...], Any, bool]]:
        """Path, value, and whether it is selected."""
        if not isinstance(inputs, Mapping):
            kind = type(inputs).__name__
            raise ValueError(f"ModelParamTraversal goes through a nested dict; got {kind}.")
        flat = sorted(flatten_dict(inputs, keep_empty_nodes=True).items(), key=lambda kv: kv[0])
        return [
            (p, v, v is not empty_node and self._filter_fn("/" + "/".join(p), v)) for p, v in flat
        ]

    def iterate(self, inputs: Any) -> Iterator[Any]:
        return (value for _, value, selected in self._flat(inputs) if selected)

    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        flat = self._flat(inputs)
        nested = unflatten_dict({path: fn(v) if selected else v for path, v, selected in flat})
        return FrozenDict(nested) if isinstance(inputs, FrozenDict) else nested
