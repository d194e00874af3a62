"""Saving a run's state in the background, and restoring it into the current layout."""

from __future__ import annotations

import atexit
import dataclasses
import operator
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from shardflax.ckpt import processes, restore
from shardflax.ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointLeafError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointReadError,
    CheckpointSaveError,
)
from shardflax.ckpt.folder import EXTRAS, JSON_FILE, MANIFEST, STATE, StepFolder, expired
from shardflax.ckpt.leaves import store
from shardflax.ckpt.manifest import Manifest, check_json
from shardflax.ckpt.paths import check_names, leaves_by_path, nest
from shardflax.ckpt.quiet import quiet_orbax

__all__ = ["CheckpointManager", "Restored"]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held: its step, the state, and the extras saved with it.

    >>> Restored(10, {"w": 1.0}, {"epoch": 2}).extras["epoch"]
    2
    """

    step: int
    state: Any
    extras: dict[str, Any]


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
      read_only: for a second program that looks on: nothing is written, tested or cleaned up.
      timeout: seconds that processes wait for one another in a save.

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
        read_only: bool = False,
        timeout: int = 600,
    ) -> None:
        for name, value in (("keep", keep), ("save_every", save_every), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"CheckpointManager: {name} must be at least 1, not {value}.")
        self.keep, self.save_every, self.keep_every = keep, save_every, keep_every
        self.read_only = read_only
        self._folder = StepFolder(_local_path(directory))
        self._own: set[int] = set()
        self._pending: tuple[int, threading.Thread] | None = None
        self._failure: CheckpointError | None = None
        if not read_only:
            self._folder.prepare()
            processes.check_shared(self._folder.root)
            if processes.is_primary():
                self._folder.clean()
            processes.barrier("shardflax.ckpt.clean")
        with quiet_orbax():
            self._orbax = ocp.AsyncCheckpointer(
                _handler(),
                async_options=ocp.AsyncOptions(
                    timeout_secs=timeout,
                    # Otherwise a failure there leaves threads behind that wait for minutes.
                    create_directories_asynchronously=False,
                ),
            )
        _commit_at_exit(self)

    @property
    def directory(self) -> Path:
        """The folder, as an absolute path."""
        return self._folder.root

    @property
    def pending_step(self) -> int | None:
        """The step that is being saved, or None."""
        pending = self._pending
        return pending[0] if pending and pending[1].is_alive() else None

    def all_steps(self) -> list[int]:
        """The committed steps, in order, as this process sees the folder."""
        return self._folder.steps()

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.all_steps(), default=None)

    def is_due(self, step: int) -> bool:
        """True if `save(step, ...)` would save without `force`."""
        return step % self.save_every == 0 and step not in self._own

    def save(
        self,
        step: int,
        state: Any,
        *,
        extras: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts saving a state; returns whether it did.

        False means that `save_every` does not divide the step (`force` ignores that) or that this
        run saved or restored the step already.  On return the state may be donated or changed.

        `state` is a pytree of arrays, typed PRNG keys and numbers; static fields are not stored.
        `extras` is JSON, committed together with the state.

        Raises the error of an earlier background save; CheckpointLeafError for a leaf that cannot
        be stored; CheckpointExistsError for a step that another run wrote; CheckpointSaveError if
        the save cannot start.

        >>> import tempfile
        >>> with CheckpointManager(tempfile.mkdtemp(), save_every=10) as manager:
        ...     [manager.save(step, {"step": step}) for step in (5, 10, 10)]
        [False, True, False]
        """
        self._raise_failure()
        step = operator.index(step)
        if self.read_only:
            raise CheckpointSaveError(self.directory, step, "the manager is read_only")
        if step < 0:
            raise ValueError(f"CheckpointManager.save: step must not be negative, got {step}.")
        if step in self._own or not (force or self.is_due(step)):
            return False
        if self._folder.is_committed(step):
            raise CheckpointExistsError(self.directory, step)
        args = _save_args(state, check_json(dict(extras or {})))
        self.wait()
        self._start(step, args)
        return True

    def _start(self, step: int, args: ocp.args.Composite) -> None:
        """Begins the save and a thread that sees it through."""
        try:
            with quiet_orbax():
                self._orbax.save(self._folder.step(step), args=args)
        except Exception as error:
            self._discard(step)
            raise CheckpointSaveError(self.directory, step, error) from error
        self._own.add(step)
        thread = threading.Thread(
            target=self._finish, args=(step,), name=f"shardflax-save-{step}", daemon=True
        )
        self._pending = (step, thread)
        thread.start()

    def _finish(self, step: int) -> None:
        """Waits for the commit, then applies the keep policy; errors are kept for the next call."""
        try:
            with quiet_orbax():
                self._orbax.wait_until_finished()
            if processes.is_primary() and not self._folder.is_committed(step):
                raise FileNotFoundError("its folder vanished while it was written")
        except BaseException as error:
            self._own.discard(step)
            self._discard(step)
            self._failure = CheckpointSaveError(self.directory, step, error)
            self._failure.__cause__ = error
            return
        try:
            self._expire()
        except (OSError, CheckpointError) as error:
            self._failure = CheckpointError(
                f"Step {step} is committed in {str(self.directory)!r}, but an older step could not "
                f"be deleted: {error}."
            )
            self._failure.__cause__ = error

    def _expire(self) -> None:
        """Deletes what the keep policy lets go."""
        if processes.is_primary():
            for step in expired(self._folder.steps(), self.keep, self.keep_every):
                self._folder.delete(step)

    def _discard(self, step: int) -> None:
        """Removes the unfinished folder of a failed save, so that it does not fill the disk."""
        if processes.is_primary():
            self._folder.clean(step)

    def _raise_failure(self) -> None:
        """Raises the stored error of a background save, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Returns when no save is in flight; raises the error of the last one, if it failed."""
        pending = self._pending
        if pending is not None:
            pending[1].join()
            self._pending = None
        self._raise_failure()

    def restore(self, target: Any, step: int | None = None) -> Restored:
        """Reads a step (the latest by default) into the types and layout of `target`.

        `target` is a pytree like the saved one, of arrays or of `jax.ShapeDtypeStruct`s with
        shardings; which devices and processes wrote the step does not matter.  Boxes may be in
        either or both.  Leaves come back as what they are in the target: a committed JAX array in
        its sharding, a numpy array on the host, a Python number.

        Raises CheckpointNotFoundError; CheckpointMismatchError, before any array is read, with
        every leaf that is missing, left over, or of another shape or dtype (nothing is cast);
        CheckpointReadError if the step is damaged; the error of an earlier background save.

        >>> import tempfile, jax, jax.numpy as jnp
        >>> manager = CheckpointManager(tempfile.mkdtemp())
        >>> manager.save(1, {"w": jnp.ones(2)})
        True
        >>> manager.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}).state["w"].tolist()
        [1.0, 1.0]
        """
        self.wait()
        step = self._choose(step)
        try:
            manifest = Manifest.from_json(self._folder.json(step, MANIFEST))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointReadError(self.directory, step, error) from error
        plan, differences = restore.plan(manifest, target)
        if differences:
            raise CheckpointMismatchError(self.directory, step, differences)
        extras = self._folder.json(step, EXTRAS)
        try:
            with quiet_orbax():
                read = self._orbax.restore(
                    self._folder.step(step),
                    args=ocp.args.Composite(**{STATE: plan.restore_args()}),
                )
            state = plan.assemble(read[STATE])
        except Exception as error:
            raise CheckpointReadError(self.directory, step, error) from error
        self._own.add(step)
        return Restored(step, state, extras)

    def _choose(self, step: int | None) -> int:
        """The step to restore: process 0's latest, or the given one if it is committed."""
        steps = self._folder.steps()
        chosen = processes.agree(max(steps, default=-1)) if step is None else operator.index(step)
        if chosen not in steps:
            raise CheckpointNotFoundError(self.directory, step, steps)
        return chosen

    def delete(self, step: int) -> None:
        """Deletes a committed step; raises CheckpointNotFoundError if it is not there."""
        self.wait()
        step = self._choose(step)
        processes.barrier("shardflax.ckpt.delete")
        if processes.is_primary():
            self._folder.delete(step)
        processes.barrier("shardflax.ckpt.deleted")
        self._own.discard(step)

    def close(self) -> None:
        """Waits for the save in flight and ends the threads; raises its error if it failed."""
        try:
            self.wait()
        finally:
            with quiet_orbax():
                self._orbax.close()

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


