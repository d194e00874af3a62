"""Where checkpoints are: folders of file systems, and object stores reached through TensorStore.

A `StorePath` has as much of `pathlib.Path` as checkpoints need, so most code does not ask what it
has.  What differs in kind (how a step is committed, how a file is made safe) is in functions of
`functools.singledispatch`, whose versions for object stores are in `shardflax.ckpt.remote`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import tensorstore as ts

from shardflax.ckpt.errors import CheckpointFolderError

__all__ = ["SCHEMES", "Place", "StorePath", "kvstore", "local_file", "place"]

SCHEMES = {"gs": "gcs", "s3": "s3"}
"""What begins a path in an object store, and TensorStore's driver for it."""
_COLLAPSED = re.compile(r"(gs|s3|az|abfss?|hdfs|https?|file):/")
_RETRIES = 8
"""After two minutes, something is wrong."""


@dataclasses.dataclass(frozen=True, order=True)
class StorePath:
    """A key in an object store, or what several keys begin with, as in folders.

    >>> path = StorePath("gs", "bucket", "run") / "3/MANIFEST.json"
    >>> str(path), path.name, str(path.parent)
    ('gs://bucket/run/3/MANIFEST.json', 'MANIFEST.json', 'gs://bucket/run/3')
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str | os.PathLike[str]) -> StorePath:
        parts = [*self.parts, *(p for p in os.fspath(name).split("/") if p not in ("", "."))]
        return dataclasses.replace(self, key="/".join(parts))

    # --- names

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the key."""
        return tuple(part for part in self.key.split("/") if part)

    @property
    def name(self) -> str:
        """The last part."""
        return self.parts[-1] if self.parts else ""

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> StorePath:
        """All but the last part."""
        return dataclasses.replace(self, key="/".join(self.parts[:-1]))

    def with_name(self, name: str) -> StorePath:
        """Another last part."""
        return self.parent / name

    def relative_to(self, other: StorePath) -> PurePosixPath:
        """What comes after another path."""
        return PurePosixPath(self.key).relative_to(other.key)

    def expanduser(self) -> StorePath:
        """Itself."""
        return self

    absolute = expanduser

    # --- the store

    @property
    def spec(self) -> dict[str, Any]:
        """TensorStore's description of the folder."""
        return {**_spec(self.scheme, self.bucket), "path": f"{self.key}/" if self.key else ""}

    def files(self) -> list[StorePath]:
        """All keys below, in order; raises OSError."""
        start = f"{self.key}/" if self.key else ""
        keys = self._keys(ts.KvStore.KeyRange(start, _after(start)))
        return [dataclasses.replace(self, key=key) for key in keys if key.startswith(start)]

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        """The keys below whose name is like a pattern."""
        return (x for x in self.files() if fnmatch.fnmatchcase(x.name, pattern))

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """The keys below whose parts are like those of a pattern."""
        wanted = pattern.split("/")
        for path in self.files():
            parts = path.relative_to(self).parts
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield path

    def iterdir(self) -> Iterator[StorePath]:
        """What is directly below, keys and folders."""
        names = dict.fromkeys(path.relative_to(self).parts[0] for path in self.files())
        return (self / name for name in names)

    def is_file(self) -> bool:
        """True if it is a key."""
        return self.key in self._keys(ts.KvStore.KeyRange(self.key, f"{self.key}\0"))

    def is_dir(self) -> bool:
        """True if keys are below."""
        return bool(self.files())

    def is_symlink(self) -> bool:
        """False."""
        return False

    def exists(self) -> bool:
        """True if it is a key, or keys are below."""
        return self.is_file() or self.is_dir()

    def read_bytes(self) -> bytes:
        """What is stored under the key; raises FileNotFoundError, OSError."""
        found = self._done(self._store.read(self.key))
        if found.state != "value":
            raise FileNotFoundError(2, "No such object", str(self))
        return found.value

    def write_bytes(self, data: bytes) -> None:
        """Stores something under the key, all at once; raises OSError."""
        self._done(self.start_writing(data))

    def start_writing(self, data: bytes) -> Any:
        """The same, as a future of TensorStore."""
        return self._store.write(self.key, data)

    def create(self, data: bytes) -> bool:
        """Stores something if nothing is there, as far as the store can tell; if it did."""
        before = self._done(self._store.read(self.key))
        if before.state == "value":
            return False
        stamp = self._done(self._store.write(self.key, data, if_equal=before.stamp.generation))
        return bool(stamp.generation)

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BytesIO:
        """What is stored, to be read."""
        del mode, buffering
        return io.BytesIO(self.read_bytes())

    def stat(self) -> os.stat_result:
        """Raises OSError: through TensorStore, stores tell neither sizes nor times."""
        raise OSError(f"{self}: the size and time of objects are not known")

    def touch(self) -> None:
        """Makes a small object (an empty one is not taken by all stores)."""
        self.write_bytes(b"-")

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def unlink(self, missing_ok: bool = True) -> None:
        """Removes the key."""
        del missing_ok
        self._done(self._store.write(self.key, None))

    def remove(self) -> None:
        """Removes all keys below."""
        # One by one: not every server that speaks a store's language knows ranges.
        for future in [self._store.write(path.key, None) for path in self.files()]:
            self._done(future)

    @property
    def _store(self) -> Any:
        try:
            return _open(json.dumps(_spec(self.scheme, self.bucket)))
        except ValueError as error:
            raise OSError(f"{self}: {error}") from error

    def _keys(self, keys: Any) -> list[str]:
        return sorted(key.decode() for key in self._done(self._store.list(keys)))

    def _done(self, future: Any) -> Any:
        try:
            return future.result()
        except ValueError as error:
            raise OSError(f"{self}: {error}") from error


