"""What can be wrong with the data of a run, or with how a batch is to be laid out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from shardflax.core.errors import FlaxError, did_you_mean

__all__ = [
    "BatchLayoutError",
    "CorpusMismatchError",
    "DataError",
    "DataStateError",
    "EmptyCorpusError",
    "InvalidRecordError",
    "MissingExtraError",
    "MissingFieldError",
    "ShortCorpusError",
    "UndecodableTextError",
    "UnreadableFileError",
]


class DataError(FlaxError):
    """The base class of every error about data.

    >>> issubclass(EmptyCorpusError, DataError)
    True
    """


class UnreadableFileError(DataError):
    """A file or folder of the corpus is missing, or cannot be read.

    >>> raise UnreadableFileError("books/moby.txt", "no such file or folder")
    Traceback (most recent call last):
    shardflax.training.data.errors.UnreadableFileError: books/moby.txt: no such file or folder
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)


class UndecodableTextError(DataError):
    """A text is not UTF-8, or holds a NUL character, which separates documents.

    >>> raise UndecodableTextError("a.txt", 3, "byte 0xff is not UTF-8")
    Traceback (most recent call last):
    shardflax.training.data.errors.UndecodableTextError: a.txt:3: expected text in UTF-8, \
found: byte 0xff is not UTF-8
    """

    def __init__(self, path: str | Path, line: int, found: str) -> None:
        super().__init__(f"{path}:{line}: expected text in UTF-8, found: {found}")
        self.path, self.line = str(path), line


class EmptyCorpusError(DataError):
    """A corpus has no text in it.

    >>> raise EmptyCorpusError("books", "no files in it")
    Traceback (most recent call last):
    shardflax.training.data.errors.EmptyCorpusError: books: expected text, found no files in it
    """

    def __init__(self, path: str | Path, found: str) -> None:
        super().__init__(f"{path}: expected text, found {found}")
        self.path = str(path)


class ShortCorpusError(DataError):
    """A corpus, or its held-out part, is too short for what is asked of it.

    >>> raise ShortCorpusError("a.txt", "one window of seq_len=512 takes 513 tokens", "90 tokens")
    Traceback (most recent call last):
    shardflax.training.data.errors.ShortCorpusError: a.txt: one window of seq_len=512 takes 513 \
tokens, found 90 tokens
    """

    def __init__(self, name: str, expected: str, found: str) -> None:
        super().__init__(f"{name}: {expected}, found {found}")


class InvalidRecordError(DataError):
    """A record of a JSONL or Parquet file is not what it should be.

    >>> raise InvalidRecordError("a.jsonl", 2, "a JSON object", "a list")
    Traceback (most recent call last):
    shardflax.training.data.errors.InvalidRecordError: a.jsonl:2: expected a JSON object, found \
a list
    """

    def __init__(self, path: str | Path, line: int, expected: str, found: str) -> None:
        super().__init__(f"{path}:{line}: expected {expected}, found {found}")
        self.path, self.line = str(path), line


class MissingFieldError(DataError):
    """A record, or a whole Parquet file, lacks the field that holds the text.

    >>> raise MissingFieldError("a.jsonl:2", "text", ["txet", "id"])
    Traceback (most recent call last):
    shardflax.training.data.errors.MissingFieldError: a.jsonl:2: expected a field 'text', found \
'id', 'txet'; did you mean 'txet'? Say field=... for another name.
    """

    def __init__(self, where: str, field: str, known: Iterable[str]) -> None:
        names = sorted(known)
        found = ", ".join(map(repr, names)) or "no fields"
        super().__init__(
            f"{where}: expected a field {field!r}, found {found}; {did_you_mean(field, names)} "
            "Say field=... for another name."
        )
        self.field = field


class MissingExtraError(DataError):
    """A file needs a package that is not installed.

    >>> raise MissingExtraError("a.parquet", "pyarrow", "data")
    Traceback (most recent call last):
    shardflax.training.data.errors.MissingExtraError: a.parquet: reading it takes pyarrow; \
pip install 'shardflax[data]'
    """

    def __init__(self, path: str | Path, package: str, extra: str) -> None:
        super().__init__(f"{path}: reading it takes {package}; pip install 'shardflax[{extra}]'")


class BatchLayoutError(DataError):
    """A dim of the batch cannot be cut evenly over the mesh axes it is laid out on.

    >>> raise BatchLayoutError("global_batch", 10, {"data": 2, "fsdp": 4})
    Traceback (most recent call last):
    shardflax.training.data.errors.BatchLayoutError: global_batch=10: expected a multiple of 8 \
(data=2 x fsdp=4); write 8 or 16
    """

    def __init__(self, dim: str, size: int, axes: Mapping[str, int]) -> None:
        parts = 1
        for n in axes.values():
            parts *= n
        product = " x ".join(f"{a}={n}" for a, n in axes.items())
        below = size // parts * parts
        advice = f"{below} or {below + parts}" if below > 0 else f"{parts}"
        expected = f"a multiple of {parts} ({product})" if axes else "a number from 1"
        super().__init__(f"{dim}={size}: expected {expected}; write {advice}")
        self.dim, self.size, self.axes = dim, size, dict(axes)


class DataStateError(DataError):
    """A saved state of the loader belongs to other data.

    >>> raise DataStateError({"seed": (0, 7)})
    Traceback (most recent call last):
    shardflax.training.data.errors.DataStateError: the saved position in the data is of another \
run: seed: expected 0 (this run's), found 7 (saved)
    """

    def __init__(self, differences: Mapping[str, tuple[object, object]]) -> None:
        found = "; ".join(
            f"{k}: expected {ours!r} (this run's), found {saved!r} (saved)"
            for k, (ours, saved) in differences.items()
        )
        super().__init__(f"the saved position in the data is of another run: {found}")
        self.differences = dict(differences)


class CorpusMismatchError(DataError):
    """The processes of a run have read different corpora.

    >>> raise CorpusMismatchError("stdlib", [1, 3])
    Traceback (most recent call last):
    shardflax.training.data.errors.CorpusMismatchError: stdlib: expected the same corpus on every \
process, found another one than on process 0 on process 1, 3; give all of them the same files
    """

    def __init__(self, name: str, processes: Iterable[int]) -> None:
        super().__init__(
            f"{name}: expected the same corpus on every process, found another one than on process "
            f"0 on process {', '.join(map(str, processes))}; give all of them the same files"
        )
