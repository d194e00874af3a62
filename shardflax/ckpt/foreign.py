"""Steps that Orbax wrote, by itself or for the first format of this library.

Read through TensorStore: OCDBT databases and plain folders, zarr of version 2 and 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from shardflax.ckpt.leaves import LeafSpec, key_words
from shardflax.ckpt.manifest import spec_of
from shardflax.ckpt.orbax_files import TREE
from shardflax.ckpt.paths import ROOT
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.place import Place, StorePath, kvstore
from shardflax.ckpt.regions import Box
from shardflax.ckpt.sources import Later, LeafDataError, Source, context

__all__ = [
    "OrbaxSource", "check_choice", "find_item", "first_format", "open_orbax", "read_json",
]  # fmt: skip

_ITEMS = ("state", "default", "pytree", "params", "items")
"""Where people keep their arrays, the likeliest first."""
_SLACK, _RATIO = 64 << 20, 1000
"""Arrays are at most so much larger than the files that they are compressed in."""


def find_item(folder: Place) -> Any:
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


def check_choice(folder: Place, item: Path) -> None:
    """Raises ValueError if an item is one of several, and nothing says that it is the right one.

    >>> check_choice(Path("/nowhere/3"), Path("/nowhere/3/state"))
    """
    names = sorted(path.parent.name for path in folder.glob(f"*/{TREE}"))
    if item != folder and item.name not in _ITEMS and len(names) > 1:
        raise ValueError(
            f"{folder} holds several trees, {', '.join(names)}: give the folder of one of them to "
            f"`load_checkpoint`"
        )


@dataclasses.dataclass
class OrbaxSource(Source):
    """The arrays of an item, found by the names that Orbax gives them."""

    boxed = True

    folder: Place
    arrays: Mapping[LeafPath, Any]
    leaves: Mapping[LeafPath, LeafSpec]
    nones: tuple[LeafPath, ...] = ()

    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        return self.arrays[path].chunk_layout.read_chunk.shape

    def check_size(self, nbytes: int) -> None:
        if isinstance(self.folder, StorePath):  # which does not tell sizes
            return
        files = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if nbytes > _SLACK + _RATIO * files:
            raise ValueError(
                f"the arrays have {nbytes:,} bytes, the files in {self.folder} {files:,}: that is "
                f"hardly possible; if they are all zeros, give a target"
            )

    def read(self, path: LeafPath, box: Box) -> Later:
        spec = self.leaves[path]
        future = self.arrays[path][box.slices].read(order="C")

        def finish() -> np.ndarray[Any, np.dtype[Any]]:
            try:
                return np.asarray(future.result()).view(spec.stored[1])
            except Exception as error:
                raise LeafDataError(path, str(error)) from error

        return finish


def open_orbax(folder: Place) -> OrbaxSource:
    """What Orbax saved in an item's folder; raises ValueError for what cannot be read."""
    about = read_json(folder / TREE)
    with _as_orbax_writes(folder / TREE):
        entries = list(about["tree_metadata"].values())
        ocdbt, zarr3 = bool(about.get("use_ocdbt", True)), bool(about.get("use_zarr3", False))
        kinds = {_path(entry): dict(entry["value_metadata"]) for entry in entries}
    present = [path for path, kind in kinds.items() if not kind.get("skip_deserialize")]
    strings = _strings(folder)
    texts = {p: strings[".".join(p)] for p in present if ".".join(p) in strings}
    opened = _open(folder, [path for path in present if path not in texts], ocdbt, zarr3)
    impls = _key_impls(folder)
    found = {path: _spec(array, impls.get(".".join(path))) for path, array in opened.items()}
    found |= {path: LeafSpec("python", (), "str", value=text) for path, text in texts.items()}
    nones = [path for path, kind in kinds.items() if kind.get("value_type") == "None"]
    arrays = {path or ROOT: array for path, array in opened.items()}  # a state that is one array
    return OrbaxSource(folder, arrays, {p or ROOT: found[p] for p in present}, tuple(nones))