def kvstore(folder: Path | StorePath) -> dict[str, Any]:
    """TensorStore's description of a folder.

    >>> kvstore(Path("/data/run"))
    {'driver': 'file', 'path': '/data/run/'}
    """
    if isinstance(folder, StorePath):
        return folder.spec
    return {"driver": "file", "path": f"{os.path.realpath(folder)}/"}  # it takes no ".."


Place = Path | StorePath
"""A folder of a file system, or of an object store."""


def place(path: str | os.PathLike[str]) -> Any:
    """A path as what it is: one of a file system, or of an object store (`gs://`, `s3://`).

    Raises CheckpointFolderError for other schemes, and for what cannot be a name at all.

    >>> place("/data/run"), place("s3://bucket/run").bucket
    (PosixPath('/data/run'), 'bucket')
    """
    if isinstance(path, StorePath):
        return path
    text = os.fspath(path)
    scheme, found, rest = text.partition("://")
    if not text:
        raise CheckpointFolderError(text, "it has no name", "Give a folder: '.' is this one.")
    if "\0" in text:
        raise CheckpointFolderError(text, "names have no NUL in them", "Leave it out.")
    if not found:
        return _local(text)
    if scheme == "file" and rest.startswith("/"):
        return Path(rest)
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES or not bucket:
        known = " and ".join(f"{name}://BUCKET/..." for name in SCHEMES)
        raise CheckpointFolderError(
            text,
            f"checkpoints are in folders of file systems, or at {known}",
            "Mount other stores, and give the folder they are mounted at.",
        )
    return StorePath(scheme, bucket, "/".join(part for part in key.split("/") if part))


def _local(text: str) -> Path:
    if lost := _COLLAPSED.match(text):
        raise CheckpointFolderError(
            text,
            f"pathlib has made one slash of the two in {lost[1]}://",
            f"Give a string, or an `etils.epath.Path`; './{text}' is a folder of this name.",
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.split("/")[0]
        raise CheckpointFolderError(
            text, f"there is no user {user}", f"Or is it ./{text}?"
        ) from error


def local_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file of weights; raises CheckpointFolderError for one in an object store.

    >>> local_file("/data/model.safetensors")
    PosixPath('/data/model.safetensors')
    """
    where = place(path)
    if isinstance(where, StorePath):
        raise CheckpointFolderError(
            where,
            "files of weights are read from file systems, and written to them",
            "Copy it from there, or to there, or use a CheckpointManager.",
        )
    return where


def _spec(scheme: str, bucket: str) -> dict[str, Any]:
    """TensorStore's description of a bucket; S3's variables are those of all its programs."""
    driver = SCHEMES[scheme]
    spec: dict[str, Any] = {
        "driver": driver,
        "bucket": bucket,
        f"{driver}_request_retries": {"max_retries": _RETRIES},
    }
    if scheme == "s3":
        found = os.environ.get
        endpoint = found("AWS_ENDPOINT_URL_S3") or found("AWS_ENDPOINT_URL")
        region = found("AWS_REGION") or found("AWS_DEFAULT_REGION")
        if endpoint:
            spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
        if found("AWS_ACCESS_KEY_ID"):
            spec["aws_credentials"] = {"type": "environment"}
    return spec


@functools.lru_cache(maxsize=16)
def _open(spec: str) -> Any:
    """A bucket; nothing of it is cached."""
    return ts.KvStore.open(json.loads(spec)).result()


def _after(start: str) -> str:
    """The first key after all that begin so; with nothing, there is no end."""
    return f"{start[:-1]}{chr(ord(start[-1]) + 1)}" if start else ""
