"""Reading all of a checkpoint and checking every checksum, without devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from shardflax.ckpt.errors import CheckpointReadError
from shardflax.ckpt.locate import Found, find_checkpoint
from shardflax.ckpt.manifest import NAME, Manifest
from shardflax.ckpt.opening import damage
from shardflax.ckpt.paths import show
from shardflax.ckpt.place import Place, place
from shardflax.ckpt.sources import LeafDataError
from shardflax.ckpt.tree_source import pieces

__all__ = ["Verification", "bytes_to_verify", "verify_checkpoint", "verify_found"]

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was read, and what is wrong: a line for each file and each leaf.

    `checksums` says whether the format has any: without them, all that is known is that everything
    could be read.  `stray` are files that do no harm, but that no manifest lists.
    """

    path: Place
    problems: tuple[str, ...]
    leaves: int
    files: int
    nbytes: int
    checksums: bool
    stray: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if nothing is wrong.

        >>> from pathlib import Path
        >>> Verification(Path("x"), ("x/f is missing",), 1, 1, 0, True).ok
        False
        """
        return not self.problems


def verify_checkpoint(
    path: str | os.PathLike[str],
    step: int | None = None,
    *,
    progress: Progress = lambda nbytes: None,
) -> Verification:
    """Reads everything in a checkpoint, file by file and leaf by leaf, with little memory.

    `progress` hears how many bytes were read, of `bytes_to_verify`.  A checkpoint that cannot be
    opened has one problem.  Raises CheckpointNotFoundError.

    >>> import tempfile, numpy as np
    >>> from shardflax.ckpt.manager import CheckpointManager
    >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
    ...     handle = manager.save(3, {"w": np.ones(1000)})
    >>> verify_checkpoint(manager.directory).ok
    True
    >>> _ = (manager.directory / "3" / "state" / "_METADATA").write_text("{}")
    >>> verify_checkpoint(manager.directory).problems
    ('.../3/state/_METADATA has 2 bytes instead of ...',)
    """
    try:
        found = find_checkpoint(path, step)
    except CheckpointReadError as error:
        where = place(path) if error.step is None else place(path) / str(error.step)
        return Verification(where, (str(error.__cause__ or error),), 0, 0, 0, True)
    return verify_found(found, progress)


def verify_found(found: Found, progress: Progress = lambda nbytes: None) -> Verification:
    """The same for a checkpoint that is open.

    >>> import tempfile, numpy as np
    >>> from shardflax.ckpt.safetensors_files import save_safetensors
    >>> save_safetensors(file := f"{tempfile.mkdtemp()}/w.safetensors", {"w": np.ones(3)})
    >>> verify_found(find_checkpoint(file)).nbytes
    24
    """
    problems: list[str] = []
    stray: tuple[str, ...] = ()
    count = 1
    if found.manifest is not None:
        problems += damage(found.path, found.manifest.files, heard=progress)
        stray, count = _stray(found.path, found.manifest), len(found.manifest.files) + 1
    total = 0
    for path, spec in found.source.leaves.items():
        if spec.kind == "python" or not spec.on_disk:
            continue
        try:
            for box in pieces(found.source, path):
                found.source.read(path, box)()
                progress(box.size * spec.stored[1].itemsize)
            total += spec.nbytes
        except LeafDataError as error:
            problems.append(str(error))
        except (ValueError, OSError) as error:  # of what leads to the leaf
            problems.append(f"leaf {show(path)!r}: {error}")
    leaves = len(found.source.leaves)
    checked = found.manifest is not None
    return Verification(found.path, tuple(problems), leaves, count, total, checked, stray)


def bytes_to_verify(found: Found) -> int:
    """How many bytes `verify_found` reads: files, and then leaves.

    >>> import tempfile
    >>> from shardflax.ckpt.msgpack_files import save_msgpack
    >>> save_msgpack(file := f"{tempfile.mkdtemp()}/checkpoint_1", {"a": 1})
    >>> bytes_to_verify(find_checkpoint(file))
    0
    """
    leaves = sum(
        spec.nbytes
        for spec in found.source.leaves.values()
        if spec.kind != "python" and spec.on_disk
    )
    files = found.manifest.files.values() if found.manifest else ()
    return leaves + sum(size for size, _ in files)


def _stray(folder: Any, manifest: Manifest) -> tuple[str, ...]:
    """Files that are not of the checkpoint."""
    there = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return tuple(sorted(name for name in there if name != NAME and name not in manifest.files))
