"""Restoring a step: by one process alone, or by all of them, which agree on what became of it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shardflax.ckpt.durable import FileRecord
from shardflax.ckpt.errors import (
    CheckpointFolderError,
    CheckpointMismatchError,
    CheckpointReadError,
)
from shardflax.ckpt.folder import step_folder
from shardflax.ckpt.match import Options, Report, match
from shardflax.ckpt.metering import Meter, Mode, showing
from shardflax.ckpt.opening import damage, open_step
from shardflax.ckpt.paths import show
from shardflax.ckpt.patterns import covers, idle_patterns
from shardflax.ckpt.place import Place, place
from shardflax.ckpt.rendezvous import Rendezvous
from shardflax.ckpt.restore import load, load_on_host
from shardflax.ckpt.sources import LeafDataError, Source
from shardflax.ckpt.tree_source import pieces, with_names

__all__ = ["Restored", "load_checkpoint", "restore_file", "restore_source", "restore_step"]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held: its step, the state, what was saved beside it, and what was done.

    `process_extras` has one entry for each process that saved.

    >>> Restored(10, {"w": 1.0}, {"epoch": 2}).extras["epoch"]
    2
    """

    step: int
    state: Any
    extras: dict[str, Any]
    report: Report = dataclasses.field(default=Report((), (), (), (), (), ()))
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    process_extras: tuple[Any, ...] = ()


def load_checkpoint(
    folder: str | os.PathLike[str],
    target: Any = None,
    options: Options | None = None,
    *,
    progress: Mode = "auto",
) -> Restored:
    """Reads one checkpoint that is not in the folder of a manager, whoever wrote it.

    `folder` is that of a step of ours, of Orbax's, or of one of Orbax's items.  The step is its
    name, or what is written in it; 0 if neither says one.  See `CheckpointManager.restore` for the
    rest; only this process takes part.

    >>> import tempfile, numpy as np
    >>> from shardflax.ckpt.manager import CheckpointManager
    >>> root = tempfile.mkdtemp()
    >>> with CheckpointManager(root) as manager:
    ...     handle = manager.save(3, {"a": {"b": np.arange(3)}})
    >>> load_checkpoint(f"{root}/3").state
    {'a': {'b': array([0, 1, 2])}}
    """
    path = place(folder)
    step = int(path.name) if path.name.isdecimal() else None
    root = path if step is None else path.parent
    meter = Meter(f"reading {path}")
    if not path.is_dir():
        raise CheckpointFolderError(path, "there is no such folder", "Was it moved?")
    with showing(meter, progress):
        try:
            return _attempt(path, root, step, target, options or Options(), meter)
        except CheckpointReadError:
            if not (steps := step_folder(path).steps()):
                raise
            known = ", ".join(map(str, steps))
            raise CheckpointFolderError(
                path,
                f"it is that of a run, with steps {known}",
                "Give the folder of one of them, or make a CheckpointManager for it.",
            ) from None


def restore_step(
    root: Place,
    steps: Sequence[int],
    target: Any,
    options: Options,
    meeting: Rendezvous,
    key: str,
    meter: Meter,
) -> Restored:
    """The first of some steps that is not damaged, in all processes the same one."""
    first: CheckpointReadError | None = None
    for step in steps:
        restored, failure = None, None
        try:
            restored = _attempt(root / str(step), root, step, target, options, meter)
        except (CheckpointReadError, CheckpointMismatchError) as error:
            failure = error
        if isinstance(failure, CheckpointMismatchError):
            _tell(meeting, f"{key}/{step}", step, {"mismatch": list(failure.differences)})
            raise failure
        said = _tell(meeting, f"{key}/{step}", step, {"damaged": str(failure)} if failure else {})
        others = [(index, value) for index, value in said.items() if value]
        if restored is not None and not others:
            return restored
        elsewhere = [_elsewhere(root, step, *one) for one in others]
        first = first or failure or elsewhere[0]
    assert first is not None
    raise first