def _handler() -> ocp.CompositeCheckpointHandler:
    """The writers of the items of a step, in the format that stock Orbax reads."""
    return ocp.CompositeCheckpointHandler(
        **{
            STATE: ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False),
            MANIFEST: ocp.JsonCheckpointHandler(filename=JSON_FILE[MANIFEST]),
            EXTRAS: ocp.JsonCheckpointHandler(filename=JSON_FILE[EXTRAS]),
        }
    )


def _save_args(state: Any, extras: dict[str, Any]) -> ocp.args.Composite:
    """What Orbax is to write; raises CheckpointLeafError."""
    manifest = Manifest.of(state)
    leaves = leaves_by_path(state)
    stored = {
        path: store(path, leaves[path]) for path, spec in manifest.leaves.items() if spec.on_disk
    }
    check_names(stored)
    if not stored:
        raise CheckpointLeafError("", "the state has no array with elements", "Save a state.")
    return ocp.args.Composite(
        **{
            STATE: ocp.args.PyTreeSave(nest(stored)),
            MANIFEST: ocp.args.JsonSave(manifest.to_json()),
            EXTRAS: ocp.args.JsonSave(extras),
        }
    )


def _commit_at_exit(manager: CheckpointManager) -> None:
    """Lets a program that ends without `wait` commit its last save.

    A plain atexit hook runs after the thread pools that Orbax writes with are shut down, so the
    hook goes where `concurrent.futures` puts its own; hooks there run in reverse order.
    """
    register = getattr(threading, "_register_atexit", atexit.register)
    register(_wait_at_exit, weakref.ref(manager))


def _wait_at_exit(ref: weakref.ref[CheckpointManager]) -> None:
    """Waits for the save in flight; a failure can only be printed."""
    manager = ref()
    if manager is None:
        return
    try:
        manager.wait()
    except Exception:
        print("The last checkpoint was lost at exit; call close() to be sure:", file=sys.stderr)
        traceback.print_exc()
