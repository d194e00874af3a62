"""Finding a checkpoint, whatever it is: a step, the folder of a run, a file of weights."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardflax.ckpt.errors import (
    CheckpointFolderError,
    CheckpointNotFoundError,
    CheckpointReadError,
)
from shardflax.ckpt.folder import step_folder
from shardflax.ckpt.foreign import find_item
from shardflax.ckpt.manifest import NAME, Manifest
from shardflax.ckpt.msgpack_files import open_msgpack
from shardflax.ckpt.opening import open_step
from shardflax.ckpt.place import Place, StorePath, place
from shardflax.ckpt.safetensors_files import INDEX, SafetensorsSource, open_safetensors
from shardflax.ckpt.sources import Source

__all__ = ["Found", "find_checkpoint", "flax_steps", "format_of"]

_FLAX = re.compile(r"checkpoint_(\d+)")


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint that was found and opened; of its arrays nothing was read.

    `step` is None for files of weights; `manifest` is there for steps of this library.
    """

    path: Any
    format: str
    step: int | None
    source: Source
    extras: Callable[[], Mapping[str, Any]]
    manifest: Manifest | None = None

    @property
    def name(self) -> str:
        """What users call it."""
        return f"{self.path}"


def format_of(path: Path) -> str:
    """The format of a file by its first bytes, "safetensors" or "flax msgpack".

    Raises ValueError if it is neither.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "checkpoint_3")
    >>> _ = file.write_bytes(bytes.fromhex("81a16101"))
    >>> format_of(file)
    'flax msgpack'
    """
    if path.name.endswith((".safetensors", INDEX)):
        return "safetensors"
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{" and start[5:8] == bytes(3):
        return "safetensors"
    if start[:1] and (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return "flax msgpack"
    raise ValueError(f"{path} is neither a safetensors file nor a state dict in MessagePack")


def find_checkpoint(path: str | os.PathLike[str], step: int | None = None) -> Found:
    """Opens a checkpoint: a step's folder, a run's (its latest step, or `step`), or a file.

    A file is safetensors or MessagePack of Flax; a folder may also hold safetensors files (if it
    is not that of a run), or what Flax's `training.checkpoints` wrote.  Needs no devices.  Raises
    CheckpointFolderError, CheckpointNotFoundError (a file, and the folder of a step, have no
    steps); CheckpointReadError for what is damaged.

    >>> import tempfile
    >>> from shardflax.ckpt.manager import CheckpointManager
    >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
    ...     handle = manager.save(3, {"a": 1})
    >>> found = find_checkpoint(manager.directory)
    >>> found.format, found.step, list(found.source.leaves)
    ('shardflax', 3, [('a',)])
    """
    where = place(path)
    try:
        if where.is_file():
            if step is not None:
                raise CheckpointNotFoundError(where, step, [])
            return _file(where)
        if step is None and _is_step(where):
            return _step(where)
        steps = _steps(where)
        if step is None and not steps and where.is_dir() and _has_weights(where):
            return _file(where)
    except (ValueError, OSError) as error:
        raise CheckpointReadError(where, None, error) from error
    chosen = max(steps, default=None) if step is None else step
    if chosen is None or chosen not in steps:
        raise CheckpointNotFoundError(where, step, list(steps))
    try:
        found = steps[chosen]
        return _step(found) if found.is_dir() else dataclasses.replace(_file(found), step=chosen)
    except (ValueError, OSError) as error:
        raise CheckpointReadError(where, chosen, error) from error


def _steps(folder: Any) -> dict[int, Any]:
    """The steps of a run, ours or Flax's; raises CheckpointFolderError if there is no folder."""
    if not folder.exists():
        raise CheckpointFolderError(folder, "there is neither a folder nor a file", "Was it moved?")
    return {n: folder / str(n) for n in step_folder(folder).steps()} or flax_steps(folder)


def flax_steps(folder: Place) -> dict[int, Any]:
    """The files and folders in the manner of Flax, `checkpoint_100`, by their steps, in order.

    >>> import tempfile
    >>> Path(folder := tempfile.mkdtemp(), "checkpoint_20").touch()
    >>> list(flax_steps(Path(folder)))
    [20]
    """
    found = ((_FLAX.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def _is_step(folder: Place) -> bool:
    """True for the folder of one step: ours, or one with arrays of Orbax."""
    return (folder / NAME).is_file() or (
        find_item(folder) is not None and not step_folder(folder).steps() and not flax_steps(folder)
    )


def _has_weights(folder: Place) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob(f"*{INDEX}"))


def _step(folder: Any) -> Found:
    opened = open_step(folder)
    numbered = _FLAX.fullmatch(folder.name)
    number = numbered[1] if numbered else folder.name
    step = int(number) if number.isdecimal() else None
    if opened.manifest is not None:
        step = opened.manifest.step
    kind = "shardflax" if opened.manifest is not None else "orbax"
    return Found(folder, kind, step, opened.source, opened.extras, opened.manifest)


def _file(path: Any) -> Found:
    if isinstance(path, StorePath):
        raise ValueError("files of weights are read from file systems: copy it to one")
    kind = "safetensors" if path.is_dir() else format_of(path)
    if kind == "flax msgpack":
        return Found(path, kind, None, open_msgpack(path), dict)
    source = open_safetensors(path)
    return Found(path, kind, None, source, functools.partial(_metadata, source))


def _metadata(source: SafetensorsSource) -> Mapping[str, Any]:
    return source.metadata
