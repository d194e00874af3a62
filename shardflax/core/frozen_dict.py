"""FrozenDict: a nested dict that does not change, and the functions that work on either kind."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from shardflax.core.staging import jx

__all__ = [
    "FrozenDict",
    "copy",
    "freeze",
    "given_out",
    "pop",
    "pretty_repr",
    "return_frozen",
    "unfreeze",
]

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(Mapping[K, V]):
    """An immutable dict; the dicts in it are immutable too.

    It is made like a dict, copies what it is made from (dicts, not arrays), is equal to a dict with
    the same items, and is hashable if its values are.  As a pytree it has the leaves of the dict,
    sorted by key.  Setting or deleting an item raises ValueError.

    >>> frozen = FrozenDict({"a": {"b": 1}})
    >>> frozen["a"]["b"], frozen == {"a": {"b": 1}}
    (1, True)
    >>> frozen
    FrozenDict({
        a: {
            b: 1,
        },
    })
    """

    __slots__ = ("_dict", "_hash")

    _dict: dict[Any, Any]
    _hash: int | None

    def __init__(self, *args: Any, __unsafe_skip_copy__: bool = False, **kwargs: Any) -> None:
        given: dict[Any, Any] = dict(*args, **kwargs)
        self._dict = given if __unsafe_skip_copy__ else _thawed(given)
        self._hash = None

    @classmethod
    def _around(cls, items: dict[Any, Any]) -> FrozenDict[Any, Any]:
        """A FrozenDict of `items` themselves, not of a copy: nobody else may write them."""
        made = cast("FrozenDict[Any, Any]", object.__new__(cls))
        made._dict, made._hash = items, None
        return made

    def __getitem__(self, key: K) -> V:
        value: Any = self._dict[key]
        frozen: Any = self._around(cast("Any", value)) if isinstance(value, dict) else value
        return frozen

    def __setitem__(self, key: K, value: V) -> None:
        raise ValueError(f"a FrozenDict does not change: use copy({{{key!r}: ...}}).")

    def __delitem__(self, key: K) -> None:
        raise ValueError(f"a FrozenDict does not change: use pop({key!r}).")

    def __contains__(self, key: object) -> bool:
        return key in self._dict

    def __iter__(self) -> Iterator[K]:
        return iter(self._dict)

    def __len__(self) -> int:
        return len(self._dict)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenDict):
            other = cast("FrozenDict[Any, Any]", other)._dict
        return self._dict == other

    def __repr__(self) -> str:
        return self.pretty_repr()

    def __reduce__(self) -> Any:
        return FrozenDict, (self.unfreeze(),)

    def copy(self, add_or_replace: Mapping[K, V] | None = None) -> FrozenDict[K, V]:
        """A FrozenDict with some entries added or replaced.

        >>> sorted(FrozenDict(a=1).copy({"b": 2}).items())
        [('a', 1), ('b', 2)]
        """
        return self._around({**self._dict, **_thawed(add_or_replace or {})})

    def pop(self, key: K) -> tuple[FrozenDict[K, V], V]:
        """A FrozenDict without `key`, and the value that it had; KeyError if there is none.

        >>> rest, params = FrozenDict(params={"w": 1}, state={}).pop("params")
        >>> params.unfreeze(), list(rest)
        ({'w': 1}, ['state'])
        """
        value = self[key]
        return self._around({k: v for k, v in self._dict.items() if k != key}), value

    def pretty_repr(self, num_spaces: int = 4) -> str:
        """The nested dict as indented text.

        >>> print(FrozenDict(a=1).pretty_repr(2))
        FrozenDict({
          a: 1,
        })
        """
        return f"FrozenDict({_indented(self._dict, num_spaces)})"

    def unfreeze(self) -> dict[K, V]:
        """A nested dict with the same items, free to be changed.

        >>> FrozenDict(a={"b": 1}).unfreeze()
        {'a': {'b': 1}}
        """
        return unfreeze(self)


def _flat(frozen: Any) -> tuple[list[Any], tuple[Any, ...]]:
    items: dict[Any, Any] = frozen._dict
    keys = sorted(items)
    return [items[key] for key in keys], tuple(keys)


def _keyed(frozen: Any) -> tuple[list[Any], tuple[Any, ...]]:
    values, keys = _flat(frozen)
    return [(jx.tree_util.DictKey(k), v) for k, v in zip(keys, values, strict=True)], keys


def _from_flat(keys: tuple[Any, ...], values: Any) -> Any:
    # JAX also puts other things than dicts there: sentinels, specs, whole transposed trees.
    items = dict(zip(keys, values, strict=True))
    return FrozenDict._around(items)  # pyright: ignore[reportPrivateUsage]


jx.tree_util.register_pytree_with_keys(FrozenDict, _keyed, _from_flat, _flat)


def _indented(x: Any, num_spaces: int) -> str:
    if not isinstance(x, dict):
        return repr(x)
    if not x:
        return "{}"
    pad = " " * num_spaces
    lines: list[str] = []
    for key, value in cast("dict[Any, Any]", x).items():
        text = _indented(value, num_spaces).replace("\n", f"\n{pad}")
        lines.append(f"{pad}{key}: {text},\n")
    return f"{{\n{''.join(lines)}}}"


def freeze(xs: Mapping[Any, Any]) -> FrozenDict[Any, Any]:
    """A nested dict made immutable.

    >>> freeze({"a": {"b": 1}})["a"]["b"]
    1
    """
    return FrozenDict(xs)


def unfreeze(x: Any) -> Any:
    """A copy of a nested dict, frozen or not, that may be changed; its leaves are shared.

    What is no mapping comes back as it is.  What was frozen comes back sorted by key, as from
    `jax.tree.map`.

    >>> unfreeze(freeze({"a": {"b": 1}}))
    {'a': {'b': 1}}
    """
    if isinstance(x, FrozenDict):
        return _by_key(cast("FrozenDict[Any, Any]", x)._dict)  # pyright: ignore[reportPrivateUsage]
    if not isinstance(x, Mapping):
        return x
    mapping = cast("Mapping[Any, Any]", x)
    return {key: unfreeze(mapping[key]) for key in mapping}


def _thawed(x: Any) -> Any:
    """A copy of a nested dict, frozen or not, in its order."""
    if isinstance(x, FrozenDict):
        x = cast("FrozenDict[Any, Any]", x)._dict  # pyright: ignore[reportPrivateUsage]
    if not isinstance(x, Mapping):
        return x
    mapping = cast("Mapping[Any, Any]", x)
    return {key: _thawed(mapping[key]) for key in mapping}


def _by_key(x: Any) -> Any:
    """A copy of a nested dict, sorted by key where keys compare."""
    if not isinstance(x, Mapping):
        return x
    mapping = cast("Mapping[Any, Any]", x)
    try:
        keys = sorted(mapping)
    except TypeError:
        keys = list(mapping)
    return {key: _by_key(mapping[key]) for key in keys}


def _checked(x: Any) -> Any:
    if isinstance(x, FrozenDict | dict):
        return cast("Any", x)
    raise TypeError(f"expected a dict or a FrozenDict; got {type(x).__name__}: {x!r}.")


def copy(x: Any, add_or_replace: Mapping[Any, Any] | None = None) -> Any:
    """A dict or FrozenDict with some entries added or replaced; `x` stays as it is.

    Raises TypeError for anything else.

    >>> copy({"params": {}}, {"state": {"n": 1}})
    {'params': {}, 'state': {'n': 1}}
    """
    if isinstance(_checked(x), FrozenDict):
        return x.copy(add_or_replace)
    return {**_by_key(x), **unfreeze(add_or_replace or {})}


def pop(x: Any, key: Any) -> tuple[Any, Any]:
    """A dict or FrozenDict without `key`, and the value that it had; `x` stays as it is.

    Raises KeyError if there is no such key, TypeError if `x` is neither.

    >>> pop({"params": 1, "state": 2}, "params")
    ({'state': 2}, 1)
    """
    if isinstance(_checked(x), FrozenDict):
        return x.pop(key)
    rest = _by_key(x)
    return rest, rest.pop(key)


def pretty_repr(x: Any, num_spaces: int = 4) -> str:
    """A dict or FrozenDict as indented text; the `repr` of anything else.

    >>> print(pretty_repr({"a": {"b": 1}}, 2))
    {
      a: {
        b: 1,
      },
    }
    """
    if isinstance(x, FrozenDict):
        return cast("FrozenDict[Any, Any]", x).pretty_repr(num_spaces)
    return _indented(x, num_spaces)


class _Returned:
    """Whether runs return their variables frozen: the flag `flax_return_frozendict`."""

    frozen = os.environ.get("FLAX_RETURN_FROZENDICT", "").lower() in (
        "y",
        "yes",
        "t",
        "true",
        "on",
        "1",
    )


def return_frozen(frozen: bool) -> None:
    """Makes runs return their variables as FrozenDicts, or (the default) as dicts.

    >>> return_frozen(False)
    """
    _Returned.frozen = frozen


def given_out(variables: dict[str, Any]) -> Any:
    """Variables as they leave a run.

    >>> given_out({"params": {}})
    {'params': {}}
    """
    return freeze(variables) if _Returned.frozen else variables
