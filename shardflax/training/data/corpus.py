"""The text of a run: files of the user's, or the source of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shardflax.training.data import tokens as _tokens
from shardflax.training.data.errors import EmptyCorpusError, UnreadableFileError
from shardflax.training.data.readers import read_documents

__all__ = ["Corpus", "open_corpus"]

# Folders of the standard library that hold what others installed, or no ordinary source.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """All documents of a run as one stream of byte tokens, held in memory.

    `tokens` is uint8, shape (n,), with byte 0 after each document; `fingerprint` is the same for
    the same bytes, on any machine.

    >>> corpus = Corpus.of("two lines", ["one", "two"])
    >>> corpus.documents, corpus.tokens.shape, corpus.fingerprint
    (2, (8,), '00db5aa8ed0fcd56')
    """

    name: str
    tokens: npt.NDArray[np.uint8] = field(repr=False)
    documents: int
    fingerprint: str

    @classmethod
    def of(cls, name: str, texts: Iterable[str | bytes]) -> Corpus:
        """A corpus of texts that are at hand; bytes are taken for UTF-8.

        Raises `EmptyCorpusError` if there is no text in them.
        """
        documents = [t.encode() if isinstance(t, str) else t for t in texts]
        documents = [d for d in documents if d]
        if not documents:
            raise EmptyCorpusError(name, "only empty documents")
        tokens = _tokens.join(documents)
        digest = hashlib.sha256(tokens.data).hexdigest()
        return cls(name, tokens, len(documents), digest[:16])


def open_corpus(path: str | Path | None = None, *, field: str = "text") -> Corpus:
    """Reads a corpus, whole: a text, JSONL or Parquet file, or a folder of them.

    Folders are read in the order of the files' relative paths, without hidden ones.  None stands
    for the source code of the Python standard library that runs this.  In JSONL and Parquet files
    the text is in `field`.  Raises a `DataError` that names the file and line of whatever is
    missing, empty, unreadable, or no text.

    >>> corpus = open_corpus()
    >>> corpus.documents > 300
    True
    """
    if path is None:
        return _standard_library()
    path = Path(path)
    if not path.exists():
        raise UnreadableFileError(path, "no such file or folder")
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise EmptyCorpusError(path, "no files in it")
    documents = [d for file in files for d in read_documents(file, field)]
    if not any(documents):
        raise EmptyCorpusError(path, "an empty file" if path.is_file() else "only empty files")
    return Corpus.of(str(path), documents)


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in _files(root, _SKIPPED) if f.suffix == ".py"]
    if not files:
        raise EmptyCorpusError(root, "no source of the standard library; say which data to read")
    return Corpus.of("Python standard library", (f.read_bytes() for f in files))


def _files(root: Path, skipped: Iterable[str] = ()) -> list[Path]:
    """The files below `root`, sorted by relative path (the same on every file system)."""
    return sorted(_walk(root, set(skipped)), key=lambda p: p.relative_to(root).parts)


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    def fail(e: OSError) -> None:
        raise UnreadableFileError(e.filename, (e.strerror or str(e)).lower()) from e

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        yield from (Path(folder, n) for n in names if not n.startswith("."))
