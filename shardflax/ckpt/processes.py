"""What the processes of one run must agree on about their checkpoint folder."""

from __future__ import annotations

import secrets
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from shardflax.ckpt.errors import CheckpointFolderError

__all__ = ["agree", "barrier", "check_shared", "is_primary"]


def is_primary() -> bool:
    """True in the process that commits, deletes and decides (process 0).

    >>> is_primary()
    True
    """
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here; nothing if there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """Process 0's value, in every process.

    >>> agree(7)
    7
    """
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_shared(root: Path) -> None:
    """Proves that all processes see one folder: process 0 leaves a mark, the others look for it.

    Raises CheckpointFolderError in each process that does not see it, and in process 0 then too.
    """
    if jax.process_count() == 1:
        return
    token = agree(secrets.randbits(31))
    mark = root / f".shared-test-{token}"
    if is_primary():
        mark.touch()
    barrier("shardflax.ckpt.mark")
    seen = multihost_utils.process_allgather(np.int32(mark.exists()))
    if is_primary():
        mark.unlink(missing_ok=True)
    blind = np.flatnonzero(np.asarray(seen).ravel() == 0).tolist()
    if blind:
        raise CheckpointFolderError(
            root,
            f"processes {', '.join(map(str, blind))} do not see what process 0 writes there",
            "Give a folder on a file system that all hosts share.",
        )
