"""Checkpoints of `training.checkpoints` in Orbax's format."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from shardflax.serialization import to_state_dict
from shardflax.training.checkpoint_fit import Kind, check_fit, leaves_of
from shardflax.training.orbax_utils import restore_args_from_target, save_args_from_target
from shardflax.training.quiet import quiet_orbax

__all__ = ["is_one", "read", "save_with", "wait", "write"]

_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")

# What is deleted after the commit of an asynchronous checkpointer.
_afterwards: weakref.WeakKeyDictionary[Any, threading.Thread] = weakref.WeakKeyDictionary()


def is_one(path: str) -> bool:
    """True for the folder of one checkpoint.

    >>> is_one("/not/there")
    False
    """
    return any(os.path.exists(os.path.join(path, mark)) for mark in _MARKS)


def _checked(state: Any) -> Any:
    """A state dict with scalars as arrays; raises for what is no tree of leaves."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"Orbax saves trees, not one {type(state).__name__}. Save {{'value': x}}, or use "
            f"config.update('flax_use_orbax_checkpointing', False)."
        )
    return _arrays(state, "")


def _arrays(state: Any, path: str) -> Any:
    if isinstance(state, Mapping):
        return {key: _arrays(value, f"{path}/{key}") for key, value in state.items()}
    if isinstance(state, np.generic):
        return np.asarray(state)
    if getattr(state, "size", 1) == 0:
        raise ValueError(
            f"{path[1:]}: Orbax saves no arrays without elements. Leave it out, use "
            f"config.update('flax_use_orbax_checkpointing', False), or use "
            f"shardflax.ckpt.CheckpointManager."
        )
    return state


def write(path: Path, state: Any, together: bool) -> None:
    """Writes a state dict as a folder; with several processes, all or only this one."""
    options = ocp.options.MultiprocessingOptions()
    if not together:
        own = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"only-{own}"
        )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with quiet_orbax(), ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        state = _checked(state)
        checkpointer.save(path, state, save_args=save_args_from_target(state))


def save_with(
    checkpointer: Any, path: Path, state: Any, overwrite: bool, clean: Callable[[], None]
) -> None:
    """Saves with a checkpointer of the user's, and cleans up once it has committed."""
    state = _checked(state)
    with quiet_orbax():
        checkpointer.save(path, state, save_args=save_args_from_target(state), force=overwrite)
    if jax.process_index() != 0:
        return
    if not hasattr(checkpointer, "wait_until_finished"):
        clean()
        return

    def clean_up() -> None:
        checkpointer.wait_until_finished()
        clean()

    thread = threading.Thread(target=clean_up, name="shardflax-checkpoints-clean")
    _afterwards[checkpointer] = thread
    thread.start()


def wait(checkpointer: Any) -> None:
    """Returns when a checkpointer of the user's is done, and what came after that."""
    if hasattr(checkpointer, "wait_until_finished"):
        checkpointer.wait_until_finished()
    thread = _afterwards.pop(checkpointer, None)
    if thread is not None:
        thread.join()


def read(path: str, like: Any, checkpointer: Any, transforms: Mapping[str, Any] | None) -> Any:
    """The state dict in a folder, its leaves as those of `like`, or numpy's without one.

    Raises `CheckpointTargetError` if they do not fit; nothing is checked under `transforms`, which
    are Orbax's to apply.
    """
    own = checkpointer or ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with quiet_orbax():
        if transforms is not None:
            args = restore_args_from_target(like)
            return own.restore(path, item=like, restore_args=args, transforms=dict(transforms))
        tree = _metadata(own, path)
        given = {} if like is None else dict(leaves_of(like))
        if like is not None:
            saved = leaves_of(to_state_dict(tree))
            check_fit(path, {name: _kind(leaf) for name, leaf in saved}, given)
        state = own.restore(path, restore_args=_restore_args(tree, given))
    return _as_in(like, to_state_dict(state))


def _metadata(checkpointer: Any, path: str) -> Any:
    """The tree of a checkpoint, with what Orbax knows of its leaves."""
    known = checkpointer.metadata(path)
    known = getattr(known, "item_metadata", known)
    return getattr(known, "tree", known)


def _kind(leaf: Any) -> Any:
    if getattr(leaf, "shape", None) is None or not hasattr(leaf, "dtype"):
        return leaf
    number = isinstance(leaf, ocp.metadata.ScalarMetadata)
    return Kind(tuple(leaf.shape), None if number else leaf.dtype)


def _restore_args(tree: Any, given: Mapping[str, Any], path: str = "") -> Any:
    """How each leaf is read: as in the target, or as it was saved."""
    if isinstance(tree, Mapping):
        return {
            key: _restore_args(value, given, f"{path}/{key}" if path else str(key))
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):  # as Flax saves them
        parts = enumerate(tree)
        return type(tree)(_restore_args(x, given, f"{path}/{i}".lstrip("/")) for i, x in parts)
    like: Any = given.get(path)
    if getattr(like, "sharding", None) is not None:
        return restore_args_from_target(like)
    if isinstance(tree, ocp.metadata.ScalarMetadata):
        kind = {"b": bool, "i": int, "u": int}.get(np.dtype(tree.dtype).kind, float)
        return ocp.RestoreArgs(restore_type=kind)
    if getattr(tree, "shape", None) is not None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.RestoreArgs()


def _as_in(like: Any, state: Any) -> Any:
    """What Orbax cannot tell apart as it is in the target: numpy's scalars, and empty nodes."""
    if state is None and isinstance(like, Mapping) and not like:
        return like
    if isinstance(like, Mapping) and isinstance(state, Mapping):
        return {key: _as_in(like.get(key), value) for key, value in state.items()}
    return np.asarray(state)[()] if isinstance(like, np.generic) else state
