"""The small files that Orbax wants beside the arrays: its names for the leaves, and its marker."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardflax.ckpt.durable import FileRecord, sync_folder, write_file
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.plan import Stored

__all__ = [
    "EXTRAS",
    "JSON_FILE",
    "MARKER",
    "OURS",
    "STATE",
    "TREE",
    "write_item_files",
    "write_step_files",
]

STATE, EXTRAS = "state", "extras"
"""The items of a step, as Orbax calls them: the arrays, and JSON."""
JSON_FILE = "metadata"
MARKER = "_CHECKPOINT_METADATA"
TREE = "_METADATA"
_ARRAYS = "array_metadatas"
_HANDLERS = "orbax.checkpoint._src.handlers."
_ITEMS = {
    STATE: _HANDLERS + "pytree_checkpoint_handler.PyTreeCheckpointHandler",
    EXTRAS: _HANDLERS + "json_checkpoint_handler.JsonCheckpointHandler",
}
_DICT_KEY = 2
OURS = "shardflax.ckpt"
"""The key of the custom metadata that says that a MANIFEST.json belongs to the step."""


def write_item_files(
    folder: Path,
    stored: Sequence[Stored],
    scalars: Sequence[Stored],
    strings: Mapping[LeafPath, str],
) -> dict[str, FileRecord]:
    """Writes what describes the arrays in a folder; the files."""
    entries: dict[str, Any] = {}
    for leaf in stored:
        if leaf.public:
            # Without a target, Orbax then reads to the host, whatever devices there are.
            _add(entries, leaf.path, "np.ndarray", write_shape=list(leaf.chunk))
    for leaf in scalars:
        if leaf.public:
            _add(entries, leaf.path, "scalar")
    for path in strings:
        _add(entries, path, "string")
    tree = {
        "tree_metadata": entries,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    content: dict[str, Any] = {TREE: tree}
    if strings:
        content["_strings.json"] = {".".join(path): text for path, text in strings.items()}
    arrays = [_array(leaf) for leaf in stored if leaf.public and leaf.leaf.kind == "key"]
    if arrays:
        (folder / _ARRAYS).mkdir()
        content[f"{_ARRAYS}/process_0"] = {"array_metadatas": arrays}
    records = {
        name: write_file(folder / name, json.dumps(value).encode())
        for name, value in content.items()
    }
    if arrays:
        sync_folder(folder / _ARRAYS)
    return records


def _add(entries: dict[str, Any], path: LeafPath, kind: str, **more: Any) -> None:
    """One leaf, under the name that is a Python tuple in text."""
    entries[str(path)] = {
        "key_metadata": [{"key": part, "key_type": _DICT_KEY} for part in path],
        "value_metadata": {"value_type": kind, "skip_deserialize": False, **more},
    }


def _array(leaf: Stored) -> dict[str, Any]:
    """What Orbax must know about an array that is keys."""
    extra = {"random_key_impl": leaf.leaf.impl}
    return {
        "array_metadata": {
            "param_name": leaf.name,
            "write_shape": list(leaf.chunk),
            "chunk_shape": list(leaf.chunk),
            "ext_metadata": extra,
        }
    }


def write_step_files(
    folder: Path, extras: Mapping[str, Any], began: float
) -> dict[str, FileRecord]:
    """Writes the extras and Orbax's marker into the folder of a step; the files."""
    (folder / EXTRAS).mkdir()
    name = f"{EXTRAS}/{JSON_FILE}"
    records = {name: write_file(folder / name, json.dumps(extras).encode())}
    sync_folder(folder / EXTRAS)
    marker = {
        "item_handlers": _ITEMS,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": int(began * 1e9),
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {OURS: {"manifest": "MANIFEST.json"}},
    }
    records[MARKER] = write_file(folder / MARKER, json.dumps(marker).encode())
    return records
