"""One save, from staged values to a committed step; all of it on a background thread."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardflax.ckpt import faults, orbax_files
from shardflax.ckpt.budget import Budget
from shardflax.ckpt.durable import FileRecord, sync_folder
from shardflax.ckpt.errors import CheckpointAbortedError, CheckpointPeerError
from shardflax.ckpt.index import merge_indices
from shardflax.ckpt.landing import landing
from shardflax.ckpt.leaves import LeafSpec, describe
from shardflax.ckpt.manifest import Manifest
from shardflax.ckpt.orbax_files import STATE
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.paths import storage_names
from shardflax.ckpt.plan import Plan, Stored
from shardflax.ckpt.regions import Box, chunks_in
from shardflax.ckpt.rendezvous import Rendezvous
from shardflax.ckpt.staging import Group, Staged
from shardflax.ckpt.worker import Worker
from shardflax.ckpt.writing import check_there, writer
from shardflax.ckpt.zarr import chunk_key

__all__ = ["Save"]

_PATIENCE = 10.0
"""Seconds to wait, after a failure, until the others have stopped writing."""


@dataclasses.dataclass
class Save:
    """A save: what is to be written, where, and with whom.

    `number` counts the saves of a manager, equally in all processes.  `groups` gives the staged
    parcels, then None, or what kept them from coming.  `extras_of_all` are those of all processes,
    where they are not this save's.  `committed` says that the step is there, whatever comes then.
    """

    root: Path
    step: int
    number: int
    token: str
    plan: Plan
    values: Mapping[LeafPath, Any]
    extras: dict[str, Any]
    metrics: Mapping[str, float]
    process_extras: Any
    meeting: Rendezvous
    syncer: Worker
    budget: Budget
    temporary: bool = False
    extras_of_all: tuple[Any, ...] | None = None
    committed: bool = False
    groups: queue.SimpleQueue[list[Staged] | BaseException | None] = dataclasses.field(
        default_factory=queue.SimpleQueue
    )

    def __post_init__(self) -> None:
        self._landing = landing(self.root, self.step, f"{self.token}-{self.number}")

    @property
    def folder(self) -> Any:
        """Where it is written until it is committed."""
        return self._landing.folder

    def _key(self, what: str) -> str:
        return f"save/{self.number}/{what}"

    def run(self, steps_after: Callable[[int], list[int]]) -> list[int]:
        """Writes and commits; raises what went wrong, in all processes.

        Returns the committed steps that process 0 will keep.
        """
        faults.at("staged")
        try:
            self._begin()
            report = self._write()
        except OSError as error:  # process 0 removes the folder when it gives up
            failure: Exception = error
            with contextlib.suppress(CheckpointPeerError):
                failure = error if self.meeting.primary else self._reason() or error
            self._fail(failure)
            raise failure from error.__cause__
        except BaseException as error:
            self._fail(error)
            raise
        steps = self._commit(report, steps_after) if self.meeting.primary else self._follow(report)
        self.plan.prepare()
        return steps

    # --- every process

    def _begin(self) -> None:
        """Process 0 makes the folder; the others hear about it."""
        self._digest = [self.step, self.plan.digest]
        if self.meeting.primary:
            self._began = time.time()
            self._landing.begin()
            self.meeting.tell(self._key("go"), self._digest)
        else:
            said = self.meeting.hear(self._key("go"), by=0, doing=f"beginning step {self.step}")
            if said != self._digest:
                raise RuntimeError(
                    f"process {self.meeting.index} saves step {self.step}, with a tree of digest "
                    f"{self.plan.digest}; process 0 saves step {said[0]}, with {said[1]}: every "
                    f"process must save the same steps of the same state"
                )
        faults.at("folder")

    def _write(self) -> dict[str, FileRecord]:
        """Writes this process's parts; the files, by their names in the state's folder."""
        part = f"ocdbt.process_{self.meeting.index}" if self.meeting.count > 1 else ""
        store = writer(self.folder / STATE / part, self.syncer)
        try:
            if self.meeting.primary:
                store.write_metadata(self.plan.stored, self._scalars())
            for group in self._staged():
                store.write(group)
                del group
                if self.meeting.count > 1:
                    self._check_outcome()
            store.wait()
            faults.at("written")
            records = store.finish() if self.meeting.primary or self.plan.parcels else {}
        except BaseException:
            store.abandon()
            raise
        return {f"{part}/{name}".lstrip("/"): record for name, record in records.items()}

    def _staged(self) -> Iterator[Group]:
        """The groups as they come; of each that is written, the budget hears."""
        while (group := self.groups.get()) is not None:
            if isinstance(group, BaseException):
                raise RuntimeError(f"the state could not be copied: {group!r}") from group
            size = sum(staged.lot.nbytes for staged in group)
            yield Group(self.plan.stored, group, functools.partial(self.budget.give, size))
            del group

    def _check_outcome(self) -> None:
        """Raises if another process has failed, so that this one stops writing."""
        failure = self._reason()
        if failure is not None:
            raise failure

    def _reason(self) -> CheckpointAbortedError | None:
        """Why process 0 has given up, if it has."""
        outcome = self.meeting.peek(self._key("outcome"))
        return None if outcome is None else CheckpointAbortedError(outcome["error"])

    def _fail(self, error: BaseException) -> None:
        """Lets all others know, and removes what was written."""
        self.budget.open()
        text = f"{type(error).__name__}: {error}"
        try:
            if not isinstance(error, CheckpointAbortedError | CheckpointPeerError):
                self.meeting.tell(self._key(f"done/{self.meeting.index}"), {"error": text})
            elif not self.meeting.primary:
                self.meeting.tell(self._key(f"done/{self.meeting.index}"), {"stopped": True})
            if self.meeting.primary:
                known = isinstance(error, CheckpointPeerError | CheckpointAbortedError)
                gone = error.processes if isinstance(error, CheckpointPeerError) else ()
                self._abort(str(error) if known else f"process 0: {text}", gone)
        except Exception as second:
            error.add_note(f"The other processes could not be told: {second}")
        finally:
            if self.meeting.primary:
                self._landing.abandon()

    # --- process 0

    def _commit(
        self, report: dict[str, FileRecord], steps_after: Callable[[int], list[int]]
    ) -> list[int]:
        """Waits for the others, completes the folder, and gives it its name."""
        try:
            files = self._collect(report)
            self._landing.commit(self._complete(files))
        except BaseException as error:
            self._fail(error)
            raise
        self.committed = True
        faults.at("committed")
        steps = steps_after(self.step)
        self.meeting.tell(self._key("outcome"), {"steps": steps})
        self.meeting.forget(f"save/{self.number - 1}")
        return steps

    def _collect(self, report: dict[str, FileRecord]) -> dict[str, FileRecord]:
        """The files of all processes, once all have written theirs."""
        self.meeting.tell(self._key("done/0"), {"files": report, "extras": self.process_extras})
        said = self.meeting.gather(self._key("done"), f"writing step {self.step}", stop=_failed)
        for index, value in said.items():
            if "error" in value:
                raise CheckpointAbortedError(f"process {index}: {value['error']}")
        faults.at("reported")
        if self.extras_of_all is None:
            self.extras_of_all = tuple(said[i]["extras"] for i in range(self.meeting.count))
        files = {name: record for value in said.values() for name, record in value["files"].items()}
        if self.meeting.count > 1:
            parts = [name.split("/")[0] for name in files if name.endswith("manifest.ocdbt")]
            files |= merge_indices(self.folder / STATE, sorted(parts), self._chunks())
        faults.at("merged")
        return files

    def _chunks(self) -> Iterator[str]:
        """The keys of all chunks, whoever writes them."""
        for leaf in self.plan.stored:
            if leaf is not None:
                for index, _ in chunks_in(Box.whole(leaf.shape), leaf.chunk):
                    yield f"{leaf.name}/{chunk_key(index)}"

    def _complete(self, files: dict[str, FileRecord]) -> bytes:
        """Writes everything but the arrays and the manifest, which is written last; that."""
        stored = [leaf for leaf in self.plan.stored if leaf is not None]
        scalars = [leaf for leaf, _ in self._scalars()]
        strings = {p: v for p, v in self.values.items() if isinstance(v, str)}
        tree = self.plan.tree
        files |= orbax_files.write_item_files(self.folder / STATE, stored, scalars, strings, tree)
        sync_folder(self.folder / STATE)
        files = {f"{STATE}/{name}": (size, crc) for name, (size, crc) in files.items()}
        check_there(self.folder, files)
        files |= orbax_files.write_step_files(self.folder, self.extras, self._began)
        faults.at("described")
        manifest = Manifest(
            step=self.step,
            leaves=self._leaves(),
            stored={leaf.path: leaf for leaf in stored},
            files=files,
            nones=self.plan.tree.nones,
            mesh=self.plan.mesh,
            processes=self.meeting.count,
            time=time.time(),
            metrics=self.metrics,
            process_extras=self.extras_of_all or (),
            temporary=self.temporary,
        )
        return manifest.text()

    def _abort(self, why: str, gone: Sequence[int]) -> None:
        """Tells the others, and gives those that are not gone some time to stop writing."""
        if self.meeting.count == 1:
            return
        self.meeting.tell(self._key("outcome"), {"error": why})
        end = time.monotonic() + min(_PATIENCE, self.meeting.timeout)
        known = dataclasses.replace(self.meeting, timeout=max(0.0, end - time.monotonic()))
        with contextlib.suppress(CheckpointPeerError):
            known.gather(self._key("done"), "stopping", stop=_never, without=gone)

    # --- the other processes

    def _follow(self, report: dict[str, FileRecord]) -> list[int]:
        """Reports, and waits for process 0's word."""
        said = {"files": report, "extras": self.process_extras}
        self.meeting.tell(self._key(f"done/{self.meeting.index}"), said)
        faults.at("reported")
        outcome = self.meeting.hear(
            self._key("outcome"), by=0, doing=f"committing step {self.step}"
        )
        if "error" in outcome:
            raise CheckpointAbortedError(outcome["error"])
        self.committed = True
        faults.at("committed")
        return outcome["steps"]

    # --- leaves that are not arrays

    def _leaves(self) -> dict[LeafPath, LeafSpec]:
        """The specs of all leaves, in their order."""
        found: dict[LeafPath, LeafSpec] = {}
        for path, spec in zip(self.plan.tree.paths, self.plan.specs, strict=True):
            found[path] = describe(path, self.values[path]) if path in self.values else spec
        return found

    def _scalars(self) -> Sequence[tuple[Stored, Any]]:
        """The Python numbers, as arrays without dims."""
        found: list[tuple[Stored, Any]] = []
        names = storage_names(self.plan.tree.paths) if self.values else {}
        for path, value in self.values.items():
            spec = describe(path, value)
            if spec.on_disk:
                shape, dtype = spec.stored
                found.append((Stored(path, spec, *names[path], shape, dtype, ()), value))
        return found


def _failed(value: Any) -> bool:
    return "error" in value


def _never(_: Any) -> bool:
    return False
