"""The small files that Orbax wants beside the arrays: its names for the leaves, and its marker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardflax.ckpt.durable import FileRecord, sync_folder, write_file
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.paths import Tree, is_text
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
_INDEX, _DICT_KEY = 1, 2
"""What Orbax calls the kinds of a key: in lists and tuples, and in all else."""
_EMPTY = ((dict, "Dict"), (list, "List"))
OURS = "shardflax.ckpt"
"""The key of the custom metadata that says that a MANIFEST.json belongs to the step."""


def write_item_files(
    folder: Path,
    stored: Sequence[Stored],
    scalars: Sequence[Stored],
    strings: Mapping[LeafPath, str],
    tree: Tree,
) -> dict[str, FileRecord]:
    """Writes what describes the arrays in a folder; the files."""
    strings = {path: text for path, text in strings.items() if is_text(text)}
    values = _values(stored, scalars, strings, tree)
    about = {
        "tree_metadata": _entries(values, tree),
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    content: dict[str, Any] = {TREE: about}
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


def _values(
    stored: Sequence[Stored], scalars: Sequence[Stored], strings: Iterable[LeafPath], tree: Tree
) -> dict[LeafPath, dict[str, Any]]:
    """What Orbax is told of each leaf that it can read, of None and of empty containers."""
    found: dict[LeafPath, dict[str, Any]] = {}
    for leaf in stored:
        if leaf.public:
            # Without a target, Orbax then reads to the host, whatever devices there are.
            found[leaf.path] = _kind("np.ndarray", write_shape=list(leaf.chunk))
    for leaf in scalars:
        if leaf.public:  # of complex numbers, Orbax knows only arrays
            complex_ = leaf.dtype.kind == "c"
            found[leaf.path] = _kind("np.ndarray", write_shape=[]) if complex_ else _kind("scalar")
    found |= {path: _kind("string") for path in strings}
    found |= {path: _kind("None", skip=True) for path in tree.nones}
    found |= {path: _kind(_empty(x), skip=True) for path, x in tree.empty.items()}
    return found


def _kind(name: str, skip: bool = False, **more: Any) -> dict[str, Any]:
    return {"value_type": name, "skip_deserialize": skip, **more}


def _empty(node: Any) -> str:
    """What Orbax calls an empty container; named tuples are None there."""
    known = (name for kind, name in _EMPTY if isinstance(node, kind))
    return next(known, "Tuple" if type(node) is tuple else "None")


def _entries(values: Mapping[LeafPath, dict[str, Any]], tree: Tree) -> dict[str, Any]:
    """The values under their names (Python tuples in text), with the kind of each key.

    A list of which Orbax cannot read all would be no list without the rest, so it is a dict.
    """
    there = {path[:i] for path in values for i in range(1, len(path) + 1)}
    gaps = {path[:-1] for path in tree.items - there}
    return {
        str(path): {
            "key_metadata": [
                {"key": part, "key_type": _INDEX if _indexed(path[:i], tree, gaps) else _DICT_KEY}
                for i, part in enumerate(path, 1)
            ],
            "value_metadata": value,
        }
        for path, value in values.items()
    }


def _indexed(path: LeafPath, tree: Tree, gaps: set[LeafPath]) -> bool:
    return path in tree.items and path[:-1] not in gaps


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
