"""Checkpoints: asynchronous, atomic, restored into the current layout."""

from shardflax.ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointFolderError,
    CheckpointLeafError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointReadError,
    CheckpointSaveError,
)
from shardflax.ckpt.manager import CheckpointManager, Restored

__all__ = [
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointFolderError",
    "CheckpointLeafError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointReadError",
    "CheckpointSaveError",
    "Restored",
]
