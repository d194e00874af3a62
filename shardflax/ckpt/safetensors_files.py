"""Safetensors files: read into a layout, part by part, and written.

A name such as `layers.0.kernel` is a path of three.  What the format has no place for (generators
of PRNG keys, Python numbers, strings, names with dots) is kept in the metadata, under one key.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from shardflax.ckpt.durable import sync_folder
from shardflax.ckpt.errors import CheckpointLeafError
from shardflax.ckpt.leaves import LeafSpec
from shardflax.ckpt.manifest import spec_json, spec_of
from shardflax.ckpt.match import Options
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.paths import show
from shardflax.ckpt.patterns import Patterns
from shardflax.ckpt.place import local_file
from shardflax.ckpt.reading import Restored, restore_file
from shardflax.ckpt.regions import Box
from shardflax.ckpt.safetensors_header import CODES, Tensor, header_bytes, read_header
from shardflax.ckpt.sources import Later, LeafDataError, Source
from shardflax.ckpt.tree_source import TreeSource, pieces

__all__ = [
    "INDEX",
    "SafetensorsSource",
    "load_safetensors",
    "open_safetensors",
    "save_safetensors",
    "write_safetensors",
]

INDEX = ".safetensors.index.json"
"""The end of the name of the file that says which tensor is in which of several files."""
_OURS, _NONES, _EXTRAS = "shardflax.leaves", "shardflax.nones", "shardflax.extras"


@dataclasses.dataclass
class SafetensorsSource(Source):
    """The tensors of one file, or of several; `metadata` are those of the files, and the extras."""

    tensors: Mapping[LeafPath, tuple[Path, Tensor]]
    leaves: Mapping[LeafPath, LeafSpec]
    metadata: Mapping[str, Any]
    nones: tuple[LeafPath, ...] = ()

    def chunk(self, path: LeafPath) -> tuple[int, ...]:
        return (1,) * len(self.leaves[path].stored[0])

    def read(self, path: LeafPath, box: Box) -> Later:
        file, tensor = self.tensors[path]
        dtype = self.leaves[path].stored[1]

        def finish() -> np.ndarray[Any, np.dtype[Any]]:
            try:
                # As bytes: nothing in the format aligns the data.
                shape = (*tensor.shape, dtype.itemsize)
                data = np.memmap(file, np.uint8, "r", offset=tensor.begin, shape=shape)
                return np.array(data[box.slices]).view(dtype).reshape(box.shape)
            except (OSError, ValueError) as error:
                raise LeafDataError(path, str(error)) from error

        return finish


def open_safetensors(path: Path) -> SafetensorsSource:
    """What is in a file, an index of files, or a folder with either; no data are read.

    Raises ValueError for what is not a safetensors file.
    """
    files, listed = _files(path)
    found: dict[str, tuple[Path, Tensor]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        with file.open("rb") as opened:
            try:
                header = read_header(opened)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
        twice = sorted(found.keys() & header.tensors.keys())
        if twice:
            raise ValueError(f"tensor {twice[0]!r} is in {found[twice[0]][0]} and in {file}")
        found |= {name: (file, tensor) for name, tensor in header.tensors.items()}
        metadata |= header.metadata
    for name, file in listed.items():
        if name not in found or found[name][0].name != file:
            raise ValueError(f"{path}: it lists tensor {name!r} in {file}, which has none")
    try:
        return _source(found, metadata)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata {_OURS!r} are damaged: {error!r}") from error


def _source(
    found: Mapping[str, tuple[Path, Tensor]], metadata: dict[str, str]
) -> SafetensorsSource:
    paths = _paths(found)
    ours = json.loads(metadata.pop(_OURS, "{}"))
    nones = tuple(tuple(map(str, path)) for path in json.loads(metadata.pop(_NONES, "[]")))
    leaves, tensors = dict[LeafPath, LeafSpec](), dict[LeafPath, tuple[Path, Tensor]]()
    for name, (file, tensor) in sorted(found.items(), key=_natural):
        spec, path = LeafSpec("array", tensor.shape, tensor.dtype), paths[name]
        if name in ours:
            path, spec = _noted(ours.pop(name))
            if spec.stored != (tensor.shape, np.dtype(_dtype(tensor))):
                raise ValueError(f"tensor {name!r} is not what they say")
        leaves[path], tensors[path] = spec, (file, tensor)
    for entry in ours.values():
        path, spec = _noted(entry)
        if spec.on_disk:
            raise ValueError(f"leaf {show(path)!r} has no tensor")
        leaves[path] = spec
    if len(tensors) < len(found):
        raise ValueError("two tensors have one path")
    extras = dict(json.loads(metadata.pop(_EXTRAS, "{}")))
    return SafetensorsSource(tensors, leaves, {**metadata, **extras}, nones)


def _natural(item: tuple[str, Any]) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part)
            for part in item[0].split(".")]  # fmt: skip


def _noted(entry: Any) -> tuple[LeafPath, LeafSpec]:
    return tuple(map(str, entry["path"])), spec_of(entry)


def _dtype(tensor: Tensor) -> Any:
    return LeafSpec("array", (), tensor.dtype).stored[1]


def _paths(names: Mapping[str, Any]) -> dict[str, LeafPath]:
    """Names as paths; as paths of one, if they do not make a tree."""
    paths = {name: tuple(name.split(".")) for name in names}
    inner = {path[:i] for path in paths.values() for i in range(1, len(path))}
    whole = any(path in inner for path in paths.values())
    return {name: (name,) for name in names} if whole else paths


def _files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with tensors, and, where there is an index, what it says is in which of them."""
    if path.is_dir():
        indexes, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
        if len(indexes) > 1 or (not indexes and len(files) != 1):
            raise ValueError(f"{path} has {len(files)} safetensors files, and no single index")
        return _files((indexes or files)[0])
    if not path.name.endswith(INDEX):
        return [path], {}
    try:
        listed = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: it is not an index of safetensors files: {error!r}") from error
    for name in listed.values():
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"{path}: it names a file outside of its folder: {name!r}")
    return [path.with_name(name) for name in sorted(set(listed.values()))], listed


