"""Errors of checkpoints: one class per cause."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shardflax.core.errors import FlaxError

__all__ = [
    "CheckpointAbortedError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointFolderError",
    "CheckpointLeafError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointPeerError",
    "CheckpointReadError",
    "CheckpointSaveError",
]


class CheckpointError(FlaxError):
    """The base class of all errors of checkpoints.

    >>> issubclass(CheckpointNotFoundError, CheckpointError)
    True
    """


class CheckpointAbortedError(CheckpointError):
    """Another process could not do its part of a save or a restore, so none went on.

    >>> print(CheckpointAbortedError("process 1: OSError: disk full"))
    process 1: OSError: disk full
    """


class CheckpointFolderError(CheckpointError):
    """The checkpoint folder cannot be used.

    >>> CheckpointFolderError("/dev/null", "it is a file", "Give a folder.").directory
    '/dev/null'
    """

    def __init__(self, directory: str | os.PathLike[str], found: str, advice: str) -> None:
        self.directory = os.fspath(directory)
        super().__init__(f"Checkpoint folder {self.directory!r}: {found}. {advice}")


class CheckpointNotFoundError(CheckpointError):
    """No committed step, or not the one asked for.

    >>> print(CheckpointNotFoundError("/data/run", 3, [10, 20]))
    Checkpoint folder '/data/run' has no committed step 3; it has: 10, 20.
    """

    def __init__(
        self, directory: str | os.PathLike[str], step: int | None, steps: Sequence[int]
    ) -> None:
        self.directory, self.step, self.steps = os.fspath(directory), step, tuple(steps)
        what = "committed step" if step is None else f"committed step {step}"
        found = ", ".join(map(str, steps)) or "none"
        super().__init__(f"Checkpoint folder {self.directory!r} has no {what}; it has: {found}.")


class CheckpointExistsError(CheckpointError):
    """A step is already in the folder, and this run neither wrote nor restored it.

    >>> CheckpointExistsError("/data/run", 20).step
    20
    """

    def __init__(self, directory: str | os.PathLike[str], step: int) -> None:
        self.directory, self.step = os.fspath(directory), step
        super().__init__(
            f"Step {step} is already in {self.directory!r}, written by an earlier run that this "
            f"one did not continue from. Restore the latest step, write to another folder, or "
            f"remove the step with `manager.delete({step})`."
        )


class CheckpointLeafError(CheckpointError):
    """A leaf of the state that cannot be stored.

    >>> print(CheckpointLeafError("params/name", "a str", "Put it in extras."))
    Cannot save leaf 'params/name': a str. Put it in extras.
    """

    def __init__(self, path: str, found: str, advice: str) -> None:
        self.path = path
        super().__init__(f"Cannot save leaf {path!r}: {found}. {advice}")


class CheckpointMismatchError(CheckpointError):
    """The checkpoint is not of the state that should take it.

    `differences` has one line per leaf; `step` is None for a file of weights.

    >>> print(CheckpointMismatchError("/data/run", 20, ["missing  w"]))
    Step 20 of '/data/run' does not fit the target state: 1 difference.
      missing  w
    Nothing was read. ...
    """

    def __init__(
        self, directory: str | os.PathLike[str], step: int | None, differences: Sequence[str]
    ) -> None:
        self.directory, self.step = os.fspath(directory), step
        self.differences = tuple(differences)
        count = len(differences)
        super().__init__(
            "\n".join(
                [
                    f"{_which(self.directory, step)} does not fit the target state: "
                    f"{count} difference{'s' if count > 1 else ''}.",
                    *(f"  {line}" for line in differences),
                    "Nothing was read. Restore with the model and optimizer that wrote the "
                    "checkpoint, or use another folder.",
                ]
            )
        )


class CheckpointPeerError(CheckpointError):
    """Other processes did not come to a save or a restore in time.

    >>> print(CheckpointPeerError([1, 3], 600, "writing step 20"))
    Processes 1, 3 did not answer for 600 s (writing step 20). They died, hang, ...
    """

    def __init__(self, processes: Sequence[int], seconds: float, doing: str) -> None:
        self.processes = list(processes)
        names = ", ".join(map(str, processes))
        super().__init__(
            f"Process{'es' if len(self.processes) > 1 else ''} {names} did not answer for "
            f"{seconds:g} s ({doing}). They died, hang, or do not make the same calls as the "
            f"others; with a larger `timeout`, slow ones are waited for longer."
        )


class CheckpointSaveError(CheckpointError):
    """A save failed, perhaps in the background; the step is not in the folder.

    The cause is chained.

    >>> print(CheckpointSaveError("/data/run", 20, OSError("disk full")))
    Saving step 20 to '/data/run' failed: OSError: disk full. ...
    """

    def __init__(
        self, directory: str | os.PathLike[str], step: int, cause: BaseException | str
    ) -> None:
        self.directory, self.step = os.fspath(directory), step
        why = _why(cause)
        super().__init__(
            f"Saving step {step} to {self.directory!r} failed: {why}. "
            f"The step was not committed; earlier committed steps are untouched."
        )


class CheckpointReadError(CheckpointError):
    """A committed step, or a file of weights (`step` is None then), cannot be read.

    >>> CheckpointReadError("/data/run", 20, "the manifest is empty").step
    20
    """

    def __init__(
        self, directory: str | os.PathLike[str], step: int | None, cause: BaseException | str
    ) -> None:
        self.directory, self.step = os.fspath(directory), step
        why = _why(cause)
        cure = "" if step is None else " Restore an earlier step with `restore(target, step=...)`."
        super().__init__(f"{_which(self.directory, step)} cannot be read: {why}.{cure}")


def _why(cause: BaseException | str) -> str:
    """A cause as the middle of a sentence."""
    text = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
    return text.rstrip(". ")


def _which(where: str, step: int | None) -> str:
    """A step of a folder, or a file."""
    return repr(where) if step is None else f"Step {step} of {where!r}"
