"""Saving a run's state in the background, and restoring it into the current layout."""

from __future__ import annotations

import atexit
import itertools
import operator
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shardflax.ckpt.budget import Budget
from shardflax.ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointFolderError,
    CheckpointNotFoundError,
    CheckpointSaveError,
)
from shardflax.ckpt.faults import at
from shardflax.ckpt.folder import StepFolder, expired
from shardflax.ckpt.handle import SaveHandle
from shardflax.ckpt.manifest import check_json
from shardflax.ckpt.match import Options, Patterns
from shardflax.ckpt.opening import open_step
from shardflax.ckpt.plan import Plan, make_plan
from shardflax.ckpt.reading import Restored, restore_step
from shardflax.ckpt.rendezvous import Rendezvous, meet, new_token
from shardflax.ckpt.saving import Save
from shardflax.ckpt.staging import Staged, stage
from shardflax.ckpt.worker import Worker

__all__ = ["CheckpointManager"]


class CheckpointManager:
    """Saves states to a folder, asynchronously and atomically, and restores them.

    A *committed* step is complete on disk; a save that was interrupted at any moment is never
    visible.  At most one save is in flight: the next one waits for it.  An error of a background
    save is raised, once, by the next call of `save`, `wait`, `restore` or `close`.

    With several processes, every one makes the manager and makes the same calls with the same
    steps; the folder must be shared.  Extras, numpy leaves and Python numbers are process 0's.

    Args:
      directory: a local or network folder; made if it is not there.
      keep: how many of the newest steps to keep; None keeps all.
      save_every: `save` does nothing for steps that this does not divide.
      keep_every: steps that this divides are never deleted.
      best: the name of a metric: the step with the least one is not deleted either; the greatest
        with `best_is_max`.
      read_only: for a second program that looks on: nothing is written, tested or cleaned up.
      timeout: seconds that processes wait for one another.
      staging: how many bytes a process may hold for a save that are not yet written; `save` waits
        for the writer then.  None for no bound: one copy of what the process holds of the state.
      on_error: called, on another thread, with the CheckpointError of a save that failed.

    Raises CheckpointFolderError if the folder cannot be written to or the processes do not share
    it.  Making a manager removes what a killed run left unfinished in the folder.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> state = {"w": jnp.arange(4.0), "step": 10}
    >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
    ...     saved = manager.save(10, state, extras={"seen": 640})
    ...     restored = manager.restore(state)
    >>> restored.step, restored.state["w"].tolist(), restored.extras
    (10, [0.0, 1.0, 2.0, 3.0], {'seen': 640})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        save_every: int = 1,
        keep_every: int | None = None,
        best: str | None = None,
        best_is_max: bool = False,
        read_only: bool = False,
        timeout: float = 600,
        staging: int | None = None,
        on_error: Callable[[CheckpointError], object] | None = None,
    ) -> None:
        for name, value in (("keep", keep), ("save_every", save_every), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"CheckpointManager: {name} must be at least 1, not {value}.")
        self.keep, self.save_every, self.keep_every = keep, save_every, keep_every
        self.best, self.best_is_max = best, best_is_max
        self.read_only, self.staging, self.on_error = read_only, staging, on_error
        self._folder = StepFolder(_local_path(directory))
        self._own: set[int] = set()
        self._numbers, self._restores = itertools.count(1), itertools.count(1)
        self._pending: SaveHandle | None = None
        self._failure: CheckpointError | None = None
        self._meeting = meet(timeout)
        self._token = ""
        self._seen: list[int] = []
        self._metrics: dict[int, dict[str, float]] = {}
        if not read_only:
            self._begin()
            self._writer = Worker("shardflax-save")
            self._syncer = Worker("shardflax-sync")
            _commit_at_exit()

    def _begin(self) -> None:
        """Prepares the folder, and proves that all processes see the same one."""
        meeting, folder = self._meeting, self._folder
        failure: CheckpointFolderError | None = None
        try:
            folder.prepare()
            self._seen = folder.steps()
        except CheckpointFolderError as error:
            failure = error
        if meeting.count > 1:
            self._token = _check_shared(meeting, folder.root, failure)
            self._seen = meeting.agree("steps", self._seen, "making a manager")
        else:
            self._token = new_token()
        if failure is not None:
            raise failure
        if meeting.primary:
            folder.clean()

    @property
    def directory(self) -> Path:
        """The folder, as an absolute path."""
        return self._folder.root

    @property
    def pending_step(self) -> int | None:
        """The step that is being saved, or None."""
        pending = self._pending
        return None if pending is None or pending.committed.done() else pending.step

    def all_steps(self) -> list[int]:
        """The committed steps, in order, as process 0 sees the folder."""
        if self._meeting.primary or self.read_only:
            return self._folder.steps()
        return list(self._seen)

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The committed step with the best metric; None if no step has it."""
        return self._best_of(self.all_steps())

    def is_due(self, step: int) -> bool:
        """True if `save(step, ...)` would save without `force`."""
        return step % self.save_every == 0 and step not in self._own

    def save(
        self,
        step: int,
        state: Any,
        *,
        extras: Mapping[str, Any] | None = None,
        process_extras: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> SaveHandle | None:
        """Starts saving a state; returns a handle, or None if it did not.

        None means that `save_every` does not divide the step (`force` ignores that) or that this
        run saved or restored the step already.  On return the state may be donated or changed.

        `state` is a pytree of arrays, typed PRNG keys, numbers and strings; static fields are not
        stored.  `extras` is JSON, committed together with the state; process 0's.  `process_extras`
        is JSON too, each process's own: the state of its data iterator, say.  `metrics` are
        numbers, of which `best` names one; process 0's.

        Raises CheckpointLeafError for a leaf that cannot be stored; CheckpointExistsError for a
        step that another run wrote.  The error of an earlier background save is raised too, but
        this one goes on nevertheless.

        >>> import tempfile
        >>> with CheckpointManager(tempfile.mkdtemp(), save_every=10) as manager:
        ...     [manager.save(step, {"step": step}) for step in (5, 10, 10)]
        [None, SaveHandle(step=10), None]
        """
        step = operator.index(step)
        if self.read_only:
            raise CheckpointSaveError(self.directory, step, "the manager is read_only")
        if step < 0:
            raise ValueError(f"CheckpointManager.save: step must not be negative, got {step}.")
        if step in self._own or not (force or self.is_due(step)):
            self._raise_failure()
            return None
        if step in self._seen:
            raise CheckpointExistsError(self.directory, step)
        checked = check_json(dict(extras or {}))
        plan, leaves = make_plan(state)
        self._settle()
        failure, self._failure = self._failure, None
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        own = check_json(dict(process_extras or {}))
        handle = self._start(step, plan, leaves, checked, numbers, own)
        if failure is not None:
            raise failure
        return handle

    def _start(
        self,
        step: int,
        plan: Plan,
        leaves: list[Any],
        extras: dict[str, Any],
        metrics: dict[str, float],
        process_extras: dict[str, Any],
    ) -> SaveHandle:
        """Hands the staged state to the writer."""
        budget = Budget(self.staging)
        job = Save(
            root=self.directory,
            step=step,
            number=next(self._numbers),
            token=self._token,
            plan=plan,
            values=_python_values(plan, leaves),
            extras=extras,
            metrics=metrics,
            process_extras=process_extras,
            meeting=self._meeting,
            syncer=self._syncer,
            budget=budget,
        )
        handle = SaveHandle(step)
        self._own.add(step)
        self._pending = handle
        _IN_FLIGHT.add(self)
        self._writer.submit(lambda: self._run(job, handle))
        staged: list[Staged] = []
        try:
            for parcel in plan.parcels:
                budget.take(sum(lot.nbytes for lot in parcel))
                group = stage(parcel, leaves)
                job.groups.put(group)
                staged += [x for x in group if x.moving]
        except BaseException as error:
            job.groups.put(error)
            raise
        job.groups.put(None)
        if staged:
            _when_ready(self._syncer, staged, handle.staged)
        else:
            handle.staged.set_result(None)
        return handle

    def _run(self, job: Save, handle: SaveHandle) -> None:
        """A save from beginning to end, on the writer's thread."""
        try:
            self._metrics[job.step] = dict(job.metrics)
            self._seen = job.run(self._after)
        except BaseException as error:
            self._own.discard(job.step)
            self._metrics.pop(job.step, None)
            failure = CheckpointSaveError(self.directory, job.step, error)
            failure.__cause__ = error
            self._fail(failure)
            handle.committed.set_exception(failure)
        else:
            self._expire(job.step)
            handle.committed.set_result(None)
        finally:
            _IN_FLIGHT.discard(self)

    def _after(self, step: int) -> list[int]:
        """The steps that there will be once one more is committed, for the other processes."""
        steps = sorted({*self._folder.steps(), step})
        gone = self._expired(steps)
        return [s for s in steps if s not in gone]

    def _expired(self, steps: list[int]) -> list[int]:
        """What the policy lets go."""
        best = self._best_of(steps)
        return expired(steps, self.keep, self.keep_every, () if best is None else (best,))

    def _best_of(self, steps: list[int]) -> int | None:
        """The step with the best metric, of those that have it."""
        if self.best is None:
            return None
        found = {step: self._metrics_of(step).get(self.best) for step in steps}
        sign = -1 if self.best_is_max else 1
        known = [(sign * value, -step) for step, value in found.items() if value is not None]
        return -min(known)[1] if known else None

    def _metrics_of(self, step: int) -> dict[str, float]:
        """The metrics saved with a step; none for one that cannot be read."""
        if step not in self._metrics:
            try:
                about = open_step(self._folder.step(step)).manifest
            except (ValueError, OSError):
                about = None
            self._metrics[step] = dict(about.metrics) if about else {}
        return self._metrics[step]

    def _expire(self, step: int) -> None:
        """Deletes what the keep policy lets go."""
        if not self._meeting.primary:
            return
        try:
            for old in self._expired(self._folder.steps()):
                self._folder.delete(old)
            at("expired")
        except (OSError, CheckpointError) as error:
            failure = CheckpointError(
                f"Step {step} is committed in {str(self.directory)!r}, but an older step could not "
                f"be deleted: {error}."
            )
            failure.__cause__ = error
            self._fail(failure)

    def _fail(self, failure: CheckpointError) -> None:
        """Keeps an error for the next call, and tells who wants to hear of it now."""
        self._failure = failure
        if self.on_error is not None:
            self.on_error(failure)

    def _raise_failure(self) -> None:
        """Raises the stored error of a background save, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        """Returns when no save is in flight."""
        pending = self._pending
        if pending is not None:
            pending.committed.exception()

    def wait(self) -> None:
        """Returns when no save is in flight; raises the error of the last one, if it failed."""
        self._settle()
        self._raise_failure()

    def restore(
        self,
        target: Any = None,
        step: int | None = None,
        *,
        cast: Patterns = False,
        missing: Patterns = False,
        extra: Patterns = False,
        rename: Mapping[str, str] | None = None,
        include: Patterns = True,
        fallback: bool = False,
    ) -> Restored:
        """Reads a step (the latest by default) into the types and layout of `target`.

        `target` is a pytree like the saved one, of arrays or of `jax.ShapeDtypeStruct`s with
        shardings; which devices and processes wrote the step does not matter.  Boxes may be in
        either or both.  Leaves come back as what they are in the target: a committed JAX array in
        its sharding, a numpy array on the host, a Python number.  Without a target, all comes back
        as numpy arrays in nested dicts.

        Everything must fit, except for what is asked for, each with True or with patterns of
        paths such as `"params/head"` or `"*/bias"`: `cast` another dtype; `missing` leaves of the
        target keep the target's value; `extra` saved leaves are ignored; only the leaves of
        `include` are read.  `rename` maps components of saved paths, `{"encoder": "backbone"}` or
        `{"Block_*": "layers_*"}`.  Scanned layers become unrolled ones and the other way round.

        With `fallback`, a step that is damaged is passed over for the newest earlier one that is
        not, in all processes.

        Raises CheckpointNotFoundError; CheckpointMismatchError, before any array is read, with
        every leaf that does not fit; CheckpointReadError if the step is damaged; the error of an
        earlier background save.

        >>> import tempfile, jax, jax.numpy as jnp
        >>> manager = CheckpointManager(tempfile.mkdtemp())
        >>> manager.save(1, {"w": jnp.ones(2)})
        SaveHandle(step=1)
        >>> manager.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}).state["w"].tolist()
        [1.0, 1.0]
        """
        self.wait()
        options = Options(cast, missing, extra, dict(rename or {}), include)
        steps = self._choose(step, fallback)
        number = next(self._restores)
        restored = restore_step(
            self._folder.root, steps, target, options, self._meeting, f"restore/{number}"
        )
        self._own.add(restored.step)
        return restored

    def _choose(self, step: int | None, fallback: bool = False) -> list[int]:
        """The steps to try, the best first: process 0 says which there are."""
        steps = self._folder.steps() if self._meeting.primary or self.read_only else self._seen
        key = f"choose/{next(self._restores)}"
        steps = self._meeting.agree(key, steps, "choosing a step")
        newest = max(steps, default=-1) if step is None else operator.index(step)
        if newest not in steps:
            raise CheckpointNotFoundError(self.directory, step, steps)
        return [s for s in reversed(steps) if s <= newest] if fallback else [newest]

    def delete(self, step: int) -> None:
        """Deletes a committed step; raises CheckpointNotFoundError if it is not there."""
        self.wait()
        (step,) = self._choose(step)
        key = f"delete/{next(self._restores)}"
        self._meeting.together(f"{key}/begin", {}, f"deleting step {step}")
        if self._meeting.primary:
            self._folder.delete(step)
        self._meeting.together(f"{key}/end", {}, f"deleting step {step}")
        self._own.discard(step)
        self._seen = [s for s in self._seen if s != step]

    def close(self) -> None:
        """Waits for the save in flight and ends the threads; raises its error if it failed."""
        try:
            self.wait()
        finally:
            if not self.read_only:
                self._writer.close()
                self._syncer.close()

    def __enter__(self) -> Self:
        """The manager itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes; an error of the block goes before one of the background save."""
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(f"While this error was passing, also: {failure}")


def _local_path(directory: str | os.PathLike[str]) -> Path:
    """An absolute path; object stores are refused because their commit is not a rename."""
    name = os.fspath(directory)
    if "://" in name:
        raise ValueError(
            f"CheckpointManager: {name!r} is not a folder of a file system. "
            f"Mount the object store, and give the folder it is mounted at."
        )
    return Path(name).expanduser().absolute()


def _check_shared(meeting: Rendezvous, root: Path, failure: CheckpointFolderError | None) -> str:
    """Proves that all processes see one folder: process 0 leaves a mark, the others look for it.

    Returns a name for this manager's files.  Raises CheckpointFolderError, in each process, if
    one of them cannot use the folder or does not see it.
    """
    token = meeting.agree("token", new_token(), "making a manager")
    mark = root / f".shared-test-{token}"
    if meeting.primary and failure is None:
        mark.touch()
    meeting.agree("mark", True, "making a manager")
    said = meeting.together(
        "shared", {"seen": mark.exists(), "error": str(failure or "")}, "making a manager"
    )
    if meeting.primary:
        mark.unlink(missing_ok=True)
    if failure is not None:
        raise failure
    broken = {index: report["error"] for index, report in said.items() if report["error"]}
    if broken:
        text = "; ".join(f"process {index}: {error}" for index, error in broken.items())
        raise CheckpointFolderError(root, "another process cannot use it", text)
    blind = [index for index, report in said.items() if not report["seen"]]
    if blind:
        raise CheckpointFolderError(
            root,
            f"processes {', '.join(map(str, blind))} do not see what process 0 writes there",
            "Give a folder on a file system that all hosts share.",
        )
    return token


def _python_values(plan: Plan, leaves: list[Any]) -> dict[Any, Any]:
    """The leaves that are not arrays, by path."""
    return {
        path: leaf
        for path, leaf in zip(plan.tree.paths, leaves, strict=True)
        if isinstance(leaf, bool | int | float | complex | str) and not hasattr(leaf, "dtype")
    }


def _when_ready(worker: Worker, staged: list[Staged], future: Future[None]) -> None:
    """Completes a future when the transfers are done."""

    def wait() -> None:
        try:
            for value in staged:
                value.ready()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    worker.submit(wait)


_IN_FLIGHT: set[CheckpointManager] = set()
"""Managers that are saving; kept here, they live until they are done."""


def _commit_at_exit() -> None:
    """Lets a program that ends without `wait` commit its last save.

    Hooks run in reverse order: ours comes before the shutdown of JAX's, whenever that was
    registered.
    """
    atexit.unregister(_wait_at_exit)
    atexit.register(_wait_at_exit)


def _wait_at_exit() -> None:
    """Waits for the saves in flight; a failure can only be printed."""
    for manager in tuple(_IN_FLIGHT):
        try:
            manager.wait()
        except Exception:
            print("The last checkpoint was lost at exit; call close() to be sure:", file=sys.stderr)
            traceback.print_exc()
