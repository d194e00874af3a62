"""Reading text: what comes out, and what is said when it cannot be read."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardflax.training.data import (
    Corpus,
    DataError,
    EmptyCorpusError,
    InvalidRecordError,
    MissingExtraError,
    MissingFieldError,
    UndecodableTextError,
    UnreadableFileError,
    decode,
    encode,
    open_corpus,
    unigram_loss,
)


def documents(corpus: Corpus) -> list[bytes]:
    return corpus.tokens.tobytes().split(b"\0")[:-1]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# What comes out


def test_the_standard_library_is_there_without_tests_and_guests() -> None:
    corpus = open_corpus()
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    found = documents(corpus)
    assert source in found
    assert len(found) == corpus.documents > 300
    assert len(corpus.tokens) > 5_000_000
    assert not any(b"def test_" in d and b"class TestRegrtest" in d for d in found)
    assert np.__file__ is not None
    assert Path(np.__file__).read_bytes() not in found
    assert open_corpus().fingerprint == corpus.fingerprint


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "a.txt", "één\n\ntwo\n"))
    assert documents(corpus) == ["één\n\ntwo\n".encode()]
    assert corpus.tokens.dtype == np.uint8


def test_jsonl_has_one_document_per_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(["one", "zwei ✓", ""])]
    path = write(tmp_path / "a.jsonl", "\n".join([lines[0], "", *lines[1:]]))
    assert documents(open_corpus(str(path))) == [b"one", "zwei ✓".encode()]


def test_the_field_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson", '{"body": "x", "text": "y"}\n')
    assert documents(open_corpus(path, field="body")) == [b"x"]


def test_parquet_has_one_document_per_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", id=[1, 2], text=["one", "two"])
    assert documents(open_corpus(path)) == [b"one", b"two"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write(tmp_path / "b" / "x.txt", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "b.jsonl", '{"text": "third"}')
    write(tmp_path / ".hidden", b"\xff")
    write(tmp_path / ".git" / "config", b"\xff")
    write(tmp_path / "c" / "empty.txt", "")
    assert documents(open_corpus(tmp_path)) == [b"first", b"second", b"third"]


def test_fingerprints_tell_corpora_apart() -> None:
    prints = {Corpus.of("x", t).fingerprint for t in (["ab"], ["a", "b"], ["ab "], ["abc"])}
    assert len(prints) == 4
    assert Corpus.of("x", ["ab"]).fingerprint == Corpus.of("y", [b"ab"]).fingerprint


# What is said


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", UndecodableTextError, "a.txt:2: .* byte 0xff is not UTF-8"),
        ("a.txt", b"one\n\ntwo\0\n", UndecodableTextError, "a.txt:3: .* NUL"),
        ("a.txt", "text".encode("utf-16"), UndecodableTextError, "a.txt:1: "),
        ("a.txt", b"", EmptyCorpusError, "a.txt: expected text, found an empty file"),
        ("a.jsonl", b"\n\n", EmptyCorpusError, "a.jsonl: expected text"),
        ("a.jsonl", b'{"text": ""}', EmptyCorpusError, "a.jsonl: expected text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', InvalidRecordError, "a.jsonl:2: .* JSON object"),
        ("a.jsonl", b"\n[1]\n", InvalidRecordError, "a.jsonl:2: .* found a list"),
        ("a.jsonl", b'{"text": 3}', InvalidRecordError, "a.jsonl:1: .*'text', found a int"),
        ("a.jsonl", b'{"text": null}', InvalidRecordError, "a.jsonl:1: .* found nothing"),
        ("a.jsonl", b'{"txet": "a"}', MissingFieldError, "a.jsonl:1: .* did you mean 'txet'"),
        ("a.jsonl", b'{"text": "\\u0000"}', UndecodableTextError, "a.jsonl:1: .* NUL"),
        ("a.jsonl", b'{"text": "\\ud800"}', UndecodableTextError, "a.jsonl:1: .* surrogate"),
        ("a.jsonl", b'{"text": "a"}\n\xff', UndecodableTextError, "a.jsonl:2: .* 0xff"),
        ("a.parquet", b"no parquet", UnreadableFileError, "a.parquet: no Parquet file"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_bad_files_are_named(
    tmp_path: Path, name: str, content: bytes, error: type[DataError], message: str, inside: bool
) -> None:
    path = write(tmp_path / "data" / name, content)
    if inside and error is EmptyCorpusError:
        message = "data: expected text, found only empty files"
    with pytest.raises(error, match=message):
        open_corpus(path.parent if inside else path)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"nowhere\.txt: no such file or folder"):
        open_corpus(tmp_path / "nowhere.txt")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmptyCorpusError, match="found no files in it"):
        open_corpus(tmp_path)


def test_a_broken_link_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UnreadableFileError, match=r"link\.txt: no such file"):
        open_corpus(tmp_path)


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    path = write(tmp_path / "a.txt", "secret")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UnreadableFileError, match=r"a\.txt: permission denied"):
        open_corpus(path)


def test_parquet_columns_and_rows_are_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", texts=["x"], id=[1])
    with pytest.raises(MissingFieldError, match=r"a\.parquet: .* did you mean 'texts'"):
        open_corpus(path)
    path = parquet(tmp_path / "b.parquet", text=["x", None])
    with pytest.raises(InvalidRecordError, match=r"b\.parquet:2: .* found nothing"):
        open_corpus(path)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"a\.parquet: .*'shardflax\[data\]'"):
        open_corpus(path)


# Tokens


@given(st.text())
def test_decode_undoes_encode(text: str) -> None:
    assert decode(encode(text)) == text


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"))))
def test_documents_can_be_told_apart(texts: list[str]) -> None:
    kept = [t for t in texts if t]
    if kept:
        assert documents(Corpus.of("any", texts)) == [t.encode() for t in kept]
    else:
        with pytest.raises(EmptyCorpusError):
            Corpus.of("any", texts)


@given(st.lists(st.integers(0, 255), min_size=1))
def test_unigram_loss_is_the_cross_entropy_of_the_frequencies(tokens: list[int]) -> None:
    expected = np.mean([-np.log(tokens.count(t) / len(tokens)) for t in tokens])
    assert unigram_loss(tokens) == pytest.approx(expected, abs=1e-12)
    assert unigram_loss(np.array(tokens).reshape(1, -1)) == unigram_loss(tokens)
