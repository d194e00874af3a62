"""The manifest: what a checkpoint holds, readable without touching any device.

`MANIFEST.json` is written last.  Its first line holds the checksum of the rest, so it is also a
proof that what it lists was written.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from shardflax.ckpt.durable import FileRecord, checksum
from shardflax.ckpt.leaves import LeafSpec, is_plain
from shardflax.ckpt.paths import Path
from shardflax.ckpt.plan import Stored

__all__ = ["CODECS", "NAME", "Manifest", "check_json", "spec_json", "spec_of"]

FORMAT = "shardflax.ckpt"
VERSION = 2
NAME = "MANIFEST.json"
_HEAD = re.compile(rb'\{"crc32": "([0-9a-f]{8})", "body":\n')
CODECS = ("zstd",)
"""What arrays may be compressed by."""
_MOST_SAVED = 1 << 16
"""No array is compressed to a smaller part: 128 KiB that are all alike take some bytes."""
_LIMIT = 1 << 30
"""No manifest of a real checkpoint has as many bytes."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Every leaf of a state, where it is stored, and every file, with its checksum.

    `leaves` has the specs by path; `stored` those that are arrays with elements; `files` are
    relative to the folder of the step; `nones` are the paths of None; `mesh` is the sizes of the
    mesh axes that the state was saved under; `process_extras` has a JSON value for each process;
    `temporary` says that the step only bridges the time to the next one.

    >>> m = Manifest(3, {("n",): LeafSpec("python", (), "int", value=7)}, {}, {})
    >>> Manifest.read(m.text()) == m
    True
    >>> Manifest.read(m.text().replace(b"7", b"8"))
    Traceback (most recent call last):
    ValueError: its checksum is wrong
    """

    step: int
    leaves: Mapping[Path, LeafSpec]
    stored: Mapping[Path, Stored]
    files: Mapping[str, FileRecord]
    nones: tuple[Path, ...] = ()
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    processes: int = 1
    time: float = 0.0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    process_extras: tuple[Any, ...] = ()
    temporary: bool = False

    def text(self) -> bytes:
        """The file."""
        leaves = []
        for path, spec in self.leaves.items():
            stored = self.stored.get(path)
            leaves.append({"path": path, **spec_json(spec), **(_stored_json(stored))})
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "time": self.time,
            "processes": self.processes,
            "mesh": dict(self.mesh),
            "leaves": leaves,
            "nones": self.nones,
            "metrics": self.metrics,
            "process_extras": self.process_extras,
            "files": self.files,
        }
        if self.temporary:
            body["temporary"] = True
        rest = json.dumps(body).encode() + b"}"
        return b'{"crc32": "' + checksum(rest).encode() + b'", "body":\n' + rest

    @classmethod
    def read(cls, text: bytes) -> Manifest:
        """Reads `text`; raises ValueError for anything that a manifest must not be."""
        if not text:
            raise ValueError("it is empty")
        head = _HEAD.match(text)
        if head is None or len(text) > _LIMIT:
            raise ValueError("it is not a manifest of this library")
        rest = text[head.end() :]
        if checksum(rest).encode() != head[1]:
            raise ValueError("its checksum is wrong")
        try:
            body = json.loads(rest[:-1])
            version = body["version"]
            if body["format"] != FORMAT or version != VERSION:
                newer = isinstance(version, int) and version > VERSION
                cure = ": it was written by a later one, so update it" if newer else ""
                raise ValueError(f"it has version {version!r}; this library reads {VERSION}{cure}")
            return cls._of(body)
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"it is not what a manifest is: {error!r}") from error

    @classmethod
    def _of(cls, body: Mapping[str, Any]) -> Manifest:
        leaves: dict[Path, LeafSpec] = {}
        stored: dict[Path, Stored] = {}
        for entry in body["leaves"]:
            path = tuple(map(_text, entry["path"]))
            leaves[path] = spec = spec_of(entry)
            if "store" in entry:
                stored[path] = _stored_of(path, spec, entry)
            elif spec.kind != "python" and spec.on_disk:
                raise ValueError(f"leaf {'/'.join(path)!r} is stored nowhere")
        files = {_file_name(n): (_count(s), _text(c)) for n, (s, c) in body["files"].items()}
        found = cls(
            step=_count(body["step"]),
            leaves=leaves,
            stored=stored,
            files=files,
            nones=tuple(tuple(map(_text, path)) for path in body["nones"]),
            mesh={_text(axis): _count(size) for axis, size in body["mesh"].items()},
            processes=_count(body["processes"]),
            time=float(body["time"]),
            metrics={_text(name): float(value) for name, value in body["metrics"].items()},
            process_extras=tuple(body["process_extras"]),
            temporary=body.get("temporary") is True,
        )
        found._check_sizes()
        return found

    def _check_sizes(self) -> None:
        """Refuses arrays that cannot be in the files, before memory is taken for them."""
        arrays = sum(
            leaf.leaf.nbytes // (_MOST_SAVED if leaf.codec else 1) for leaf in self.stored.values()
        )
        files = sum(size for size, _ in self.files.values())
        if arrays > files:
            raise ValueError(f"its arrays have {arrays:,} bytes, its files {files:,}")


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{x!r} is not a string")
    return x


def _count(x: Any) -> int:
    if type(x) is not int or not 0 <= x < 2**63:
        raise TypeError(f"{x!r} is not a count")
    return x


def _counts(x: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(map(_count, x))
    if len(found) > 64:
        raise TypeError(f"{len(found)} dims")
    return found


def _file_name(name: str) -> str:
    """A relative name that stays in the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"it names a file outside of its folder: {name!r}")
    return name


