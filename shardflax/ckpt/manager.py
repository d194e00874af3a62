"""Saving a run's state in the background, and restoring it into the current layout."""

from __future__ import annotations

import datetime
import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from shardflax.ckpt.at_exit import IN_FLIGHT, commit_at_exit
from shardflax.ckpt.budget import Budget
from shardflax.ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointReadError,
    CheckpointSaveError,
)
from shardflax.ckpt.faults import at
from shardflax.ckpt.folder import step_folder
from shardflax.ckpt.handle import SaveHandle
from shardflax.ckpt.keeping import Rules
from shardflax.ckpt.manifest import CODECS, check_json
from shardflax.ckpt.match import Options
from shardflax.ckpt.metering import Meter, Mode, showing
from shardflax.ckpt.patterns import Patterns
from shardflax.ckpt.place import Place, StorePath, place
from shardflax.ckpt.plan import Plan, make_plan
from shardflax.ckpt.preemption import Preemption
from shardflax.ckpt.reading import Restored, restore_step
from shardflax.ckpt.rendezvous import Rendezvous, meet
from shardflax.ckpt.saving import Save
from shardflax.ckpt.sharing import get_ready
from shardflax.ckpt.shelf import Shelf
from shardflax.ckpt.starting import hand_over, python_values
from shardflax.ckpt.timer import Timer
from shardflax.ckpt.worker import THREADS, Worker

__all__ = ["CheckpointManager"]

_NOT_DELETED = "an older step could not be deleted"


