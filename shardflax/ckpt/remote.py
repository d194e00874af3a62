"""Steps in an object store, where nothing can be renamed, and objects appear as a whole.

A step is written where it will be.  It is committed by its manifest, which is written last, and
stops being visible when that is removed, which is done first.  While it is written, an object
beside it says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from shardflax.ckpt import durable, faults, inspect, opening
from shardflax.ckpt.durable import FileRecord, checksum
from shardflax.ckpt.errors import CheckpointExistsError, CheckpointFolderError
from shardflax.ckpt.folder import StepFolder, step_folder
from shardflax.ckpt.landing import SAVING, landing
from shardflax.ckpt.manifest import NAME, Manifest
from shardflax.ckpt.orbax_files import MARKER, TREE
from shardflax.ckpt.place import StorePath

__all__ = ["StoreFolder", "StoreLanding"]

_FRESH = 3600.0
"""Seconds after which nobody is taken to be still writing a step."""
_DELETING = ".deleting"


@step_folder.register
def _(root: StorePath) -> StepFolder:
    return StoreFolder(root)


@dataclasses.dataclass(frozen=True)
class StoreFolder(StepFolder):
    """The steps of one run in an object store.

    >>> StoreFolder(StorePath("gs", "bucket", "run")).step(3).key
    'run/3'
    """

    root: Any

    def step(self, step: int) -> Any:
        """The folder of a step, there or not."""
        return self.root / str(step)

    def steps(self) -> list[int]:
        """The committed steps in order; raises CheckpointFolderError if the store is gone."""
        found, _ = self._listing()
        return sorted(step for step, names in found.items() if self._whole(step, names))

    def is_committed(self, step: int) -> bool:
        """True if the step is complete."""
        names = {str(path.relative_to(self.step(step))) for path in self.step(step).files()}
        return self._whole(step, names)

    def _whole(self, step: int, names: set[str]) -> bool:
        """True if a step that has objects of some names has a manifest, or needs none."""
        if NAME in names or not names & {MARKER, TREE}:
            return NAME in names
        return not opening.claims_manifest(self.step(step))

    def _listing(self) -> tuple[dict[int, set[str]], dict[int, list[StorePath]]]:
        """By step, the names of its objects, and what says that it is written or deleted."""
        found: dict[int, set[str]] = {}
        marks: dict[int, list[StorePath]] = {}
        try:
            for path in self.root.files():
                first, *rest = path.relative_to(self.root).parts
                number, dot, _ = first.partition(".")
                if not (number.isascii() and number.isdigit()) or number != str(int(number)):
                    continue
                if rest and not dot:
                    found.setdefault(int(number), set()).add("/".join(rest))
                elif SAVING in first or first.endswith(_DELETING):
                    marks.setdefault(int(number), []).append(path)
        except OSError as error:
            raise CheckpointFolderError(self.root, str(error), "Is it the right bucket?") from error
        return found, marks

    def prepare(self) -> None:
        """Proves that objects can be written; raises CheckpointFolderError."""
        test = self.root / f".write-test-{time.time_ns()}"
        try:
            test.touch()
            test.unlink()
        except OSError as error:
            raise CheckpointFolderError(
                self.root, f"it cannot be written to ({error})", "Give a bucket of yours."
            ) from error

    def delete(self, step: int) -> None:
        """Removes a step, which stops being visible at once and as a whole."""
        folder, mark = self.step(step), self.root / f"{step}{_DELETING}"
        mark.write_bytes(_now())
        for name in (NAME, MARKER, TREE):
            (folder / name).unlink()
        folder.remove()
        mark.unlink()

    def clean(self) -> list[str]:
        """Removes what interrupted saves and deletes left; their names.

        One run writes to a folder at a time, so what is unfinished was interrupted; if it was not,
        that save fails.
        """
        found, marks = self._listing()
        for step, paths in marks.items():
            if not self._whole(step, found.get(step, set())):
                self.discard(self.step(step))
            for path in paths:
                path.unlink()
        return [path.name for paths in marks.values() for path in paths]

    def unfinished(self) -> list[Any]:
        """The steps that are being written or deleted, or were interrupted in that."""
        found, marks = self._listing()
        return [
            self.step(step)
            for step in sorted(marks)
            if not self._whole(step, found.get(step, set()))
        ]

    def is_busy(self, path: Any, sure: bool = False) -> bool:
        """True if a save began not long ago, and was not seen to end; one is never `sure`."""
        _, marks = self._listing()
        return not sure and any(
            time.time() - _began(mark) < _FRESH for mark in marks.get(int(path.name), ())
        )

    def discard(self, path: Any, mine: StorePath | None = None) -> None:
        """Removes what is left of a step, and what marks it, but for the mark `mine`.

        The marks of others go first: a save of theirs that goes on sees that, and commits nothing.
        """
        mark = mine or self.root / f"{path.name}{_DELETING}"
        if mine is None:
            mark.write_bytes(_now())
        for other in self._listing()[1].get(int(path.name), ()):
            if other != mark:
                other.unlink()
        path.remove()
        if mine is None:
            mark.unlink()


def _now() -> bytes:
    return json.dumps({"began": time.time()}).encode()


def _began(mark: StorePath) -> float:
    try:
        return float(json.loads(mark.read_bytes())["began"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


class StoreLanding:
    """The place of the step itself; see `shardflax.ckpt.landing.Landing`."""

    def __init__(self, root: StorePath, step: int, name: str) -> None:
        self.root, self.step, self.folder = root, step, root / str(step)
        self._mark = root / f"{step}{SAVING}{name}"
        self._begun = False

    def begin(self) -> None:
        """Removes what an interrupted save of the step left; says that it is being written.

        Raises CheckpointExistsError if the step is there.
        """
        steps = StoreFolder(self.root)
        if steps.is_committed(self.step):
            raise CheckpointExistsError(self.root, self.step)
        self._mark.write_bytes(_now())
        self._begun = True
        steps.discard(self.folder, self._mark)

    def commit(self, manifest: bytes) -> None:
        """Writes the manifest.

        Raises CheckpointExistsError, or CheckpointFolderError if another run removed something.
        """
        faults.at("manifest")
        faults.at("rename")
        if not self._is_mine():
            raise CheckpointFolderError(
                self.root,
                f"another run has removed what this one wrote of step {self.step}",
                "Stores know no locks: two runs must not write to one folder.",
            )
        if not self._create(manifest):
            raise CheckpointExistsError(self.root, self.step)
        faults.at("renamed")
        with contextlib.suppress(OSError):  # the step is committed; who cleans up removes it
            self._mark.unlink()

    def _create(self, manifest: bytes) -> bool:
        """Writes the manifest, also if the store's answer was lost; if it is there then."""
        path = self.folder / NAME
        try:
            return path.create(manifest) or path.read_bytes() == manifest
        except OSError:
            with contextlib.suppress(OSError):
                if path.read_bytes() == manifest:
                    return True
            raise

    def abandon(self) -> None:
        """Removes what was written, unless another program's step is there (Orbax's, say)."""
        try:
            if self._begun and self._is_mine() and not (self.folder / NAME).is_file():
                self.folder.remove()
        finally:
            self._mark.unlink()

    def _is_mine(self) -> bool:
        """True unless another run has begun to write, or to remove, the step."""
        try:
            return bool(self._mark.read_bytes())
        except FileNotFoundError:
            return False


