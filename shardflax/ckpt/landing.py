"""Where a save writes until it is complete, and how that becomes a step."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import time
from pathlib import Path
from typing import Any

from shardflax.ckpt import faults
from shardflax.ckpt.durable import sync_folder, write_file
from shardflax.ckpt.errors import CheckpointExistsError, CheckpointFolderError
from shardflax.ckpt.manifest import NAME
from shardflax.ckpt.orbax_files import MARKER, STATE, TREE

__all__ = ["SAVING", "Landing", "in_use", "landing", "lock"]

SAVING = ".saving-"
"""In the name of a folder that is not committed."""
_LOOKS = 20
"""How often a lock is tried while others look at it."""


class Landing:
    """A folder beside the steps, which gets its number when it is complete.

    Process 0 begins and then commits or abandons it; the others only write to `folder`.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> spot = Landing(root, 3, "a-1")
    >>> spot.begin()
    >>> spot.commit(b"{}")
    >>> [path.name for path in root.iterdir()]
    ['3']
    """

    def __init__(self, root: Path, step: int, name: str) -> None:
        self.root, self.step = root, step
        self.folder = root / f"{step}{SAVING}{name}"
        self._lock: int | None = None

    def begin(self) -> None:
        """Makes the folder, and says that a living process writes to it.

        Raises as `commit` does where something is in the place of the step already.
        """
        self._check_free()
        self.folder.mkdir()
        (self.folder / STATE).mkdir()
        self._lock = lock(self.folder)
        sync_folder(self.root)

    def commit(self, manifest: bytes) -> None:
        """Writes the manifest, and gives the folder its name: all or nothing, even at a crash.

        Raises CheckpointExistsError if another program was quicker, and CheckpointFolderError if
        something else is in the place of the step.  What cannot be forced to the disk at the end
        loses its name again.
        """
        write_file(self.folder / NAME, manifest)
        sync_folder(self.folder)
        faults.at("manifest")
        faults.at("rename")
        target = self.root / str(self.step)
        try:
            os.rename(self.folder, target)
        except OSError:
            if not _holds(target, manifest):
                self._check_free()
                raise
        try:
            faults.at("renamed")
            sync_folder(self.root)
        except BaseException:
            with contextlib.suppress(OSError):
                os.rename(target, self.folder)
            raise
        self.release()

    def _check_free(self) -> None:
        """Raises if there is more than an empty folder in the place of the step."""
        target = self.root / str(self.step)
        if any((target / name).is_file() for name in (NAME, MARKER, TREE)):
            raise CheckpointExistsError(self.root, self.step)
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise CheckpointFolderError(
                target, "it is there, and is no checkpoint", "Move it away, or remove it."
            )

    def abandon(self) -> None:
        """Removes the folder, so that it does not fill the disk."""
        for _ in range(3):  # what was abandoned may still write a file
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                break
            time.sleep(0.1)
        self.release()

    def release(self) -> None:
        """Nobody writes to the folder any longer."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _holds(step: Path, manifest: bytes) -> bool:
    """True if a step is the one with this manifest: NFS may rename, and say that it could not."""
    try:
        return (step / NAME).read_bytes() == manifest
    except OSError:
        return False


@functools.singledispatch
def landing(root: Any, step: int, name: str) -> Any:
    """Where a save of a step writes; `name` is that of no other save.

    >>> landing(Path("/run"), 3, "a-1").folder
    PosixPath('/run/3.saving-a-1')
    """
    return Landing(root, step, name)


def lock(folder: Path) -> int:
    """Marks a folder as one that a living process writes to, where the file system can do that.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> descriptor = lock(folder)
    >>> in_use(folder), os.close(descriptor), in_use(folder)
    (True, None, False)
    """
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        for _ in range(_LOOKS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # somebody looks whether it is locked: see `in_use`
                time.sleep(0.01)
    return descriptor


def in_use(folder: Path) -> bool:
    """True if a living process is writing to an unfinished folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
