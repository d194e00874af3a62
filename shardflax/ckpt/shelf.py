"""The committed steps of a run: what is known of them, who reads them, and which of them go."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

from shardflax.ckpt.folder import StepFolder
from shardflax.ckpt.keeping import Note, Rules
from shardflax.ckpt.opening import open_step

__all__ = ["Shelf"]


class Shelf:
    """The steps as one process knows them.

    With `looks`, it looks into the folder itself; else it knows what process 0 told (`seen`).  A
    step that is being read is not deleted before that is over, and one that is about to be deleted
    is not read any more.

    >>> import tempfile
    >>> from pathlib import Path
    >>> Shelf(StepFolder(Path(tempfile.mkdtemp())), Rules(), looks=True).steps()
    []
    """

    def __init__(self, folder: StepFolder, rules: Rules, looks: bool) -> None:
        self.folder, self.rules, self.looks = folder, rules, looks
        self.seen: list[int] = []
        self._notes: dict[int, Note] = {}
        self._readers: collections.Counter[int] = collections.Counter()
        self._doomed: list[int] = []
        self._lock = threading.Lock()

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        return self.folder.steps() if self.looks else list(self.seen)

    def has(self, step: int) -> bool:
        """True if a step is committed, as far as this process knows."""
        return self.folder.is_committed(step) if self.looks else step in self.seen

    def best(self) -> int | None:
        """The one with the best metric."""
        return self.rules.best_of(self.steps(), self._note)

    def note(self, step: int, metrics: Mapping[str, float], temporary: bool) -> None:
        """Remembers what is being saved."""
        self._notes[step] = Note(dict(metrics), temporary)

    def forget(self, step: int) -> None:
        """The step is not there, or no longer."""
        self._notes.pop(step, None)
        self.seen = [s for s in self.seen if s != step]

    def _note(self, step: int) -> Note:
        """What was saved with a step; nothing for one that cannot be read."""
        if step not in self._notes:
            try:
                about = open_step(self.folder.step(step)).manifest
            except (ValueError, OSError):
                about = None
            self._notes[step] = Note(about.metrics, about.temporary) if about else Note()
        return self._notes[step]

    def after(self, step: int) -> list[int]:
        """The steps that there will be once one more is committed and `expire` was called.

        That one stays, also if the run went back, and higher steps of an earlier run are there.
        """
        with self._lock:
            steps = sorted({*self.folder.steps(), step})
            gone = self.rules.expired(steps, self._note)
            self._doomed = [s for s in gone if s != step and not self._readers[s]]
            return [s for s in steps if s not in self._doomed]

    def expire(self) -> None:
        """Deletes what `after` let go; raises OSError for what cannot be deleted."""
        while self._doomed:
            self.folder.delete(self._doomed[0])
            with self._lock:
                self._notes.pop(self._doomed.pop(0), None)

    @contextlib.contextmanager
    def reading(self, pick: Callable[[list[int]], list[int]]) -> Iterator[list[int]]:
        """The steps that can be read; those of them that `pick` picks stay until the end."""
        with self._lock:
            steps = [s for s in self.steps() if s not in self._doomed]
            held = pick(steps)
            self._readers.update(held)
        try:
            yield steps
        finally:
            with self._lock:
                self._readers.subtract(held)
