"""What killed runs left in the folder of a run, and its removal."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

from shardflax.ckpt.folder import step_folder
from shardflax.ckpt.inspect import changed, disk_bytes
from shardflax.ckpt.place import Place, place

__all__ = ["Leftover", "find_leftovers", "remove_leftovers"]

_MARKS = (".write-test-", ".shared-test-")
"""Files that a manager makes while it is made."""
_FRESH = 3600.0
"""Seconds for which such a file may be in use."""


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A folder or file that is of no use any more, why, its size, and when it was changed.

    >>> from pathlib import Path
    >>> Leftover(Path("3.saving-a"), "a save that did not end", 10, 0.0).nbytes
    10
    """

    path: Any
    why: str
    nbytes: int
    time: float


def find_leftovers(folder: str | os.PathLike[str], *, force: bool = False) -> list[Leftover]:
    """What `remove_leftovers` would remove; never a committed step, nor what is being written.

    In object stores, and of Orbax's saves, nobody can see whether they are going on: what was
    changed less than an hour ago is left out, unless `force`.

    Raises CheckpointFolderError if there is no such folder.

    >>> import tempfile
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "3.saving-1a2b-1").mkdir()
    >>> [(x.path.name, x.why) for x in find_leftovers(root)]
    [('3.saving-1a2b-1', 'a save that did not end')]
    """
    steps = step_folder(place(folder))
    steps.steps()  # raises if there is no folder
    found = [
        _leftover(path, _why(path))
        for path in steps.unfinished()
        if not steps.is_busy(path, sure=force)
    ]
    marks = (p for p in steps.root.iterdir() if p.name.startswith(_MARKS) and p.is_file())
    old = (x for x in map(_mark, sorted(marks)) if force or time.time() - x.time > _FRESH)
    return [*found, *old]


def remove_leftovers(found: Sequence[Leftover], *, force: bool = False) -> list[Leftover]:
    """Removes what was found, except for what a living process writes to again; what is gone.

    `force` as in `find_leftovers`.

    Raises OSError for what cannot be removed.

    >>> import tempfile
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "3.deleting").mkdir()
    >>> len(remove_leftovers(find_leftovers(root))), list(root.iterdir())
    (1, [])
    """
    gone: list[Leftover] = []
    for leftover in found:
        steps = step_folder(leftover.path.parent)
        if steps.is_busy(leftover.path, sure=force):
            continue
        if leftover.path.is_symlink() or leftover.path.is_file():
            leftover.path.unlink(missing_ok=True)
        else:
            steps.discard(leftover.path)
        gone.append(leftover)
    return gone


def _why(path: Place) -> str:
    return "a delete that did not end" if ".deleting" in path.name else "a save that did not end"


def _mark(path: Place) -> Leftover:
    return _leftover(path, "a test of the folder")


def _leftover(path: Place, why: str) -> Leftover:
    return Leftover(path, why, disk_bytes(path), changed(path))