def first_format(folder: Place) -> OrbaxSource:
    """A step in the first format of this library: a manifest beside what Orbax wrote."""
    path = folder / "manifest" / "manifest.json"
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != "shardflax.ckpt":
        raise ValueError(f"{path} is not a manifest of this library")
    if about.get("version") != 1:
        raise ValueError(f"{path} has version {about.get('version')!r}; this library reads 1 and 2")
    with _as_orbax_writes(path):
        leaves = {tuple(map(str, leaf["path"])): spec_of(leaf) for leaf in about["leaves"]}
    stored = [path for path, x in leaves.items() if x.kind != "python" and x.on_disk]
    arrays = _open(folder / "state", stored, ocdbt=True, zarr3=True)
    for path, array in arrays.items():
        if tuple(array.shape) != leaves[path].stored[0]:
            raise LeafDataError(
                path, f"it is {tuple(array.shape)}, the manifest says {leaves[path]}"
            )
    return OrbaxSource(folder / "state", arrays, leaves)


@contextlib.contextmanager
def _as_orbax_writes(path: Place) -> Iterator[None]:
    """What looks otherwise in a file is a ValueError that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not what it should be: {error!r}") from error


def read_json(path: Place) -> Any:
    """What is in a file of JSON; raises ValueError, naming it.

    >>> read_json(Path("/nowhere"))
    Traceback (most recent call last):
    ValueError: /nowhere: [Errno 2] No such file or directory: '/nowhere'
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _path(entry: Mapping[str, Any]) -> LeafPath:
    return tuple(str(part["key"]) for part in entry["key_metadata"])


def _strings(folder: Place) -> Mapping[str, str]:
    path = folder / "_strings.json"
    if not path.is_file():
        return {}
    with _as_orbax_writes(path):
        return {name: str(text) for name, text in read_json(path).items()}


def _key_impls(folder: Place) -> dict[str, str]:
    """The generators of the leaves that are PRNG keys, by name."""
    found: dict[str, str] = {}
    for path in sorted((folder / "array_metadatas").glob("process_*")):
        with _as_orbax_writes(path):
            for entry in read_json(path).get("array_metadatas", ()):
                about = entry.get("array_metadata", {})
                extra = about.get("ext_metadata") or {}
                if "random_key_impl" in extra:
                    key_words(extra["random_key_impl"])  # raises for what is no generator
                    found[about["param_name"]] = extra["random_key_impl"]
    return found


def _open(folder: Place, paths: list[LeafPath], ocdbt: bool, zarr3: bool) -> dict[LeafPath, Any]:
    """Opens arrays, all at once."""
    base = kvstore(folder)
    shared, futures = context(), {}
    for path in paths:
        name = ".".join(path)
        inside = f"{name}/" if name else ""
        if ocdbt:
            store = {"driver": "ocdbt", "base": base, "path": inside}
        elif ".." in name.split("/") or "\0" in name:
            raise LeafDataError(path, f"it would be outside of {folder}")
        else:
            store = {**base, "path": f"{base['path']}{inside}"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}
        try:
            futures[path] = ts.open(spec, open=True, read=True, context=shared)
        except ValueError as error:
            raise LeafDataError(path, str(error)) from error
    return {path: _opened(path, future) for path, future in futures.items()}


def _opened(path: LeafPath, future: Any) -> Any:
    try:
        array = future.result()
    except Exception as error:
        raise LeafDataError(path, str(error)) from error
    chunk = array.chunk_layout.read_chunk.shape or ()
    itemsize = array.dtype.numpy_dtype.itemsize
    if math.prod(chunk) * itemsize > _SLACK + 2 * math.prod(array.shape) * itemsize:
        raise LeafDataError(path, f"chunks of {chunk} are larger than the array, {array.shape}")
    return array


def _spec(array: Any, impl: str | None) -> LeafSpec:
    """What an array that Orbax wrote is."""
    shape = tuple(array.shape)
    if impl is None:
        return LeafSpec("array", shape, np.dtype(array.dtype.numpy_dtype).name)
    words = len(key_words(impl))
    return LeafSpec("key", shape[: len(shape) - words], _KEY_DTYPES.get(impl, impl), impl=impl)


_KEY_DTYPES = {"threefry2x32": "key<fry>", "rbg": "key<rbg>", "unsafe_rbg": "key<urbg>"}
