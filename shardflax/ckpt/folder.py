"""The folder of a run: which steps are committed, which can go, what a killed run left behind.

A step is a folder named by its number.  It is written under another name and renamed when it is
complete, and renamed away before it is deleted, so a number is always a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from shardflax.ckpt.durable import sync_folder
from shardflax.ckpt.errors import CheckpointFolderError
from shardflax.ckpt.landing import SAVING, in_use
from shardflax.ckpt.manifest import NAME
from shardflax.ckpt.orbax_files import MARKER, TREE

__all__ = ["StepFolder", "step_folder"]

_ORBAX = ".orbax-checkpoint-tmp"
_UNFINISHED = (SAVING, _ORBAX, ".deleting")
_FRESH = 3600.0
"""Seconds for which a folder that Orbax, which knows no locks, has changed may be in use."""


@dataclasses.dataclass(frozen=True)
class StepFolder:
    """The folder that holds the steps of one run; no method needs a device.

    >>> import tempfile
    >>> StepFolder(Path(tempfile.mkdtemp())).steps()
    []
    """

    root: Path

    def step(self, step: int) -> Path:
        """The folder of a step, there or not."""
        return self.root / str(step)

    def steps(self) -> list[int]:
        """The committed steps in order; raises CheckpointFolderError if the folder is gone."""
        try:
            names = os.listdir(self.root)
        except OSError as error:
            raise CheckpointFolderError(self.root, str(error), "Was it moved?") from error
        numbers = {int(name) for name in names if name.isascii() and name.isdigit()}
        return sorted(n for n in numbers if n < 2**63 and self.is_committed(n))

    def is_committed(self, step: int) -> bool:
        """True if the step is complete, or if nobody may look into it.

        A run must not go on from an earlier step because the latest belongs to another user.
        """
        try:
            return any((self.step(step) / name).is_file() for name in (NAME, MARKER, TREE))
        except OSError:
            return True

    def prepare(self) -> None:
        """Makes the folder and proves that files can be written to it.

        Raises CheckpointFolderError.
        """
        try:
            _make(self.root)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".write-test-"):
                pass
        except FileExistsError as error:
            what = "a link that leads nowhere" if self.root.is_symlink() else "a file"
            raise CheckpointFolderError(self.root, f"it is {what}", "Give a folder.") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointFolderError(
                self.root, f"it cannot be written to ({reason})", "Give a writable folder."
            ) from error

    def delete(self, step: int) -> None:
        """Removes a step, which stops being visible at once and as a whole.

        Another job may be doing the same.
        """
        doomed = self.root / f"{step}.deleting-{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.step(step), doomed)
            sync_folder(self.root)
            _remove(doomed)

    def clean(self) -> list[str]:
        """Removes what interrupted saves and deletes left; their names.

        What a living process is still writing stays.
        """
        found = [path for path in self.unfinished() if not self.is_busy(path)]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in found]

    def unfinished(self) -> list[Path]:
        """The folders of saves and deletes that are going on, or were interrupted."""
        return sorted(
            path
            for path in self.root.iterdir()
            if any(part in path.name for part in _UNFINISHED)
            and path.name.partition(".")[0].isdigit()
        )

    def is_busy(self, path: Path, sure: bool = False) -> bool:
        """True if a living process is writing to the folder of a save.

        One of Orbax that was changed not long ago may be in use, unless one must be `sure`.
        """
        if SAVING in path.name:
            return in_use(path)
        return _ORBAX in path.name and not sure and time.time() - _changed(path) < _FRESH

    def discard(self, path: Path) -> None:
        """Removes what an interrupted save or delete left; raises OSError."""
        if path.exists():
            shutil.rmtree(path)


def _changed(folder: Path) -> float:
    """When anything in a folder was changed last, in seconds since 1970."""
    last = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            last = max(last, path.lstat().st_mtime)
    return last


def _remove(folder: Path) -> None:
    """Removes a folder from which somebody else may remove things too."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _make(folder: Path) -> None:
    """Makes a folder and those above it, so that their names are on the disk too."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        with contextlib.suppress(PermissionError):  # what cannot be listed cannot be synced
            sync_folder(path.parent)


@functools.singledispatch
def step_folder(root: Any) -> StepFolder:
    """The folder of a run, wherever it is.

    >>> step_folder(Path("/run")).step(3)
    PosixPath('/run/3')
    """
    return StepFolder(root)