def _tell(
    meeting: Rendezvous, key: str, step: int, value: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """What became of the step in each process."""
    return meeting.together(key, value, f"restoring step {step}")


def _elsewhere(root: Place, step: int, index: int, value: dict[str, Any]) -> CheckpointReadError:
    """The error for a step that only another process could not read.

    Raises CheckpointMismatchError if it does not fit the target there.
    """
    if "mismatch" in value:
        lines = [f"(process {index}) {line}" for line in value["mismatch"]]
        raise CheckpointMismatchError(root, step, lines)
    return CheckpointReadError(root, step, f"process {index}: {value['damaged']}")


def _attempt(
    folder: Place, root: Place, step: int | None, target: Any, options: Options, meter: Meter
) -> Restored:
    """Reads one step in this process."""
    try:
        opened = open_step(folder)
    except (ValueError, OSError) as error:
        raise CheckpointReadError(root, step, error) from error
    about = opened.manifest
    files = about.files if about else {}
    found = restore_source(
        opened.source, root, step, target, options, opened.extras, folder, files, meter
    )
    if about is None:
        return found
    number = about.step if step is None else step
    return dataclasses.replace(
        found, step=number, metrics=about.metrics, process_extras=about.process_extras
    )


def restore_source(
    source: Source,
    root: Place,
    step: int | None,
    target: Any,
    options: Options,
    extras: Callable[[], dict[str, Any]],
    folder: Place = Path(),
    files: Mapping[str, FileRecord] = MappingProxyType({}),
    meter: Meter | None = None,
) -> Restored:
    """What a source offers, as the target; `files` of `folder` are looked at if it is damaged.

    >>> from shardflax.ckpt.tree_source import TreeSource
    >>> restore_source(TreeSource({"a": 1}), Path("x"), None, {"a": 0}, Options(), dict).state
    {'a': 1}
    """
    heard = meter or Meter("reading")
    if target is None:
        source = _named(source, root, step, options)
        loaded = tuple(show(p) for p in source.leaves if covers(options.include, p))
        report = Report(loaded, (), (), (), (), ())
        makes: Any = functools.partial(
            load_on_host, source, functools.partial(covers, options.include), heard
        )
    else:
        takes, report, differences = match(source, target, options)
        if differences:
            raise CheckpointMismatchError(root, step, differences)
        makes = functools.partial(load, source, takes, target, heard)
    try:
        found = extras()
        return Restored(step or 0, makes(), found, report)
    except Exception as error:
        # With the file in its words, nothing has to be read to find that out: others are waiting.
        lines = damage(folder, files, data=str(folder) not in str(error))
        if lines and not isinstance(error, LeafDataError):
            lines = [*_damaged_leaves(source), *lines]
        text = "; ".join(dict.fromkeys([*str(error).split("; "), *lines]))
        raise CheckpointReadError(root, step, text) from error


def _named(source: Source, root: Place, step: int | None, options: Options) -> Source:
    """A source with the new names, for who has no target.

    Raises CheckpointMismatchError for names and patterns that mean nothing.
    """
    try:
        source = with_names(source, options.rename)
    except ValueError as error:
        raise CheckpointMismatchError(root, step, [str(error)]) from error
    idle: list[str] = []
    for option in ("include", "cast", "missing", "extra"):
        idle += idle_patterns(option, getattr(options, option), source.leaves.keys())
    if idle:
        raise CheckpointMismatchError(root, step, idle)
    return source


def restore_file(
    where: Path,
    opens: Callable[[Path], Source],
    target: Any,
    options: Options,
    extras: Callable[[Source], dict[str, Any]] = lambda source: {},
) -> Restored:
    """Reads a file of weights, as the target; without one, with the new names all the same.

    Raises CheckpointReadError for a file that is damaged or none; CheckpointMismatchError.

    >>> from shardflax.ckpt.tree_source import TreeSource
    >>> restore_file(Path("x"), lambda path: TreeSource({"a": 1}), None, Options()).state
    {'a': 1}
    """
    try:
        source = opens(where)
    except (ValueError, OSError) as error:
        raise CheckpointReadError(where, None, error) from error
    return restore_source(source, where, None, target, options, lambda: extras(source))


def _damaged_leaves(source: Source, most: int = 3) -> list[str]:
    """A line for each of the first leaves that cannot be read."""
    found: list[str] = []
    for path, spec in source.leaves.items():
        try:
            if spec.kind != "python" and spec.on_disk:
                for box in pieces(source, path):
                    source.read(path, box)()
        except LeafDataError as error:
            found.append(str(error))
        except Exception as error:
            found.append(f"leaf {show(path)!r}: {error}")
        if len(found) == most:
            return [*found, "there may be more"]
    return found
