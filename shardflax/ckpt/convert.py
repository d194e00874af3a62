"""One format of checkpoints into another, leaf by leaf, without devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardflax.ckpt.budget import Budget
from shardflax.ckpt.errors import CheckpointError, CheckpointExistsError, CheckpointReadError
from shardflax.ckpt.folder import step_folder
from shardflax.ckpt.locate import find_checkpoint
from shardflax.ckpt.manifest import CODECS, Manifest, check_json
from shardflax.ckpt.msgpack_files import write_msgpack
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.paths import nest, storage_names, tree_of
from shardflax.ckpt.place import Place, StorePath, place
from shardflax.ckpt.plan import Lot, Piece, Plan, Stored, with_codec
from shardflax.ckpt.regions import SMALL_BYTES, Box, chunk_shape
from shardflax.ckpt.rendezvous import Rendezvous, new_token
from shardflax.ckpt.safetensors_files import write_safetensors
from shardflax.ckpt.saving import Save
from shardflax.ckpt.sources import Source
from shardflax.ckpt.staging import Staged
from shardflax.ckpt.tree_source import pieces, with_names
from shardflax.ckpt.worker import THREADS, Worker
from shardflax.ckpt.zarr import storable
from shardflax.core.errors import FlaxError

__all__ = ["FORMATS", "Converted", "convert_checkpoint", "write_step"]

FORMATS = ("shardflax", "safetensors", "msgpack")
"""What can be written."""
_BATCH = 32 << 20
"""Bytes of small leaves that are written together."""

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote: where, in which format, how many leaves and bytes of data.

    >>> Converted(Path("model.safetensors"), "safetensors", 2, 16).leaves
    2
    """

    path: Any
    format: str
    leaves: int
    nbytes: int


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    step: int | None = None,
    as_step: int | None = None,
    rename: Mapping[str, str] | None = None,
    progress: Progress = lambda nbytes: None,
) -> Converted:
    """Writes a checkpoint in another format; what was there before is never overwritten.

    `source` is what `find_checkpoint` takes, with `step`.  `to` is one of `FORMATS`; without it,
    the name of `destination` decides: `.safetensors`, `.msgpack`, else the folder of a run, in
    which the step becomes `as_step` (that of the source; 0 if it has none).  `rename` maps
    components of paths.  `progress` hears how many bytes were taken from the source.

    Extras become metadata of a safetensors file; MessagePack has no place for them.  Raises
    CheckpointReadError, CheckpointExistsError, CheckpointLeafError, CheckpointError.

    >>> import tempfile, numpy as np
    >>> from shardflax.ckpt.manager import CheckpointManager
    >>> root = tempfile.mkdtemp()
    >>> with CheckpointManager(f"{root}/run") as manager:
    ...     handle = manager.save(3, {"w": np.ones(2), "step": 3})
    >>> convert_checkpoint(f"{root}/run", f"{root}/w.safetensors").leaves
    2
    >>> convert_checkpoint(f"{root}/w.safetensors", f"{root}/again", as_step=7).path.name
    '7'
    """
    found, path = find_checkpoint(source, step), place(destination)
    form = to or {".safetensors": "safetensors", ".msgpack": "msgpack"}.get(path.suffix, FORMATS[0])
    if form not in FORMATS:
        raise ValueError(f"to={form!r}: one of {', '.join(FORMATS)}")
    try:
        named = with_names(found.source, rename)
    except ValueError as error:
        raise CheckpointError(f"{found.name!r} cannot be renamed so: {error}") from error
    try:
        leaves = _Heard(named, progress)
        extras = dict(found.extras())
        if form == "shardflax":
            number = as_step if as_step is not None else found.step or 0
            if not 0 <= number < 2**63:
                raise CheckpointError(f"as_step={number}: a step is at least 0 and below 2**63.")
            path = write_step(path, number, leaves, check_json(extras), found.manifest)
        else:
            _write_file(path, form, leaves, extras)
    except FlaxError:
        raise  # says itself what is wrong, and some are ValueErrors
    except (ValueError, TypeError) as error:
        raise CheckpointReadError(found.path, None, error) from error
    total = sum(spec.nbytes for spec in leaves.leaves.values())
    return Converted(path, form, len(leaves.leaves), total)


class _Heard(Source):
    """A source that says how many bytes were read."""

    def __init__(self, inner: Source, progress: Progress) -> None:
        self._inner, self._progress = inner, progress
        self.leaves, self.nones, self.boxed = inner.leaves, inner.nones, inner.boxed

    def names(self, path: LeafPath) -> Any:
        return self._inner.names(path)

    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        return self._inner.chunk(path)

    def read(self, path: LeafPath, box: Box) -> Any:
        later = self._inner.read(path, box)

        def finish() -> Any:
            array = later()
            self._progress(array.nbytes)
            return array

        return finish

    def check_size(self, nbytes: int) -> None:
        self._inner.check_size(nbytes)


