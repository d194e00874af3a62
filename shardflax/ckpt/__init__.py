"""Checkpoints: asynchronous, atomic, verified, restored into the current layout."""

from shardflax.ckpt.compare import Comparison, Unlike, compare_checkpoints
from shardflax.ckpt.convert import Converted, convert_checkpoint
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
from shardflax.ckpt.inspect import (
    CheckpointInfo,
    LeafInfo,
    StepInfo,
    inspect_checkpoint,
    list_steps,
)
from shardflax.ckpt.leftovers import Leftover, find_leftovers, remove_leftovers
from shardflax.ckpt.manager import CheckpointManager
from shardflax.ckpt.match import Options, Report
from shardflax.ckpt.msgpack_files import load_msgpack, save_msgpack
from shardflax.ckpt.place import StorePath
from shardflax.ckpt.reading import Restored, load_checkpoint
from shardflax.ckpt.remote import StoreFolder as _StoreFolder  # noqa: F401  tells the rest
from shardflax.ckpt.remote_writer import RemoteWriter as _RemoteWriter  # noqa: F401
from shardflax.ckpt.safetensors_files import load_safetensors, save_safetensors
from shardflax.ckpt.verify import Verification, verify_checkpoint

__all__ = [
    "CheckpointAbortedError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointFolderError",
    "CheckpointInfo",
    "CheckpointLeafError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointPeerError",
    "CheckpointReadError",
    "CheckpointSaveError",
    "Comparison",
    "Converted",
    "LeafInfo",
    "Leftover",
    "Options",
    "Report",
    "Restored",
    "SaveHandle",
    "StepInfo",
    "StorePath",
    "Unlike",
    "Verification",
    "compare_checkpoints",
    "convert_checkpoint",
    "find_leftovers",
    "inspect_checkpoint",
    "list_steps",
    "load_checkpoint",
    "load_msgpack",
    "load_safetensors",
    "remove_leftovers",
    "save_msgpack",
    "save_safetensors",
    "verify_checkpoint",
]
