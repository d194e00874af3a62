"""State dicts and MessagePack: trees as nested dicts with string keys, and as bytes.

The bytes are those of Flax, in both directions.  Nothing in them is ever executed or unpickled,
and reading them takes no more memory than a small multiple of their length.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from shardflax import struct
from shardflax._msgpack import MAX_CHUNK_SIZE, MsgpackError, pack, unpack
from shardflax.core.boxes import AxisMetadata
from shardflax.core.errors import FlaxError, did_you_mean
from shardflax.core.frozen_dict import FrozenDict

__all__ = [
    "MAX_CHUNK_SIZE",
    "MsgpackError",
    "StateDictError",
    "current_path",
    "from_bytes",
    "from_state_dict",
    "is_serializable",
    "msgpack_restore",
    "msgpack_serialize",
    "register_serialization_state",
    "to_bytes",
    "to_state_dict",
]


class StateDictError(FlaxError, ValueError):
    """A state dict does not fit the target it is to be restored into.

    >>> print(StateDictError("it has no 'kernel'", "./params"))
    at ./params: it has no 'kernel'
    """

    def __init__(self, what: str, path: str | None = None) -> None:
        super().__init__(f"at {current_path() if path is None else path}: {what}")


class _Handlers(NamedTuple):
    """How the instances of a type become state dicts, and come back."""

    to_state: Callable[[Any], Any]
    from_state: Callable[[Any, Any], Any]


_registry: dict[type, _Handlers] = {}
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("path", default=())


def current_path() -> str:
    """Where in the tree `from_state_dict` is, for messages; empty outside of it.

    >>> current_path()
    ''
    """
    return "/".join(_path.get())


def register_serialization_state(
    ty: type,
    ty_to_state_dict: Callable[[Any], Any],
    ty_from_state_dict: Callable[[Any, Any], Any],
    override: bool = False,
) -> None:
    """Says how instances of exactly the type `ty` are written and restored.

    `ty_to_state_dict(x)` gives a dict, `ty_from_state_dict(x, state)` a copy of `x` with the state;
    both use `to_state_dict` and `from_state_dict(..., name=key)` for what they hold.  Raises
    ValueError for a type that is registered already, unless told to `override` it.

    >>> class Box:
    ...     def __init__(self, value):
    ...         self.value = value
    >>> register_serialization_state(
    ...     Box, lambda box: {"value": box.value}, lambda box, state: Box(state["value"])
    ... )
    >>> to_state_dict([Box(3)])
    {'0': {'value': 3}}
    """
    if ty in _registry and not override:
        raise ValueError(f"{ty.__name__} is registered already; say override=True to replace it.")
    _registry[ty] = _Handlers(ty_to_state_dict, ty_from_state_dict)


def _handlers(x: Any) -> _Handlers | None:
    found = _registry.get(type(x))
    if found is not None:
        return found
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return _NAMED_TUPLE
    if struct.is_dataclass(x):
        return _STRUCT
    return _BOX if isinstance(x, AxisMetadata) else None


def is_serializable(target: Any) -> bool:
    """True if instances of the type of `target` are taken apart by `to_state_dict`.

    >>> is_serializable({}), is_serializable(3)
    (True, False)
    """
    return _handlers(target) is not None


def to_state_dict(target: Any) -> Any:
    """The state of `target` as nested dicts with string keys; leaves are as they were.

    Dicts, lists, tuples, named tuples, `FrozenDict`, the dataclasses of `shardflax.struct`, boxes,
    and registered types are taken apart; everything else is a leaf.

    >>> to_state_dict({"a": (1, [2])})
    {'a': {'0': 1, '1': {'0': 2}}}
    """
    handlers = _handlers(target)
    if handlers is None:
        return target
    state = handlers.to_state(target)
    if not isinstance(state, dict):
        raise TypeError(f"{type(target).__name__} gave no dict as its state: {state!r}.")
    for key in state:
        if not isinstance(key, str):
            raise TypeError(f"a state dict has string keys; {type(target).__name__} gave {key!r}.")
    return state


def from_state_dict(target: Any, state: Any, name: str = ".") -> Any:
    """A copy of `target` with its leaves from `state`, which `to_state_dict` gave.

    Leaves of `target` are not looked at.  `name` is where this is, for messages.  Raises
    `StateDictError` if `state` lacks something, or has something that a named tuple or dataclass
    has not; what a dict has too many is ignored.

    >>> from_state_dict({"a": (1, [2])}, {"a": {"0": 5, "1": {"0": 6}}})
    {'a': (5, [6])}
    """
    handlers = _handlers(target)
    if handlers is None:
        return state
    token = _path.set((*_path.get(), name))
    try:
        if not isinstance(state, Mapping):
            kind = type(target).__name__
            raise StateDictError(f"a {kind} is restored from a dict; got {type(state).__name__}.")
        return handlers.from_state(target, state)
    finally:
        _path.reset(token)


# --- the types that are known


def _named(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: to_state_dict(value) for name, value in items}


def _dict_state(xs: Mapping[Any, Any]) -> dict[str, Any]:
    names = [str(key) for key in xs]
    if len(set(names)) < len(names):
        raise ValueError(f"keys that are equal as strings: {sorted(names)}.")
    return _named((str(key), value) for key, value in xs.items())


def _restore_dict(xs: Mapping[Any, Any], state: Mapping[str, Any]) -> dict[Any, Any]:
    missing = sorted({str(key) for key in xs} - set(state))
    if missing:
        raise StateDictError(f"missing {missing}; {did_you_mean(missing[0], map(str, state))}")
    return {key: from_state_dict(x, state[str(key)], name=str(key)) for key, x in xs.items()}


def _sequence_state(xs: Any) -> dict[str, Any]:
    return _named((str(i), x) for i, x in enumerate(xs))


def _restore_list(xs: Any, state: Mapping[str, Any]) -> list[Any]:
    names = [str(i) for i in range(len(xs))]
    if set(names) != set(state):
        raise StateDictError(f"expected {len(xs)} items; got {len(state)}: {sorted(state)}.")
    return [from_state_dict(x, state[i], name=i) for i, x in zip(names, xs, strict=True)]


def _restore_tuple(xs: Any, state: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(_restore_list(xs, state))


def _restore_fields(target: Any, names: Iterable[str], state: Mapping[str, Any]) -> dict[str, Any]:
    names = list(names)
    if set(names) != set(state):
        missing, extra = sorted(set(names) - set(state)), sorted(set(state) - set(names))
        kind = type(target).__name__
        raise StateDictError(f"{kind}: missing fields {missing}, unknown fields {extra}.")
    return {name: from_state_dict(getattr(target, name), state[name], name) for name in names}


def _named_tuple_state(xs: Any) -> dict[str, Any]:
    return _named((name, getattr(xs, name)) for name in xs._fields)


def _restore_named_tuple(xs: Any, state: Mapping[str, Any]) -> Any:
    if set(state) == {"name", "fields", "values"}:  # how Flax wrote them long ago
        fields, values = state["fields"], state["values"]
        state = {fields[str(i)]: values[str(i)] for i in range(len(fields))}
    return type(xs)(**_restore_fields(xs, xs._fields, state))


def _data_fields(x: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(x) if f.metadata.get("pytree_node", True)]


def _struct_state(x: Any) -> dict[str, Any]:
    return _named((name, getattr(x, name)) for name in _data_fields(x))


def _restore_struct(x: Any, state: Mapping[str, Any]) -> Any:
    return dataclasses.replace(x, **_restore_fields(x, _data_fields(x), state))


def _restore_box(box: Any, state: Mapping[str, Any]) -> Any:
    if set(state) != {"value"}:
        raise StateDictError(f"a box is restored from {{'value': ...}}; got {sorted(state)}.")
    return box.replace_boxed(from_state_dict(box.unbox(), state["value"], name="value"))


_NAMED_TUPLE = _Handlers(_named_tuple_state, _restore_named_tuple)
_STRUCT = _Handlers(_struct_state, _restore_struct)
_BOX = _Handlers(lambda box: _named([("value", box.unbox())]), _restore_box)

register_serialization_state(dict, _dict_state, _restore_dict)
register_serialization_state(list, _sequence_state, _restore_list)
register_serialization_state(tuple, _sequence_state, _restore_tuple)
register_serialization_state(
    FrozenDict, _dict_state, lambda xs, state: FrozenDict(_restore_dict(xs, state))
)


# --- bytes


def msgpack_serialize(pytree: Any, in_place: bool = False) -> bytes:
    """Nested dicts and lists of arrays, numbers, strings, bytes and `None`, as MessagePack.

    Arrays of more than `MAX_CHUNK_SIZE` bytes are cut into pieces.  `in_place` lets the dicts and
    lists of `pytree` be changed.  Raises `MsgpackError`, with the path, for anything else.

    >>> msgpack_restore(msgpack_serialize({"step": 3, "w": [1.0, 2.0]}))
    {'step': 3, 'w': [1.0, 2.0]}
    """
    return pack(pytree, MAX_CHUNK_SIZE, in_place)


def msgpack_restore(encoded_pytree: bytes) -> Any:
    """What `msgpack_serialize`, or that of Flax, was given; arrays as numpy's, and read-only.

    Raises `MsgpackError` for bytes that are nothing of the kind.

    >>> import numpy as np
    >>> msgpack_restore(msgpack_serialize({"w": np.arange(3)}))["w"].tolist()
    [0, 1, 2]
    """
    return unpack(encoded_pytree)


def to_bytes(target: Any) -> bytes:
    """The state dict of `target` as MessagePack.

    >>> to_bytes({"a": (1,)})
    b'\\x81\\xa1a\\x81\\xa10\\x01'
    """
    return msgpack_serialize(to_state_dict(target), in_place=True)


def from_bytes(target: Any, encoded_bytes: bytes) -> Any:
    """A copy of `target` with its leaves from what `to_bytes` gave.

    >>> from_bytes({"a": (1,)}, to_bytes({"a": (2,)}))
    {'a': (2,)}
    """
    return from_state_dict(target, msgpack_restore(encoded_bytes))