def load_safetensors(
    path: str | os.PathLike[str],
    target: Any = None,
    *,
    rename: Mapping[str, str] | None = None,
    cast: Patterns = False,
    missing: Patterns = False,
    extra: Patterns = False,
    include: Patterns = True,
) -> Restored:
    """Reads a safetensors file into the types and layout of `target`.

    `path` may also be an index of several files, or a folder with either.  Dots in names separate
    the components of a path.  The options are those of `CheckpointManager.restore`; `extras` of
    what is returned are the file's metadata.  Of a sharded target, each process reads its parts.

    Raises CheckpointReadError for a file that is damaged or none; CheckpointMismatchError.

    >>> import tempfile
    >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
    >>> save_safetensors(file, {"encoder": {"w": np.arange(3.0)}})
    >>> load_safetensors(file, rename={"encoder": "backbone"}).state
    {'backbone': {'w': array([0., 1., 2.])}}
    """
    options = Options(cast, missing, extra, dict(rename or {}), include)
    return restore_file(local_file(path), open_safetensors, target, options, _metadata)


def _metadata(source: Source) -> dict[str, Any]:
    return dict(getattr(getattr(source, "inner", source), "metadata", {}))


def save_safetensors(
    path: str | os.PathLike[str], tree: Any, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the leaves of a tree to a safetensors file, at once or not at all.

    Names are paths joined by dots; boxes are taken off.  Memory is taken for one leaf at a time.
    Raises CheckpointLeafError for a leaf that the format cannot hold (int4, complex128), for two
    leaves of one name, and for arrays of which other processes hold parts.

    >>> import tempfile
    >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
    >>> save_safetensors(file, {"w": np.ones(2)}, metadata={"format": "np"})
    >>> load_safetensors(file).extras
    {'format': 'np'}
    """
    write_safetensors(local_file(path), TreeSource(tree), metadata or {})


def write_safetensors(
    path: Path,
    source: Source,
    metadata: Mapping[str, str],
    extras: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes what a source offers, and JSON among the metadata; see `save_safetensors`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "w.safetensors")
    >>> write_safetensors(file, TreeSource({"w": 1}), {}, {"seen": 64})
    >>> open_safetensors(file).metadata
    {'seen': 64}
    """
    names = _names(source)
    tensors = {name: _form(source, path) for name, path in names.items() if _on_disk(source, path)}
    ours: dict[str, Any] = {
        name: {"path": leaf, **spec_json(source.leaves[leaf])}
        for name, leaf in names.items()
        if source.leaves[leaf].kind != "array" or tuple(name.split(".")) != leaf
    }
    noted = {_OURS: json.dumps(ours)} if ours else {}
    if extras:
        noted[_EXTRAS] = json.dumps(dict(extras))
    if source.nones:
        noted[_NONES] = json.dumps(source.nones)
    head, begins = header_bytes(tensors, {**metadata, **noted})
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("xb") as file:
            file.write(head)
            for name in begins:
                _write(file, source, names[name])
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def _names(source: Source) -> dict[str, LeafPath]:
    """The leaves by the names that they get."""
    names: dict[str, LeafPath] = {}
    for path in source.leaves:
        name = ".".join(path)
        if name in names or name == "__metadata__":
            raise CheckpointLeafError(
                show(path), f"its name would be {name!r}, which is taken", "Rename it."
            )
        names[name] = path
    return names


def _on_disk(source: Source, path: LeafPath) -> bool:
    """True if a leaf is a tensor; arrays without elements are, too."""
    spec = source.leaves[path]
    return spec.on_disk or spec.kind != "python"


def _form(source: Source, path: LeafPath) -> tuple[str, tuple[int, ...]]:
    shape, dtype = source.leaves[path].stored
    if dtype.name not in CODES.values():
        raise CheckpointLeafError(
            show(path), f"safetensors files cannot hold {dtype.name}", "Cast it before."
        )
    return dtype.name, shape


def _write(file: Any, source: Source, path: LeafPath) -> None:
    """The data of one leaf."""
    spec = source.leaves[path]
    if spec.kind == "python":
        file.write(np.asarray(spec.value).tobytes())
    elif spec.on_disk:
        for box in pieces(source, path, ordered=True):
            array = source.read(path, box)()
            file.write(array.astype(spec.stored[1], copy=False).tobytes())