def _write_file(path: Path, form: str, source: Source, extras: Mapping[str, Any]) -> None:
    if path.exists():
        raise CheckpointError(f"{str(path)!r} is there already: give another name, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "msgpack":
        write_msgpack(path, source)
    else:
        write_safetensors(path, source, {}, extras)


def write_step(
    root: Place,
    step: int,
    source: Source,
    extras: dict[str, Any],
    about: Manifest | None = None,
) -> Any:
    """Writes what a source offers as a step in the folder of a run; its folder.

    Metrics, and the extras of the processes, are those of `about`.  Only this process takes part,
    and no device.  Atomic, like a save of `CheckpointManager`.
    Raises CheckpointExistsError, CheckpointFolderError.

    >>> import tempfile, numpy as np
    >>> from shardflax.ckpt.tree_source import TreeSource
    >>> write_step(Path(tempfile.mkdtemp()), 3, TreeSource({"w": np.ones(2)}), {}).name
    '3'
    """
    folder = step_folder(root.absolute())
    folder.prepare()
    if folder.is_committed(step) or (isinstance(root, Path) and folder.step(step).exists()):
        raise CheckpointExistsError(root, step)
    plan = _plan(source)
    if isinstance(folder.root, StorePath):
        plan = with_codec(plan, CODECS[0])
    python = {p: spec.value for p, spec in source.leaves.items() if spec.kind == "python"}
    syncer = Worker("shardflax-sync", THREADS)
    job = Save(
        root=folder.root,
        step=step,
        number=1,
        token=new_token(),
        plan=plan,
        values=python,
        extras=extras,
        metrics=dict(about.metrics) if about else {},
        process_extras={},
        extras_of_all=about.process_extras if about else None,
        meeting=Rendezvous("", 60, 0, 1, None, {}),
        syncer=syncer,
        budget=Budget(None),
        groups=_Groups(plan, source),  # type: ignore[arg-type]
    )
    try:
        job.run(lambda step: [step])
    finally:
        syncer.close()
    return folder.step(step)


class _Groups:
    """Parcels that are read when the writer asks for them, so one at a time is in memory."""

    def __init__(self, plan: Plan, source: Source) -> None:
        self._parcels = iter(plan.parcels)
        self._plan, self._source = plan, source

    def get(self) -> list[Staged] | None:
        parcel = next(self._parcels, None)
        if parcel is None:
            return None
        paths = [self._plan.tree.paths[lot.leaf] for lot in parcel]
        reads = [self._source.read(p, lot.box) for p, lot in zip(paths, parcel, strict=True)]
        return [Staged(lot, (read(),)) for lot, read in zip(parcel, reads, strict=True)]


def _plan(source: Source) -> Plan:
    """How the leaves are stored, all by this process."""
    nested = nest(dict.fromkeys(source.leaves, 0) | dict.fromkeys(source.nones))
    tree = tree_of(nested)
    if set(tree.paths) != set(source.leaves):
        raise CheckpointError("The paths of the leaves are no tree: rename some of them.")
    names = storage_names(tree.paths)
    specs = tuple(source.leaves[path] for path in tree.paths)
    stored: list[Stored | None] = []
    lots: list[Lot] = []
    for index, (path, spec) in enumerate(zip(tree.paths, specs, strict=True)):
        if spec.kind == "python" or not spec.on_disk:
            stored.append(None)
            continue
        shape, dtype = spec.stored
        whole = Box.whole(shape)
        chunk = chunk_shape(shape, dtype.itemsize, [whole])
        form = storable(dtype)
        stored.append(Stored(path, spec, *names[path], shape, form, chunk, source.names(path)))
        lots += _lots(index, source, path, chunk)
    return Plan(tree, specs, tuple(stored), tuple(_batches(lots)), {}, "")


def _lots(index: int, source: Source, path: LeafPath, chunk: tuple[int, ...]) -> Iterator[Lot]:
    """Parts of a leaf that are read and written at once."""
    spec = source.leaves[path]
    itemsize, small = spec.stored[1].itemsize, spec.nbytes <= SMALL_BYTES
    for box in [Box.whole(spec.stored[0])] if small else pieces(source, path, chunk):
        yield Lot(index, box, (Piece(box, -1),), box.size * itemsize, small)


def _batches(lots: list[Lot]) -> Iterator[tuple[Lot, ...]]:
    """Small leaves together, first; then the parts of large ones, each by itself."""
    batch, size = list[Lot](), 0
    for lot in (lot for lot in lots if lot.small):
        if batch and size + lot.nbytes > _BATCH:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(lot)
        size += lot.nbytes
    if batch:
        yield tuple(batch)
    yield from ((lot,) for lot in lots if not lot.small)
