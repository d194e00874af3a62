"""The folder of a run: which steps are committed, which can go, what a killed run left behind.

A step is a folder named by its number.  It is written under another name and renamed when it is
complete, and renamed away before it is deleted, so a number is always a whole checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardflax.ckpt.errors import CheckpointFolderError, CheckpointReadError

__all__ = ["StepFolder", "expired"]

STATE, MANIFEST, EXTRAS = "state", "manifest", "extras"
"""The items of a step: a folder of arrays and two of JSON."""

JSON_FILE = {MANIFEST: "manifest.json", EXTRAS: "extras.json"}
ORBAX_MARKER = "_CHECKPOINT_METADATA"
UNFINISHED = ".orbax-checkpoint-tmp"
DOOMED = ".deleting"


def expired(steps: Iterable[int], keep: int | None, keep_every: int | None) -> list[int]:
    """The steps that a policy lets go: all but the newest `keep` and multiples of `keep_every`.

    >>> expired([10, 20, 30, 40, 50], keep=2, keep_every=20)
    [10, 30]
    """
    ordered = sorted(steps)
    old = ordered[: max(0, len(ordered) - keep)] if keep is not None else []
    return [step for step in old if keep_every is None or step % keep_every]


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
        numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
        return sorted(n for n in numbers if self.is_committed(n))

    def is_committed(self, step: int) -> bool:
        """True if the step is complete."""
        folder = self.step(step)
        return all(
            path.is_file()
            for path in (folder / ORBAX_MARKER, folder / MANIFEST / JSON_FILE[MANIFEST])
        )

    def json(self, step: int, item: str) -> Any:
        """The value of a JSON item of a step; raises CheckpointReadError naming the file."""
        path = self.step(step) / item / JSON_FILE[item]
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointReadError(self.root, step, f"{path}: {error}") from error

    def prepare(self) -> None:
        """Makes the folder and proves that files can be written to it.

        Raises CheckpointFolderError.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".write-test-"):
                pass
        except FileExistsError as error:
            raise CheckpointFolderError(self.root, "it is a file", "Give a folder.") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointFolderError(
                self.root, f"it cannot be written to ({reason})", "Give a writable folder."
            ) from error

    def delete(self, step: int) -> None:
        """Removes a step, which stops being visible at once and as a whole."""
        doomed = self.root / f"{step}{DOOMED}"
        shutil.rmtree(doomed, ignore_errors=True)
        self.step(step).rename(doomed)
        shutil.rmtree(doomed)

    def clean(self, step: int | None = None) -> list[str]:
        """Removes what an interrupted save or delete left, of one step or of all; their names."""
        found = [
            path
            for path in self.root.glob("*" if step is None else f"{step}.*")
            if (path.name.endswith(DOOMED) or UNFINISHED in path.name)
            and path.name.partition(".")[0].isdigit()
        ]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in found]