landing.register(StorePath, StoreLanding)


# --- files


@durable.write_file.register
def _(path: StorePath, data: bytes) -> FileRecord:
    """What is there already is another run's, which goes before."""
    if not path.create(data):
        raise OSError(f"{path} is there already: two runs must not write to one folder")
    return len(data), checksum(data)


@durable.sync_folder.register
def _(path: StorePath) -> None:
    """Nothing: what was stored is stored."""


@opening.damage.register
def _(
    folder: StorePath,
    files: Mapping[str, FileRecord],
    data: bool = True,
    heard: Callable[[int], object] = lambda nbytes: None,
) -> list[str]:
    """Without `data`, data files are only looked for: stores do not tell sizes in a listing."""
    there = {str(path.relative_to(folder)) for path in folder.files()}
    lines: list[str] = []
    for name, record in sorted(files.items()):
        path = folder / name
        if name not in there:
            lines.append(f"{path} is missing")
        elif data or not opening.is_data(name):
            lines += _wrong(path, record)
        heard(record[0])
    return lines


def _wrong(path: StorePath, record: FileRecord) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        return [f"{path}: {error}"]
    if len(content) != record[0]:
        return [f"{path} has {len(content):,} bytes instead of {record[0]:,}"]
    if durable.checksum(content, record[1]) != record[1]:
        return [f"{path} is damaged (its checksum is wrong)"]
    return []


@inspect.disk_bytes.register
def _(path: StorePath) -> int:
    """By the manifest; 0 for what has none."""
    try:
        text = (path / NAME).read_bytes()
        return len(text) + sum(size for size, _ in Manifest.read(text).files.values())
    except (OSError, ValueError):
        return 0
