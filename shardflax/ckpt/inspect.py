"""What is in a checkpoint, and which steps are in a folder: read from small files, no device."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import stat
from collections.abc import Mapping
from typing import Any

from shardflax.ckpt.errors import CheckpointError, CheckpointReadError
from shardflax.ckpt.folder import step_folder
from shardflax.ckpt.leaves import LeafSpec
from shardflax.ckpt.locate import Found, find_checkpoint, flax_steps
from shardflax.ckpt.manifest import NAME
from shardflax.ckpt.opening import claims_manifest
from shardflax.ckpt.paths import Names
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.place import Place, place

__all__ = [
    "CheckpointInfo",
    "LeafInfo",
    "StepInfo",
    "about",
    "changed",
    "disk_bytes",
    "inspect_checkpoint",
    "list_steps",
    "when",
]


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """One leaf: what it is, what its dims are called, and how it was cut when it was saved.

    `names` has a logical name, or None, for each dim; `axes` the mesh axes.  Both are None where
    nothing was recorded.
    """

    path: LeafPath
    spec: LeafSpec
    names: Names = None
    axes: tuple[Any, ...] | None = None

    @property
    def layout(self) -> str:
        """Each dim as `name:axes`; empty if there is nothing to say.

        >>> spec = LeafSpec("array", (4, 8), "float32")
        >>> LeafInfo(("w",), spec, ("embed", None), (("data", "fsdp"), "tensor")).layout
        'embed:data+fsdp, :tensor'
        """
        dims = range(len(self.spec.shape))
        cut = [*(self.axes or ()), *(None for _ in dims)]
        named = self.names if self.names and len(self.names) == len(dims) else (None,) * len(dims)
        parts = [_text(named[d]) + (f":{_text(cut[d])}" if cut[d] else "") for d in dims]
        return ", ".join(part or "-" for part in parts) if any(parts) else ""

    def to_json(self) -> dict[str, Any]:
        """The leaf as JSON."""
        value = {} if self.spec.kind != "python" else {"value": _plain(self.spec.value)}
        return {
            "path": list(self.path),
            "kind": self.spec.kind,
            "dtype": self.spec.dtype,
            "shape": list(self.spec.shape),
            "bytes": self.spec.nbytes,
            "names": self.names,
            "axes": self.axes,
            **value,
        }


def _valid(value: Any) -> Any:
    """A JSON value without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _valid(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(part: Any) -> str:
    """A name or axis, or several, or none."""
    if isinstance(part, tuple | list):
        return "+".join(map(str, part))
    return "" if part is None else str(part)


def _plain(value: Any) -> Any:
    return [value.real, value.imag] if isinstance(value, complex) else value


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, and how it was written.

    `format` is "shardflax", "orbax", "safetensors" or "flax msgpack"; `time` is in seconds since
    1970, 0 if it is not known.  `process_extras` has one entry for each process that saved, and
    `temporary` steps only bridge the time to the next one.
    """

    path: Any
    format: str
    step: int | None
    leaves: tuple[LeafInfo, ...]
    nones: tuple[LeafPath, ...]
    extras: Mapping[str, Any]
    process_extras: tuple[Any, ...]
    metrics: Mapping[str, float]
    mesh: Mapping[str, int]
    processes: int
    time: float
    bytes_on_disk: int
    temporary: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.spec.nbytes for leaf in self.leaves)

    @property
    def written(self) -> str:
        """When and by whom, as users read it.

            >>> from pathlib import Path
        >>> CheckpointInfo(
        ...     Path("x"), "orbax", 3, (), (), {}, (), {}, {"data": 8}, 2, 0.0, 0
        ... ).written
            'by 2 processes on data=8'
        """
        parts = [when(self.time)] if self.time else []
        if self.processes:
            parts.append(f"by {self.processes} process{'es' if self.processes > 1 else ''}")
        if self.mesh:
            parts.append("on " + ", ".join(f"{axis}={size}" for axis, size in self.mesh.items()))
        return " ".join(parts)

    def to_json(self) -> str:
        """All of it as JSON, which has no NaN and no infinity: they are strings."""
        values = dataclasses.asdict(dataclasses.replace(self, leaves=()))
        values |= {"path": str(self.path), "bytes": self.nbytes, "mesh": dict(self.mesh)}
        values |= {"metrics": dict(self.metrics), "extras": dict(self.extras)}
        values["leaves"] = [leaf.to_json() for leaf in self.leaves]
        return json.dumps(_valid(values), indent=1, allow_nan=False)


def inspect_checkpoint(path: str | os.PathLike[str], step: int | None = None) -> CheckpointInfo:
    """What a checkpoint holds, whoever wrote it; of the arrays nothing is read.

    `path` is what `find_checkpoint` takes.  Raises CheckpointNotFoundError; CheckpointReadError.

    >>> import tempfile
    >>> from shardflax.ckpt.manager import CheckpointManager
    >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
    ...     handle = manager.save(3, {"a": 1, "b": 2.5}, extras={"seen": 64})
    >>> info = inspect_checkpoint(manager.directory)
    >>> [(leaf.path, str(leaf.spec)) for leaf in info.leaves], info.extras
    ([(('a',), 'int (Python)'), (('b',), 'float (Python)')], {'seen': 64})
    """
    return about(find_checkpoint(path, step))


def about(found: Found) -> CheckpointInfo:
    """What a checkpoint that was found holds.

    >>> import tempfile
    >>> from shardflax.ckpt.msgpack_files import save_msgpack
    >>> save_msgpack(file := f"{tempfile.mkdtemp()}/checkpoint_1", {"a": 1})
    >>> about(find_checkpoint(file)).format
    'flax msgpack'
    """
    manifest, source = found.manifest, found.source
    stored = manifest.stored if manifest else {}
    leaves = tuple(
        LeafInfo(path, spec, source.names(path), stored[path].spec if path in stored else None)
        for path, spec in source.leaves.items()
    )
    return CheckpointInfo(
        path=found.path,
        format=found.format,
        step=found.step,
        leaves=leaves,
        nones=tuple(source.nones),
        extras=_extras(found),
        process_extras=manifest.process_extras if manifest else (),
        metrics=manifest.metrics if manifest else {},
        mesh=manifest.mesh if manifest else {},
        processes=manifest.processes if manifest else 0,
        time=manifest.time if manifest else changed(found.path),
        bytes_on_disk=disk_bytes(found.path),
        temporary=manifest is not None and manifest.temporary,
    )


def _extras(found: Found) -> Mapping[str, Any]:
    try:
        return found.extras()
    except (ValueError, OSError) as error:
        raise CheckpointReadError(found.path, None, error) from error


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """A step of a run, or what is left of one.

    `state` is "committed", "damaged" (it has a manifest that cannot be read), "unfinished", or
    "saving" (by a living process); `temporary` says that it goes with the next one.

    >>> from pathlib import Path
    >>> StepInfo("3", Path("run/3"), "committed", "shardflax", 100, 0.0).committed
    True
    """

    name: str
    path: Any
    state: str
    format: str
    nbytes: int
    time: float
    temporary: bool = False

    @property
    def committed(self) -> bool:
        """True if it can be restored, as far as can be seen without reading it."""
        return self.state == "committed"


def list_steps(folder: str | os.PathLike[str]) -> list[StepInfo]:
    """The steps in the folder of a run, in order; last what was not finished.

    Those that Flax wrote (`checkpoint_100`) are among them.

    Raises CheckpointFolderError if there is no such folder.

    >>> import tempfile
    >>> from shardflax.ckpt.manager import CheckpointManager
    >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
    ...     handle = manager.save(3, {"a": 1})
    >>> [(step.name, step.state) for step in list_steps(manager.directory)]
    [('3', 'committed')]
    """
    steps = step_folder(place(folder))
    committed = steps.steps()
    found = [_step_info(steps.step(step)) for step in committed]
    numbered = (path for path in steps.root.iterdir() if path.is_dir() and path.name.isdecimal())
    bare = sorted(path for path in numbered if int(path.name) not in committed)
    found += [_step_info(path) for path in flax_steps(steps.root).values()]
    for path in dict.fromkeys([*bare, *steps.unfinished()]):
        state = "saving" if steps.is_busy(path) else "unfinished"
        found.append(StepInfo(path.name, path, state, "", disk_bytes(path), changed(path)))
    return found


def _step_info(path: Place) -> StepInfo:
    """A committed step, which may be damaged all the same."""
    state, kind, time, temporary = "committed", "", changed(path), False
    try:
        ours = (path / NAME).is_file() or claims_manifest(path)
        found = find_checkpoint(path) if ours else None
        kind = "shardflax" if found else "flax msgpack" if path.is_file() else "orbax"
        if found and found.manifest:
            time, temporary = found.manifest.time, found.manifest.temporary
    except (CheckpointError, OSError):
        state = "damaged"
    return StepInfo(path.name, path, state, kind, disk_bytes(path), time, temporary)


def changed(path: Place) -> float:
    """When a file or folder was changed, in seconds since 1970; 0 where nobody knows.

    >>> from pathlib import Path
    >>> changed(Path("/nowhere"))
    0.0
    """
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@functools.singledispatch
def disk_bytes(path: Any) -> int:
    """Bytes of a file, or of all files in a folder; what vanishes meanwhile is not counted.

    >>> from pathlib import Path
    >>> disk_bytes(Path("/nowhere"))
    0
    """
    total = 0
    for file in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            about = file.stat()
            total += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return total


def when(time: float) -> str:
    """Seconds since 1970 as local date and time; "-" for 0 (not known), and for no real time.

    >>> len(when(1e9))
    19
    """
    try:
        return datetime.datetime.fromtimestamp(time).isoformat(" ", "seconds") if time else "-"
    except (ValueError, OverflowError, OSError):
        return "-"
