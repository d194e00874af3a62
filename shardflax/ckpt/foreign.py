"""Steps that Orbax wrote, by itself or for the first format of this library.

Read through TensorStore: OCDBT databases and plain folders, zarr of version 2 and 3.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from shardflax.ckpt.leaves import LeafSpec, key_words
from shardflax.ckpt.orbax_files import TREE
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.regions import Box
from shardflax.ckpt.sources import Later, LeafDataError, Source, context

__all__ = ["OrbaxSource", "find_item", "first_format", "open_orbax"]

_ITEMS = ("state", "default", "pytree", "params", "items")
"""Where people keep their arrays, the likeliest first."""


def find_item(folder: Path) -> Path | None:
    """The folder of the arrays in a step: itself, or the item that is a tree.

    >>> import tempfile
    >>> find_item(Path(tempfile.mkdtemp())) is None
    True
    """
    if (folder / TREE).is_file():
        return folder
    found = [path.parent for path in folder.glob(f"*/{TREE}")]
    named = [folder / name for name in _ITEMS if folder / name in found]
    return next(iter(named or sorted(found)), None)


@dataclasses.dataclass
class OrbaxSource(Source):
    """The arrays of an item, found by the names that Orbax gives them."""

    boxed = True

    folder: Path
    arrays: Mapping[LeafPath, Any]
    leaves: Mapping[LeafPath, LeafSpec]
    nones: tuple[LeafPath, ...] = ()

    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        return self.arrays[path].chunk_layout.read_chunk.shape

    def read(self, path: LeafPath, box: Box) -> Later:
        spec = self.leaves[path]
        future = self.arrays[path][box.slices].read(order="C")

        def finish() -> np.ndarray[Any, np.dtype[Any]]:
            try:
                return np.asarray(future.result()).view(spec.stored[1])
            except Exception as error:
                raise LeafDataError(path, str(error)) from error

        return finish


def open_orbax(folder: Path) -> OrbaxSource:
    """What Orbax saved in an item's folder; raises ValueError for what cannot be read."""
    about = _json(folder / TREE)
    try:
        entries = list(about["tree_metadata"].values())
        ocdbt, zarr3 = bool(about.get("use_ocdbt", True)), bool(about.get("use_zarr3", False))
        kinds = {_path(entry): entry["value_metadata"] for entry in entries}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / TREE} is not what Orbax writes: {error!r}") from error
    present = [path for path, kind in kinds.items() if not kind.get("skip_deserialize")]
    strings = _strings(folder)
    texts = {p: strings[".".join(p)] for p in present if ".".join(p) in strings}
    arrays = _open(folder, [path for path in present if path not in texts], ocdbt, zarr3)
    impls = _key_impls(folder)
    leaves = {path: _spec(array, impls.get(".".join(path))) for path, array in arrays.items()}
    leaves |= {path: LeafSpec("python", (), "str", value=text) for path, text in texts.items()}
    nones = [path for path, kind in kinds.items() if kind.get("value_type") == "None"]
    return OrbaxSource(folder, arrays, {p: leaves[p] for p in present}, tuple(nones))


def first_format(folder: Path) -> OrbaxSource:
    """A step in the first format of this library: a manifest beside what Orbax wrote."""
    about = _json(folder / "manifest" / "manifest.json")
    if about.get("format") != "shardflax.ckpt":
        raise ValueError("not a manifest of this library")
    if about.get("version") != 1:
        raise ValueError(f"manifest version {about.get('version')!r}; this library reads 1 and 2")
    try:
        leaves = {tuple(leaf["path"]): _first_spec(leaf) for leaf in about["leaves"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the manifest is not what it should be: {error!r}") from error
    stored = [path for path, x in leaves.items() if x.kind != "python" and x.on_disk]
    arrays = _open(folder / "state", stored, ocdbt=True, zarr3=True)
    for path, array in arrays.items():
        if tuple(array.shape) != leaves[path].stored[0]:
            raise LeafDataError(
                path, f"it is {tuple(array.shape)}, the manifest says {leaves[path]}"
            )
    return OrbaxSource(folder / "state", arrays, leaves)


def _first_spec(leaf: Mapping[str, Any]) -> LeafSpec:
    value = leaf.get("value")
    return LeafSpec(
        kind=leaf["kind"],
        shape=tuple(leaf["shape"]),
        dtype=leaf["dtype"],
        impl=leaf.get("impl"),
        value=complex(*value) if isinstance(value, list) else value,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _path(entry: Mapping[str, Any]) -> LeafPath:
    return tuple(str(part["key"]) for part in entry["key_metadata"])


def _strings(folder: Path) -> Mapping[str, str]:
    path = folder / "_strings.json"
    return _json(path) if path.is_file() else {}


def _key_impls(folder: Path) -> dict[str, str]:
    """The generators of the leaves that are PRNG keys, by name."""
    found: dict[str, str] = {}
    for path in sorted((folder / "array_metadatas").glob("process_*")):
        for entry in _json(path).get("array_metadatas", ()):
            about = entry.get("array_metadata", {})
            extra = about.get("ext_metadata") or {}
            if "random_key_impl" in extra:
                found[about["param_name"]] = extra["random_key_impl"]
    return found


def _open(folder: Path, paths: list[LeafPath], ocdbt: bool, zarr3: bool) -> dict[LeafPath, Any]:
    """Opens arrays, all at once."""
    base: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
    shared, futures = context(), {}
    for path in paths:
        name = ".".join(path)
        if ocdbt:
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{folder}/{name}/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}
        futures[path] = ts.open(spec, open=True, read=True, context=shared)
    return {path: _opened(path, future) for path, future in futures.items()}


def _opened(path: LeafPath, future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:
        raise LeafDataError(path, str(error)) from error


def _spec(array: Any, impl: str | None) -> LeafSpec:
    """What an array that Orbax wrote is."""
    shape = tuple(array.shape)
    if impl is None:
        return LeafSpec("array", shape, np.dtype(array.dtype.numpy_dtype).name)
    words = len(key_words(impl))
    return LeafSpec("key", shape[: len(shape) - words], _KEY_DTYPES.get(impl, impl), impl=impl)


_KEY_DTYPES = {"threefry2x32": "key<fry>", "rbg": "key<rbg>", "unsafe_rbg": "key<urbg>"}
