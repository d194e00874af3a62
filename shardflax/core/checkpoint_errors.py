"""Errors of the `training.checkpoints` API, by the names of Linen's catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardflax.core.errors import FlaxError

__all__ = [
    "AlreadyExistsError",
    "CheckpointTargetError",
    "InvalidCheckpointError",
    "MPACheckpointingRequiredError",
    "MPARestoreDataCorruptedError",
    "MPARestoreTargetRequiredError",
    "MPARestoreTypeNotMatchError",
    "StepNotFoundError",
]


class AlreadyExistsError(FlaxError):
    """A file that another program wrote while this one was writing its own of that name.

    >>> print(AlreadyExistsError("/ckpt/checkpoint_3"))
    '/ckpt/checkpoint_3' appeared while it was being saved: another program saves to this folder...
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path!r} appeared while it was being saved: another program saves to this folder. "
            f"Nothing of it was changed. Give each its own folder or prefix, or pass "
            f"overwrite=True."
        )


class InvalidCheckpointError(FlaxError, ValueError):
    """A step that is not later than what the folder holds already.

    >>> print(InvalidCheckpointError("/ckpt/checkpoint_3", 3))
    step 3 would be saved as '/ckpt/checkpoint_3', but the folder holds a checkpoint of this or...
    """

    def __init__(self, path: str, step: float) -> None:
        super().__init__(
            f"step {step} would be saved as {path!r}, but the folder holds a checkpoint of this or "
            f"a later step. Save a later one, or pass overwrite=True: it replaces this step and "
            f"deletes later ones."
        )


class StepNotFoundError(FlaxError, ValueError):
    """The step that is asked for is not there.

    >>> print(StepNotFoundError("/ckpt/checkpoint_7", ["3", "5"]))
    no checkpoint at '/ckpt/checkpoint_7'; the folder holds the steps 3, 5.
    """

    def __init__(self, path: str, steps: Sequence[str]) -> None:
        held = f"the steps {', '.join(steps)}" if steps else "none of this prefix"
        super().__init__(f"no checkpoint at {path!r}; the folder holds {held}.")


class CheckpointTargetError(FlaxError, ValueError):
    """A checkpoint holds something else than the target asks for.

    >>> print(CheckpointTargetError("/ckpt/checkpoint_3", ["w: saved (3,), target (4,)"]))
    the checkpoint '/ckpt/checkpoint_3' does not fit its target:
      w: saved (3,), target (4,)
    Restore with target=None for what was saved, change that, and use from_state_dict.
    """

    def __init__(self, path: str, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        lines = "".join(f"\n  {line}" for line in differences)
        super().__init__(
            f"the checkpoint {path!r} does not fit its target:{lines}\nRestore with target=None "
            f"for what was saved, change that, and use from_state_dict."
        )


class MPACheckpointingRequiredError(FlaxError):
    """Arrays of which other processes hold parts need a `gda_manager`.

    >>> print(MPACheckpointingRequiredError("/ckpt/checkpoint_3", 3))
    step 3, '/ckpt/checkpoint_3': an array spans several processes. Pass gda_manager=...
    """

    def __init__(self, path: str, step: Any) -> None:
        super().__init__(
            f"step {step}, {path!r}: an array spans several processes. Pass gda_manager="
            f"GlobalAsyncCheckpointManager() (jax.experimental.array_serialization) to "
            f"save_checkpoint_multiprocess and restore_checkpoint, or use "
            f"shardflax.ckpt.CheckpointManager."
        )


class MPARestoreTargetRequiredError(FlaxError):
    """Arrays of several processes are restored into arrays that say their sharding.

    >>> print(MPARestoreTargetRequiredError("/ckpt/checkpoint_3", 3, "params/w"))
    step 3, '/ckpt/checkpoint_3': 'params/w' was saved as an array of several processes. The ...
    """

    def __init__(self, path: str, step: Any, key: str | None = None) -> None:
        what = "a leaf" if key is None else repr(key)
        super().__init__(
            f"step {step}, {path!r}: {what} was saved as an array of several processes. The "
            f"target must hold a jax.Array or a ShapeDtypeStruct with a sharding there; or pass "
            f"allow_partial_mpa_restoration=True to leave it out."
        )


class MPARestoreDataCorruptedError(FlaxError):
    """The arrays of several processes that a checkpoint refers to are not there, or not whole.

    >>> print(MPARestoreDataCorruptedError(3, "/ckpt/checkpoint_3_gda/w"))
    step 3: '/ckpt/checkpoint_3_gda/w' is missing or damaged. Restore an earlier step.
    """

    def __init__(self, step: Any, path: str) -> None:
        super().__init__(f"step {step}: {path!r} is missing or damaged. Restore an earlier step.")


class MPARestoreTypeNotMatchError(FlaxError):
    """An array of several processes has another shape than its target.

    >>> print(MPARestoreTypeNotMatchError(3, "/ckpt/checkpoint_3_gda/w", "(4,)", "(8,)"))
    step 3: '/ckpt/checkpoint_3_gda/w' holds (4,), and its target is (8,). ...
    """

    def __init__(self, step: Any, gda_path: str, found: str = "", expected: str = "") -> None:
        said = f" holds {found}, and its target is {expected}" if found else " is of another type"
        super().__init__(
            f"step {step}: {gda_path!r}{said}. Restore it with a target like what was saved."
        )