class CheckpointManager:
    """Saves states to a folder, asynchronously and atomically, and restores them.

    A *committed* step is complete on disk; a save that was interrupted at any moment is never
    visible.  At most one save is in flight: the next one waits for it.  An error of a background
    save is raised, once, by the next call of `save`, `wait`, `restore` or `close`.

    With several processes, every one makes the manager and makes the same calls with the same
    steps; the folder must be shared.  Extras, numpy leaves and Python numbers are process 0's.

    Args:
      directory: a folder of a file system, made if it is not there; or of an object store, as
        `gs://BUCKET/...` or `s3://BUCKET/...`.
      keep: how many of the newest steps to keep; None keeps all.
      save_every: `save` does nothing for steps that this does not divide.
      temporary_every: seconds, or a `timedelta`: other steps are saved too where the last save is
        longer ago, by process 0's clock.  Such a step goes as soon as a later one is committed, and
        does not count for `keep`.  Then `is_due` or `save` must be called at every step.
      keep_every: steps that this divides are never deleted.
      best: the name of a metric: the step with the least one is not deleted either; the greatest
        with `best_is_max`.
      preemptible: SIGTERM does not kill the process: `save` saves the step at which all processes
        have heard of it, and `reached_preemption` is true from then on.
      read_only: for a second program that looks on: nothing is written, tested or cleaned up.
      timeout: seconds that processes wait for one another.
      staging: how many bytes a process may hold for a save that are not yet written; `save` waits
        for the writer then.  None for no bound: one copy of what the process holds of the state.
      compression: "zstd" for large arrays; None for none, which is much faster where disks are;
        "auto" compresses only what goes to an object store.
      on_error: called, on another thread, with the CheckpointError of a save that failed.
      progress: what of process 0 shows on stderr how far a restore is, or a save that is waited
        for, when it takes more than two seconds: "auto" is a bar if that is a terminal; "lines" are
        lines for a log, of saves in the background too; None is nothing.

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
        temporary_every: float | datetime.timedelta | None = None,
        keep_every: int | None = None,
        best: str | None = None,
        best_is_max: bool = False,
        preemptible: bool = False,
        read_only: bool = False,
        timeout: float = 600,
        staging: int | None = None,
        compression: Literal["auto", "zstd"] | None = "auto",
        on_error: Callable[[CheckpointError], object] | None = None,
        progress: Mode = "auto",
    ) -> None:
        self.rules = Rules(keep, save_every, keep_every, best, best_is_max)
        self.read_only, self.staging, self.on_error = read_only, staging, on_error
        where = place(directory).absolute()
        self.compression = _codec(compression, where)
        self._meeting = meet(timeout)
        self._timer = _timer(temporary_every, self._meeting)
        self._preemption = Preemption() if preemptible else None
        self._progress: Mode = progress if self._meeting.primary else None
        folder = step_folder(where)
        self._shelf = Shelf(folder, self.rules, looks=self._meeting.primary or read_only)
        self._own: set[int] = set()
        self._numbers, self._calls = itertools.count(1), itertools.count(1)
        self._in_flight: list[SaveHandle] = []
        self._lock = threading.Lock()
        self._meter = Meter("saving")
        self._failure: CheckpointError | None = None
        self._closed = False
        if not read_only:
            self._token, self._shelf.seen = get_ready(folder, self._meeting)
            self._writer = Worker("shardflax-save")
            self._syncer = Worker("shardflax-sync", THREADS)
            commit_at_exit()
        if self._preemption is not None:
            self._preemption.start()

    @property
    def directory(self) -> Any:
        """The folder: an absolute `Path`, or a `StorePath`."""
        return self._shelf.folder.root

    @property
    def pending_step(self) -> int | None:
        """The step that is being saved, or None."""
        flying = tuple(self._in_flight)
        return next((handle.step for handle in flying if not handle.committed.done()), None)

    def all_steps(self) -> list[int]:
        """The committed steps, in order, as process 0 sees the folder."""
        return self._shelf.steps()

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The committed step with the best metric; None if no step has it."""
        return self._shelf.best()

    def is_due(self, step: int) -> bool:
        """True if `save(step, ...)` would save without `force`, in all processes alike."""
        early = self._early(step)
        return step not in self._own and (early or self.rules.regular(step))

    def _early(self, step: int) -> bool:
        """True if a step is to be saved though `save_every` may not divide it."""
        if self.read_only:
            return False
        # Both are asked at every step, whatever comes of it, so that processes count alike.
        stop = self._preemption is not None and self._preemption.reached(step)
        late = self._timer is not None and self._timer.due(step)
        return stop or late

    def reached_preemption(self, step: int | None = None) -> bool:
        """True once the run shall stop: SIGTERM came, and all processes have heard of it.

        To be asked equally often in all processes: at each step, with its number, and wherever else
        it takes long, without one: between the batches of an evaluation, after compiling.  It turns
        true in all of them at the same question, and stays true.

        Raises CheckpointError if the manager was not made with `preemptible=True`.

        >>> import os, signal, tempfile
        >>> with CheckpointManager(tempfile.mkdtemp(), save_every=100, preemptible=True) as manager:
        ...     for step in range(1, 10):
        ...         if step == 3:
        ...             os.kill(os.getpid(), signal.SIGTERM)
        ...         saved = manager.save(step, {"step": step})
        ...         if manager.reached_preemption(step):
        ...             break
        >>> manager.all_steps()
        [3]
        """
        if self._preemption is None:
            raise CheckpointError(
                f"The manager of {str(self.directory)!r} does not listen to SIGTERM: make it with "
                f"CheckpointManager(..., preemptible=True)."
            )
        return self._preemption.reached(step)

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

        None means that the step is not due (see `is_due`; `force` ignores that), or that this run
        saved or restored it already.  On return the state may be donated or changed.

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
        if self.read_only or self._closed:
            why = "is read_only" if self.read_only else "was closed: make a new one"
            raise CheckpointSaveError(self.directory, step, f"the manager {why}")
        if not 0 <= step < 2**63:
            raise ValueError(
                f"CheckpointManager.save: step must not be negative, nor 2**63 or more: {step}."
            )
        early, lasting = self._early(step), force or self.rules.regular(step)
        if step in self._own or not (early or lasting):
            self._raise_failure()
            return None
        if step in self._shelf.seen:
            raise CheckpointExistsError(self.directory, step)
        checked = check_json(dict(extras or {}))
        own = check_json(dict(process_extras or {}), "process_extras")
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        plan, leaves = make_plan(state, self.compression)
        if not self._claim(step):
            self._raise_failure()
            return None
        try:
            self._settle()
            failure, self._failure = self._failure, None
            job = self._job(step, plan, leaves, checked, own)
            job.metrics, job.temporary = numbers, not lasting
        except BaseException:
            self._own.discard(step)
            raise
        try:
            handle = self._start(job, leaves)
        except Exception as error:
            if failure is not None:
                error.add_note(f"Before that: {failure}")
            raise
        if failure is not None:
            raise failure
        return handle

    def _claim(self, step: int) -> bool:
        """False if another thread is saving the step."""
        with self._lock:
            there = step in self._own
            self._own.add(step)
        return not there

    def _job(
        self,
        step: int,
        plan: Plan,
        leaves: list[Any],
        extras: dict[str, Any],
        process_extras: dict[str, Any],
    ) -> Save:
        """A save, not yet begun."""
        self._meter = meter = Meter(f"saving step {step}", sum(plan.sizes))
        return Save(
            root=self.directory,
            step=step,
            number=next(self._numbers),
            token=self._token,
            plan=plan,
            values=python_values(plan, leaves),
            extras=extras,
            metrics={},
            process_extras=process_extras,
            meeting=self._meeting,
            syncer=self._syncer,
            budget=Budget(self.staging, meter.advance),
        )

    def _start(self, job: Save, leaves: list[Any]) -> SaveHandle:
        """Hands the staged state to the writer."""
        handle = SaveHandle(job.step)
        run = functools.partial(self._run, job, handle)
        with self._lock:
            self._in_flight.append(handle)
            IN_FLIGHT.add(self)
        if self._timer is not None:
            self._timer.saved()
        hand_over(job, leaves, handle, self._syncer, lambda: self._writer.submit(run))
        return handle

    def _run(self, job: Save, handle: SaveHandle) -> None:
        """A save from beginning to end, on the writer's thread."""
        shelf = self._shelf
        try:
            shelf.note(job.step, job.metrics, job.temporary)
            with showing(self._meter, "lines" if self._progress == "lines" else None):
                shelf.seen = job.run(self._after)
        except BaseException as error:
            if job.committed:
                shelf.seen = sorted({*shelf.seen, job.step})
                self._afterwards(job.step, "the other processes may not have heard of it", error)
                handle.committed.set_result(None)
                return
            self._own.discard(job.step)
            shelf.forget(job.step)
            failure = CheckpointSaveError(self.directory, job.step, error)
            failure.__cause__ = error
            self._fail(failure)
            handle.committed.set_exception(failure)
        else:
            self._expire(job.step)
            handle.committed.set_result(None)
        finally:
            with self._lock:
                self._in_flight.remove(handle)
                if not self._in_flight:
                    IN_FLIGHT.discard(self)

    def _after(self, step: int) -> list[int]:
        """The steps that stay, now that one more is committed: all, if they cannot be listed."""
        try:
            return self._shelf.after(step)
        except BaseException as error:
            self._afterwards(step, _NOT_DELETED, error)
            return sorted({*self._shelf.seen, step})

    def _expire(self, step: int) -> None:
        """Deletes what the keep policy lets go."""
        if not self._meeting.primary:
            return
        try:
            self._shelf.expire()
            at("expired")
        except BaseException as error:
            self._afterwards(step, _NOT_DELETED, error)

    def _afterwards(self, step: int, what: str, error: BaseException) -> None:
        """Keeps an error that came after the commit."""
        failure = CheckpointError(
            f"Step {step} is committed in {str(self.directory)!r}, but {what}: {error}."
        )
        failure.__cause__ = error
        self._fail(failure)

    def _fail(self, failure: CheckpointError) -> None:
        """Keeps an error for the next call, and tells who wants to hear of it now."""
        self._failure = failure
        if self.on_error is not None:
            try:
                self.on_error(failure)
            except BaseException as error:  # whoever waits for the save must hear its end
                failure.add_note(f"`on_error`, which was told of it, raised {error!r}.")

    def _raise_failure(self) -> None:
        """Raises the stored error of a background save, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        """Returns when no save is in flight; at once in `on_error`, which is a part of one."""
        for handle in tuple(self._in_flight):
            if not handle.committed.done() and not self._writer.here:
                with showing(self._meter, None if self._progress == "lines" else self._progress):
                    handle.committed.exception()

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

        A save in flight is waited for, unless a `step` is asked for that is committed: that is read
        while the save goes on, and not deleted meanwhile.

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
        if step is None or not self._shelf.has(step):
            self._settle()
        self._raise_failure()
        options = Options(cast, missing, extra, dict(rename or {}), include)
        wanted = None if step is None else operator.index(step)
        while (restored := self._restore(wanted, target, options, fallback)) is None:
            pass
        self._own.add(restored.step)
        return restored

    def _restore(
        self, wanted: int | None, target: Any, options: Options, fallback: bool
    ) -> Restored | None:
        """Restores a step; None if it was the latest, and somebody deletes it meanwhile."""
        with self._shelf.reading(lambda steps: _picked(steps, wanted, fallback)) as steps:
            call = next(self._calls)
            key = f"call/{call}"
            steps = self._meeting.agree(f"{key}/steps", steps, "choosing a step")
            chosen = _picked(steps, wanted, fallback)
            if not chosen:
                raise CheckpointNotFoundError(self.directory, wanted, steps)
            meter = Meter(f"restoring step {chosen[0]}")
            try:
                with showing(meter, self._progress):
                    restored = restore_step(
                        self.directory, chosen, target, options, self._meeting, key, meter
                    )
            except CheckpointReadError as error:
                # Who only looks on has no say in what the run keeps.
                there = self._meeting.agree(
                    f"{key}/there", self._shelf.has(chosen[0]), "looking for the step"
                )
                if there:
                    raise
                if wanted is not None:
                    raise CheckpointNotFoundError(
                        self.directory, wanted, self.all_steps()
                    ) from error
                return None
        self._forget_before(call)
        return restored

    def delete(self, step: int) -> None:
        """Deletes a committed step; raises CheckpointNotFoundError if it is not there."""
        self.wait()
        step, call = operator.index(step), next(self._calls)
        key = f"call/{call}"
        steps = self._meeting.agree(f"{key}/steps", self.all_steps(), "choosing a step")
        if step not in steps:
            raise CheckpointNotFoundError(self.directory, step, steps)
        self._meeting.together(f"{key}/begin", {}, f"deleting step {step}")
        if self._meeting.primary:
            self._shelf.folder.delete(step)
        self._meeting.together(f"{key}/end", {}, f"deleting step {step}")
        self._forget_before(call)
        self._own.discard(step)
        self._shelf.forget(step)

    def _forget_before(self, call: int) -> None:
        """Drops what was told in an earlier call: all have come to this one."""
        if self._meeting.primary:
            self._meeting.forget(f"call/{call - 1}")

    def close(self) -> None:
        """Waits for the save in flight and ends the threads; raises its error if it failed."""
        self._closed = True
        try:
            self.wait()
        finally:
            if self._preemption is not None:
                self._preemption.stop()
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


def _codec(asked: str | None, where: Place) -> str | None:
    if asked not in (None, "auto", *CODECS):
        raise ValueError(
            f"CheckpointManager: compression must be 'auto', 'zstd' or None, not {asked!r}."
        )
    remote = isinstance(where, StorePath)
    return (CODECS[0] if remote else None) if asked == "auto" else asked


def _timer(every: float | datetime.timedelta | None, meeting: Rendezvous) -> Timer | None:
    if isinstance(every, datetime.timedelta):
        every = every.total_seconds()
    return None if every is None else Timer(every, meeting)


def _picked(steps: list[int], step: int | None, fallback: bool) -> list[int]:
    """The steps to try, the best first; none if the one that is wanted is not there."""
    newest = max(steps, default=-1) if step is None else step
    if newest not in steps:
        return []
    return [s for s in reversed(steps) if s <= newest] if fallback else [newest]
