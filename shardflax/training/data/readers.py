"""Documents of one file: plain text, JSONL, or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardflax.training.data.errors import (
    InvalidRecordError,
    MissingExtraError,
    MissingFieldError,
    UndecodableTextError,
    UnreadableFileError,
)

__all__ = ["read_documents"]


def read_documents(path: Path, field: str = "text") -> Iterator[bytes]:
    r"""The documents of a file, each in UTF-8, in the order of the file.

    `.jsonl` and `.ndjson` hold one JSON object per line, `.parquet` one row per document, both
    with the text in `field`; any other file is one document.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = path.write_text('{"text": "one"}\n{"text": "two"}\n')
    >>> list(read_documents(path))
    [b'one', b'two']
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, field)
    if suffix == ".parquet":
        return _read_parquet(path, field)
    return iter([_checked(path, _read_bytes(path))])


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UnreadableFileError(path, (e.strerror or str(e)).lower()) from e


def _checked(path: Path, data: bytes, first_line: int = 1) -> bytes:
    """`data` if it is text; the error names the line."""
    try:
        data.decode()
        bad, found = data.find(b"\0"), "a NUL character (is it UTF-16, or no text at all?)"
    except UnicodeDecodeError as e:
        bad, found = e.start, f"byte 0x{data[e.start]:02x} is not UTF-8 (compressed? Latin-1?)"
    if bad >= 0:
        raise UndecodableTextError(path, first_line + data.count(b"\n", 0, bad), found)
    return data


def _read_jsonl(path: Path, field: str) -> Iterator[bytes]:
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield _field(path, number, _record(path, number, _checked(path, line, number)), field)


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        found = f"{e.msg.lower()} at column {e.colno}"
        raise InvalidRecordError(path, number, "a JSON object", found) from e
    if not isinstance(record, dict):
        raise InvalidRecordError(path, number, "a JSON object", f"a {type(record).__name__}")
    return record


def _field(path: Path, number: int, record: dict[str, Any], field: str) -> bytes:
    if field not in record:
        raise MissingFieldError(f"{path}:{number}", field, record)
    return _text(path, number, field, record[field])


def _text(path: Path, number: int, field: str, value: Any) -> bytes:
    """A record's text in UTF-8; `number` is its line or row."""
    if not isinstance(value, str):
        found = "nothing (null)" if value is None else f"a {type(value).__name__}"
        raise InvalidRecordError(path, number, f"text in field {field!r}", found)
    try:
        data = value.encode()
    except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair
        found = f"half a surrogate pair, {value[e.start]!a}"
        raise UndecodableTextError(path, number, found) from e
    if b"\0" in data:
        raise UndecodableTextError(path, number, "a NUL character")
    return data


def _read_parquet(path: Path, field: str) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as e:
        raise MissingExtraError(path, "pyarrow", "data") from e
    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise MissingFieldError(str(path), field, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text(path, number, field, value)
    except (OSError, pyarrow.ArrowException) as e:
        raise UnreadableFileError(path, f"no Parquet file that can be read: {e}") from e
