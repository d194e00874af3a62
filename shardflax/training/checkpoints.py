"""Checkpoints as Linen's programs save them: one file or folder a step, named by it.

With the flag `flax_use_orbax_checkpointing`, which is on unless said otherwise, a checkpoint is a
folder in Orbax's format; without, a MessagePack file.  Both are those of Flax, in both directions.
Programs that begin today use `shardflax.ckpt.CheckpointManager`: checked, asynchronous, and
restored under any layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from shardflax import config
from shardflax._files import sync_folder, write_file
from shardflax.core.checkpoint_errors import (
    AlreadyExistsError,
    InvalidCheckpointError,
    MPACheckpointingRequiredError,
    StepNotFoundError,
)
from shardflax.serialization import from_state_dict, msgpack_restore, msgpack_serialize
from shardflax.serialization import to_state_dict as _to_state_dict
from shardflax.training import multiprocess_arrays, orbax_folder
from shardflax.training.checkpoint_fit import check_fit, leaves_of
from shardflax.training.step_files import (
    REPLACED,
    StepFile,
    expire,
    natural_sort,
    safe_normpath,
    step_files,
)

__all__ = [
    "AsyncManager",
    "available_steps",
    "convert_pre_linen",
    "latest_checkpoint",
    "natural_sort",
    "restore_checkpoint",
    "safe_normpath",
    "save_checkpoint",
    "save_checkpoint_multiprocess",
]

config.define_bool_state(
    "flax_use_orbax_checkpointing",
    True,
    "Save checkpoints of training.checkpoints in Orbax's format, not as MessagePack files.",
)


class AsyncManager:
    """Saves in the background, one checkpoint after the other.

    A program that ends commits what it has begun.

    >>> import tempfile
    >>> folder, manager = tempfile.mkdtemp(), AsyncManager()
    >>> path = save_checkpoint(folder, {"w": np.ones(3)}, step=1, async_manager=manager)
    >>> manager.wait_previous_save()
    >>> available_steps(folder)
    [1]
    """

    def __init__(self, max_workers: int = 1) -> None:
        self.executor = ThreadPoolExecutor(max_workers, thread_name_prefix="shardflax-checkpoints")
        self.save_future: Future[Any] | None = None

    def wait_previous_save(self) -> None:
        """Returns when nothing is being saved; raises the error of the last save, once."""
        future, self.save_future = self.save_future, None
        if future is not None:
            future.result()

    def save_async(self, task: Callable[[], Any]) -> None:
        """Runs `task` in the background, after the one before it; raises the error of that."""
        self.wait_previous_save()
        self.save_future = self.executor.submit(task)


@dataclasses.dataclass(frozen=True)
class _Save:
    """One checkpoint to be written, and what is to be deleted for it then."""

    folder: Path
    name: str
    step: float
    prefix: str
    keep: int
    overwrite: bool
    keep_every: float | None

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def temporary(self) -> Path:
        return self.folder / f".{self.name}.unfinished"

    def files(self) -> list[StepFile]:
        return step_files(self.folder, self.prefix)

    def check(self) -> None:
        """Raises unless the step is later than all that are there, or may replace them."""
        latest = max((file.step for file in self.files()), default=float("-inf"))
        if self.step <= latest and not self.overwrite:
            raise InvalidCheckpointError(str(self.path), self.step)

    def commit(self) -> None:
        """Puts what was written in its place, whole; only then is anything deleted."""
        before = self.path.with_name(f".{self.name}{REPLACED}")
        if self.path.exists():
            if not self.overwrite:
                raise AlreadyExistsError(str(self.path))
            StepFile(before, "").delete()  # left by a save that was killed
            # Between these two lines, and if we are killed there, it is found under this name.
            os.replace(self.path, before)
        os.replace(self.temporary, self.path)
        sync_folder(self.folder)
        StepFile(before, "").delete()
        self.clean()

    def clean(self) -> None:
        """Deletes later steps if this one overwrites them, and earlier ones by the policy."""
        files = self.files()
        if self.overwrite:
            for file in files:
                if file.step > self.step:
                    file.delete()
            files = [file for file in files if file.step <= self.step]
        for file in expire(files, self.keep, self.keep_every):
            file.delete()


def _new_save(
    ckpt_dir: Any, step: Any, prefix: str, keep: int, overwrite: bool, keep_every: Any
) -> _Save:
    """The plan of a save; makes the folder."""
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep must be at least 1, not {keep}.")
    step = step.item() if hasattr(step, "item") else step
    path = Path(_local(ckpt_dir, f"{prefix}{step}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    start = path.name[: -len(str(step))]
    return _Save(path.parent, path.name, step, start, keep, overwrite, keep_every)


def _shown(ckpt_dir: Any, name: str) -> str:
    """The path of a checkpoint in the folder as it was given, be that relative."""
    return safe_normpath(os.path.join(os.fspath(ckpt_dir), name))


def _local(ckpt_dir: Any, name: str = "") -> str:
    """A path of a file system, absolute."""
    path = _shown(ckpt_dir, name)
    if "://" in path:
        raise ValueError(
            f"{path!r}: training.checkpoints saves to file systems. Mount the object store, or "
            f"use shardflax.ckpt.CheckpointManager."
        )
    return os.path.abspath(os.path.expanduser(path))


def save_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    target: Any,
    step: float,
    prefix: str = "checkpoint_",
    keep: int = 1,
    overwrite: bool = False,
    keep_every_n_steps: int | None = None,
    async_manager: AsyncManager | None = None,
    orbax_checkpointer: Any = None,
) -> str:
    """Saves `target`, of one process, as `ckpt_dir/{prefix}{step}`; returns that path.

    The last `keep` steps stay, and of the earlier ones each that is `keep_every_n_steps` after the
    one kept before it.  `overwrite` lets a step replace itself and delete later ones.  With an
    `async_manager`, or an asynchronous `orbax_checkpointer`, the checkpoint is there when that is
    done.  What is there is always whole, and nothing is deleted before the new step is.

    Raises `InvalidCheckpointError` for a step that is not later than all others,
    `AlreadyExistsError` if another program saves the same, TypeError for leaves that cannot be
    written.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> for step in (1, 2, 3):
    ...     path = save_checkpoint(folder, {"w": np.full(2, step)}, step, keep=2)
    >>> available_steps(folder), restore_checkpoint(folder, None)["w"].tolist()
    ([2, 3], [3, 3])
    """
    save = _new_save(ckpt_dir, step, prefix, keep, overwrite, keep_every_n_steps)
    if any(multiprocess_arrays.spans_processes(leaf) for leaf in jax.tree.leaves(target)):
        raise MPACheckpointingRequiredError(str(save.path), step)
    _save(save, target, async_manager, None, orbax_checkpointer, together=False)
    return _shown(ckpt_dir, save.name)


def save_checkpoint_multiprocess(
    ckpt_dir: str | os.PathLike[str],
    target: Any,
    step: float,
    prefix: str = "checkpoint_",
    keep: int = 1,
    overwrite: bool = False,
    keep_every_n_steps: int | None = None,
    async_manager: AsyncManager | None = None,
    gda_manager: Any = None,
    orbax_checkpointer: Any = None,
) -> str:
    """Saves a target of several processes in a folder that they share; all of them call this.

    As `save_checkpoint`; process 0 writes and deletes what is not an array of several processes.
    Such arrays Orbax writes, or, without it, JAX's `GlobalAsyncCheckpointManager` as
    `gda_manager`, in the background: the checkpoint is there when it is finished.

    Raises also `MPACheckpointingRequiredError` for such arrays without a manager.

    >>> import tempfile
    >>> path = save_checkpoint_multiprocess(tempfile.mkdtemp(), {"w": np.ones(2)}, 5)
    >>> os.path.basename(path)
    'checkpoint_5'
    """
    save = _new_save(ckpt_dir, step, prefix, keep, overwrite, keep_every_n_steps)
    _save(save, target, async_manager, gda_manager, orbax_checkpointer, together=True)
    return _shown(ckpt_dir, save.name)


def _save(
    save: _Save, target: Any, manager: Any, arrays_manager: Any, checkpointer: Any, together: bool
) -> None:
    """Writes one checkpoint in the format that is asked for."""
    if manager is not None:
        manager.wait_previous_save()
    if checkpointer is not None:
        orbax_folder.wait(checkpointer)
    if arrays_manager is not None:
        arrays_manager.wait_until_finished()
    save.check()
    if together:
        _barrier("shardflax.training.checkpoints.checked")
    state = _to_state_dict(target)
    if checkpointer is not None:
        orbax_folder.save_with(checkpointer, save.path, state, save.overwrite, save.clean)
    elif config.flax_use_orbax_checkpointing and arrays_manager is None:
        _save_folder(save, state, manager, together)
    else:
        _save_file(save, state, manager, arrays_manager, together)


def _save_folder(save: _Save, state: Any, manager: AsyncManager | None, together: bool) -> None:
    """Writes a folder in Orbax's format."""

    def write(state: Any) -> None:
        with _unfinished(save):
            orbax_folder.write(save.temporary, state, together)
            if not together or jax.process_index() == 0:
                save.commit()
        if together:
            _barrier("shardflax.training.checkpoints.committed")

    if manager is None:
        write(state)
    else:
        held = _on_host(state, save)  # the caller may donate its arrays
        manager.save_async(lambda: write(held))


