"""Flax's MessagePack files (`checkpoint_100`, `params.msgpack`), read and written by path."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardflax.ckpt.durable import sync_folder, write_file
from shardflax.ckpt.errors import CheckpointError
from shardflax.ckpt.match import Options
from shardflax.ckpt.patterns import Patterns
from shardflax.ckpt.place import local_file
from shardflax.ckpt.reading import Restored, restore_file
from shardflax.ckpt.restore import load_on_host
from shardflax.ckpt.sources import Source
from shardflax.ckpt.tree_source import TreeSource
from shardflax.serialization import MsgpackError, msgpack_restore, msgpack_serialize

__all__ = ["load_msgpack", "open_msgpack", "save_msgpack", "write_msgpack"]


class _FlaxSource(TreeSource):
    """A state dict of Flax, in which boxes are nodes."""

    boxed = True


def open_msgpack(path: Path) -> TreeSource:
    """What is in a file, all of it in memory; raises ValueError if it is none of Flax's."""
    try:
        tree = msgpack_restore(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, not a state dict")
        return _FlaxSource(tree)
    except (MsgpackError, CheckpointError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_msgpack(
    path: str | os.PathLike[str],
    target: Any = None,
    *,
    rename: Mapping[str, str] | None = None,
    cast: Patterns = False,
    missing: Patterns = False,
    extra: Patterns = False,
    include: Patterns = True,
) -> Restored:
    """Reads a MessagePack file that Flax wrote into the types and layout of `target`.

    The options are those of `CheckpointManager.restore`.  The format has no parts: each process
    reads the whole file into its memory.  Raises CheckpointReadError for a file that is damaged or
    none; CheckpointMismatchError.

    >>> import tempfile, numpy as np
    >>> file = f"{tempfile.mkdtemp()}/checkpoint_3"
    >>> save_msgpack(file, {"params": {"w": np.arange(3)}, "step": 3})
    >>> load_msgpack(file, {"w": np.zeros(3, int)}, rename={"params/*": "*"}, extra=True).state
    {'w': array([0, 1, 2])}
    """
    options = Options(cast, missing, extra, dict(rename or {}), include)
    return restore_file(local_file(path), open_msgpack, target, options)


def save_msgpack(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes the leaves of a tree to a file that `flax.serialization.msgpack_restore` reads.

    At once or not at all; boxes are taken off, PRNG keys become the words of their data.

    >>> import tempfile
    >>> file = f"{tempfile.mkdtemp()}/params.msgpack"
    >>> save_msgpack(file, {"scale": 1.5})
    >>> load_msgpack(file).state
    {'scale': 1.5}
    """
    write_msgpack(local_file(path), TreeSource(tree))


def write_msgpack(path: Path, source: Source) -> None:
    """Writes what a source offers; see `save_msgpack`."""
    data = msgpack_serialize(load_on_host(source), in_place=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_file(part, data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