def spec_json(spec: LeafSpec) -> dict[str, Any]:
    """A spec as JSON, without its empty fields; a complex value as two numbers.

    >>> spec_json(LeafSpec("python", (), "int", value=7))
    {'kind': 'python', 'shape': (), 'dtype': 'int', 'value': 7}
    """
    fields = {"kind": spec.kind, "shape": spec.shape, "dtype": spec.dtype}
    if spec.impl is not None:
        fields["impl"] = spec.impl
    if spec.kind == "python":
        value = spec.value
        fields["value"] = [value.real, value.imag] if isinstance(value, complex) else value
    return fields


_PYTHON = {"bool": bool, "int": int, "float": float, "complex": list, "str": str}


def spec_of(entry: Mapping[str, Any]) -> LeafSpec:
    """The inverse of `spec_json`; raises TypeError or KeyError for what is no spec.

    >>> spec_of({"kind": "array", "shape": [2], "dtype": "int8"})
    LeafSpec(kind='array', shape=(2,), dtype='int8', impl=None, value=None)
    """
    kind, dtype, value = entry["kind"], _text(entry["dtype"]), entry.get("value")
    if kind not in ("array", "key", "python"):
        raise TypeError(f"kind {kind!r}")
    if kind == "python" and type(value) is not _PYTHON[dtype]:
        raise TypeError(f"{value!r} is not a {dtype}")
    if kind == "array" and not is_plain(np.dtype(dtype)):
        raise TypeError(f"dtype {dtype!r}")
    impl = entry.get("impl")
    return LeafSpec(
        kind=kind,
        shape=_counts(entry["shape"]),
        dtype=dtype,
        impl=None if impl is None else _text(impl),
        value=complex(*value) if isinstance(value, list) else value,
    )


def _stored_json(stored: Stored | None) -> dict[str, Any]:
    """Where an array is stored, and what its dims are."""
    if stored is None:
        return {}
    store = {"name": stored.name, "shape": stored.shape, "dtype": stored.dtype.name,
             "chunk": stored.chunk, "public": stored.public}  # fmt: skip
    if stored.codec is not None:
        store["codec"] = stored.codec
    return {"store": store, "names": stored.names, "spec": stored.spec}


def _stored_of(path: Path, spec: LeafSpec, entry: Mapping[str, Any]) -> Stored:
    """The inverse of `_stored_json`; what does not fit the spec is refused."""
    store = entry["store"]
    found = Stored(
        path=path,
        leaf=spec,
        name=_text(store["name"]),
        public=bool(store["public"]),
        shape=_counts(store["shape"]),
        dtype=np.dtype(spec.stored[1]) if store["dtype"] != "uint8" else np.dtype(np.uint8),
        chunk=_counts(store["chunk"]),
        names=_dims(entry["names"]),
        spec=_dims(entry["spec"]),
        codec=_codec(store.get("codec")),
    )
    if found.shape != spec.stored[0] or len(found.chunk) != len(found.shape):
        raise ValueError(
            f"leaf {'/'.join(path)!r} of shape {spec.shape} is stored as {found.shape}"
        )
    if 0 in found.chunk or found.dtype.itemsize != spec.stored[1].itemsize:
        raise ValueError(f"leaf {'/'.join(path)!r} has impossible chunks")
    return found


def _codec(x: Any) -> str | None:
    if x not in (None, *CODECS):
        raise ValueError(f"it has arrays compressed by {x!r}; this library reads {CODECS}")
    return x


def _dims(x: Any) -> tuple[Any, ...] | None:
    """Names or mesh axes of dims, lists turned into tuples."""
    return None if x is None else tuple(tuple(p) if isinstance(p, list) else p for p in x)


def check_json(extras: Mapping[str, Any], what: str = "extras") -> dict[str, Any]:
    """A copy of `extras` as JSON gives it back (tuples become lists).

    Raises TypeError, naming the item of `what`, for what JSON cannot hold exactly.

    >>> check_json({"epoch": 3, "shape": (2, 2)})
    {'epoch': 3, 'shape': [2, 2]}
    """
    _check_item(what, extras)
    return json.loads(json.dumps(extras))


def _check_item(where: str, value: Any) -> None:
    """Walks through a JSON value; `json.dumps` alone would turn int keys into strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: keys of JSON objects are strings.")
            _check_item(f"{where}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_item(f"{where}[{index}]", item)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"{where} is a {type(value).__name__}, which JSON cannot hold: "
            f"convert it to a number, string, list or dict."
        )
