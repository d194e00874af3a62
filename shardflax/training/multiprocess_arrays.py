"""Arrays of which several processes hold parts, beside a MessagePack file of the rest.

The file has a mark in the place of each, `//GDAPlaceholder:params/w`; the array is a zarr folder
`checkpoint_3_gda/params/w`.  JAX's `GlobalAsyncCheckpointManager` writes and reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from shardflax.core.checkpoint_errors import (
    MPACheckpointingRequiredError,
    MPARestoreDataCorruptedError,
    MPARestoreTargetRequiredError,
    MPARestoreTypeNotMatchError,
)
from shardflax.training.checkpoint_fit import leaves_of
from shardflax.training.step_files import MPA_SUFFIX

__all__ = ["fill_in", "mark_of", "save_arrays", "spans_processes", "take_out"]

_MARK = "//GDAPlaceholder:"


def spans_processes(leaf: Any) -> bool:
    """True for an array of which this process holds only parts.

    >>> spans_processes(jax.numpy.ones(3))
    False
    """
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def mark_of(leaf: Any) -> str | None:
    """Where the array is that a mark stands for; None for what is no mark.

    >>> mark_of("//GDAPlaceholder:params/w"), mark_of("text")
    ('params/w', None)
    """
    is_mark = isinstance(leaf, str) and leaf.startswith(_MARK)
    return leaf[len(_MARK) :] if is_mark else None


def take_out(state: Any, path: str = "") -> tuple[Any, dict[str, jax.Array]]:
    """A state dict with marks in the place of such arrays, and the arrays by their paths.

    >>> take_out({"a": {"b": 1}})
    ({'a': {'b': 1}}, {})
    """
    if isinstance(state, Mapping):
        arrays, rest = dict[str, jax.Array](), dict[str, Any]()
        for key, value in state.items():
            rest[key], inside = take_out(value, f"{path}/{key}" if path else str(key))
            arrays |= inside
        return rest, arrays
    if spans_processes(state):
        return f"{_MARK}{path}", {path: state}
    return state, {}


def save_arrays(
    arrays: Mapping[str, jax.Array], path: str, manager: Any, commit: Callable[[], None]
) -> None:
    """Starts writing arrays beside the checkpoint `path`; `commit` is called when they are there.

    All processes call this together; `commit` is called in process 0.
    """
    specs = [_spec(_folder(path, name)) for name in arrays]
    manager.serialize(list(arrays.values()), specs, on_commit_callback=commit)


def fill_in(
    state: Any, target: Any, path: str, step: Any, manager: Any, allow_partial: bool
) -> Any:
    """A state dict with the arrays that its marks stand for, laid out as in the target's.

    Raises `MPACheckpointingRequiredError` without a manager, `MPARestoreTargetRequiredError` where
    the target has no such array (unless `allow_partial`, which leaves the mark),
    `MPARestoreDataCorruptedError` for an array that is not there, `MPARestoreTypeNotMatchError`
    for one of another shape.
    """
    marks = {name: where for name, leaf in leaves_of(state) if (where := mark_of(leaf))}
    if not marks:
        return state
    if manager is None:
        raise MPACheckpointingRequiredError(path, step)
    given = dict(leaves_of(target))
    wanted = {n: w for n, w in marks.items() if getattr(given.get(n), "sharding", None) is not None}
    if len(wanted) < len(marks) and not allow_partial:
        missing = next(name for name in marks if name not in wanted)
        raise MPARestoreTargetRequiredError(path, step, missing)
    folders = {name: _folder(path, where) for name, where in wanted.items()}
    for name, folder in folders.items():
        _check(folder, given[name], step)
    arrays = manager.deserialize(
        [given[name].sharding for name in wanted], [_spec(f) for f in folders.values()]
    )
    return _replaced(state, dict(zip(wanted, arrays, strict=True)))


def _folder(path: str, name: str) -> str:
    """Where an array of a checkpoint lies; a name in a file must not lead out of there."""
    root = path + MPA_SUFFIX
    folder = os.path.normpath(os.path.join(root, name))
    if not folder.startswith(root + os.sep):
        raise MPARestoreDataCorruptedError("?", f"{root}: the name {name!r} leads out of it")
    return folder


def _spec(folder: str) -> Any:
    """What TensorStore is told of an array."""
    from jax.experimental.array_serialization.serialization import get_tensorstore_spec

    return get_tensorstore_spec(folder)


def _check(folder: str, like: Any, step: Any) -> None:
    """Raises unless an array is there, in the shape of its target."""
    try:
        with open(os.path.join(folder, ".zarray"), encoding="utf-8") as file:
            shape = tuple(json.load(file)["shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MPARestoreDataCorruptedError(step, folder) from error
    if shape != tuple(like.shape):
        raise MPARestoreTypeNotMatchError(step, folder, str(shape), str(tuple(like.shape)))


def _replaced(state: Any, arrays: Mapping[str, Any], path: str = "") -> Any:
    if isinstance(state, Mapping):
        return {
            key: _replaced(value, arrays, f"{path}/{key}" if path else str(key))
            for key, value in state.items()
        }
    return arrays.get(path, state)
