"""Checkpoints: asynchronous, atomic, verified, restored into the current layout."""

from shardflax.ckpt.errors import (
    CheckpointAbortedError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointFolderError,
    CheckpointLeafError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointPeerError,
    CheckpointReadError,
    CheckpointSaveError,
)
from shardflax.ckpt.handle import SaveHandle
from shardflax.ckpt.manager import CheckpointManager
from shardflax.ckpt.match import Options, Report
from shardflax.ckpt.reading import Restored, load_checkpoint

__all__ = [
    "CheckpointAbortedError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointFolderError",
    "CheckpointLeafError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointPeerError",
    "CheckpointReadError",
    "CheckpointSaveError",
    "Options",
    "Report",
    "Restored",
    "SaveHandle",
    "load_checkpoint",
]