def _save_file(
    save: _Save, state: Any, manager: AsyncManager | None, arrays_manager: Any, together: bool
) -> None:
    """Writes a MessagePack file, and arrays of several processes beside it."""
    rest, arrays = multiprocess_arrays.take_out(state)
    if arrays and arrays_manager is None:
        raise MPACheckpointingRequiredError(str(save.path), save.step)
    first = not together or jax.process_index() == 0

    def commit() -> None:
        if first:
            with _unfinished(save):
                write_file(save.temporary, msgpack_serialize(held, in_place=True), "wb")
                save.commit()

    held = _on_host(rest, save) if first else None
    if arrays:
        multiprocess_arrays.save_arrays(arrays, str(save.path), arrays_manager, commit)
    elif manager is not None:
        manager.save_async(commit)
    else:
        commit()
        if together:
            _barrier("shardflax.training.checkpoints.committed")


def _barrier(name: str) -> None:
    """Waits until all processes are here; nothing if there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def _unfinished(save: _Save) -> Generator[None]:
    """Removes what a failed save left, and what one left that was killed."""
    _remove_temporary(save)
    try:
        yield
    except BaseException:
        _remove_temporary(save)
        raise


def _remove_temporary(save: _Save) -> None:
    if jax.process_index() == 0:
        name = glob.escape(save.temporary.name)
        for path in save.folder.glob(f"{name}*"):  # Orbax adds to the name
            StepFile(path, "").delete()


def _on_host(state: Any, save: _Save) -> Any:
    """A copy of a state dict in host memory."""
    if isinstance(state, dict):
        return {key: _on_host(value, save) for key, value in state.items()}
    if multiprocess_arrays.spans_processes(state):
        raise MPACheckpointingRequiredError(str(save.path), save.step)
    is_key = isinstance(state, jax.Array) and jnp.issubdtype(state.dtype, jax.dtypes.prng_key)
    if isinstance(state, jax.Array | np.ndarray) and not is_key:
        return np.array(state)
    return state


# --- restoring


def available_steps(
    ckpt_dir: str | os.PathLike[str],
    prefix: str = "checkpoint_",
    step_type: type = int,
) -> list[int | float]:
    """The steps that a folder holds, in order.

    Raises ValueError for steps that are no `step_type`.

    >>> available_steps("/not/there")
    []
    """
    return [step_type(file.number) for file in step_files(_local(ckpt_dir), prefix)]


def latest_checkpoint(ckpt_dir: str | os.PathLike[str], prefix: str = "checkpoint_") -> str | None:
    """The path of the checkpoint with the highest step, or None.

    >>> latest_checkpoint("/not/there") is None
    True
    """
    files = step_files(_local(ckpt_dir), prefix)
    return os.path.join(os.fspath(ckpt_dir), files[-1].path.name) if files else None


def restore_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    target: Any,
    step: float | None = None,
    prefix: str = "checkpoint_",
    parallel: bool = True,
    gda_manager: Any = None,
    allow_partial_mpa_restoration: bool = False,
    orbax_checkpointer: Any = None,
    orbax_transforms: dict[str, Any] | None = None,
) -> Any:
    """A copy of `target` with what a checkpoint holds; or, for None, nested dicts of numpy arrays.

    `ckpt_dir` is a folder of checkpoints, of which the highest step is taken or the given one, or
    a checkpoint itself.  Of an Orbax checkpoint, a `jax.Array` (or a `jax.ShapeDtypeStruct` with a
    sharding) in the target is restored in its sharding, whatever wrote it.  If there is no
    checkpoint, `target` is returned as it is.

    Nothing is cast or left unrestored: raises `CheckpointTargetError` with every leaf of the target
    that is missing or differs in shape or dtype (and warns of what the target has no place for);
    `StepNotFoundError`; for arrays of several processes, the `MPA` errors.  `parallel` is taken
    and not needed.

    >>> restore_checkpoint("/not/there", {"w": 0})
    {'w': 0}
    """
    del parallel  # one read of a file is as fast
    if orbax_checkpointer is not None:
        orbax_folder.wait(orbax_checkpointer)
    path = _to_restore(ckpt_dir, step, prefix)
    if path is None:
        return target
    like = None if target is None else _to_state_dict(target)
    if os.path.isdir(path):
        state = orbax_folder.read(path, like, orbax_checkpointer, orbax_transforms)
    else:
        state = msgpack_restore(Path(path).read_bytes())
        partial = allow_partial_mpa_restoration
        state = multiprocess_arrays.fill_in(state, like, path, step, gda_manager, partial)
        if target is not None:
            saved = dict(leaves_of(state))
            left_out = {n for n, v in saved.items() if multiprocess_arrays.mark_of(v)}
            check_fit(path, saved, {n: v for n, v in leaves_of(like) if n not in left_out})
    return state if target is None else from_state_dict(target, state)


def _to_restore(ckpt_dir: Any, step: Any, prefix: str) -> str | None:
    """The checkpoint that is meant, or None if there is none."""
    folder = _local(ckpt_dir)
    if step is not None:
        path = _local(folder, f"{prefix}{step}")
        if os.path.exists(path):
            return path
        files = step_files(folder, prefix)
        if replaced := next((file.path for file in files if file.number == f"{step}"), None):
            return str(replaced)
        raise StepNotFoundError(path, [file.number for file in files])
    if os.path.isfile(folder) or orbax_folder.is_one(folder):
        return folder
    return latest_checkpoint(folder, prefix)


# --- before Linen

_NUMBERED = re.compile(r"(.*)_(\d+)")


def convert_pre_linen(params: Any) -> Any:
    """Parameters with the names of Linen, from those of the API before it.

    There, one count went through all submodules of a module; here, each class has its own.  Names
    that are Linen's already stay.

    >>> convert_pre_linen({"Conv_0": {"kernel": 1}, "Dense_1": {"kernel": 2}})
    {'Conv_0': {'kernel': 1}, 'Dense_0': {'kernel': 2}}
    """
    if not isinstance(params, dict) and not hasattr(params, "items"):
        return params
    counts, renamed = dict[str, int](), dict[str, Any]()
    for name in natural_sort(params):
        found = _NUMBERED.fullmatch(name)
        new = name
        if found:
            base = found[1]
            new = f"{base}_{counts.get(base, 0)}"
            counts[base] = counts.get(base, 0) + 1
        renamed[new] = convert_pre_linen(params[name])
    return renamed
