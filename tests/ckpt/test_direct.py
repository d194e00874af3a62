"""Files that go around the page cache: the same bytes, whatever the file system makes of it."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardflax.ckpt import direct
from shardflax.ckpt.direct import Cached, Direct, sink
from shardflax.ckpt.durable import DataFile, checksum_file

PARTS = [np.arange(n % 251, dtype=np.uint8) for n in range(200)]
BYTES = b"".join(part.tobytes() for part in PARTS)
"""Some blocks of `small_blocks`, and a part of one."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_BLOCK", 4096)


def written(path: Path) -> bytes:
    file = sink(path)
    for part in PARTS:
        file.put(part)
    file.put(b"")
    file.sync()
    file.close()
    file.close()
    return path.read_bytes()


def on_a_disk(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    monkeypatch.setattr(os, "major", lambda device: int(value))


def test_blocks_go_around_the_cache_and_the_end_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    sizes: list[int] = []
    open_file, write = os.open, os.write

    def opening(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        opened.append(flags)
        try:
            return open_file(path, flags, *args, **kwargs)
        except OSError:  # where the tests run there may be no such file system
            return open_file(path, flags & ~os.O_DIRECT & ~os.O_EXCL, *args, **kwargs)

    def writing(descriptor: int, data: Any) -> int:
        assert data.ctypes.data % 4096 == 0
        sizes.append(len(data))
        return write(descriptor, data)

    on_a_disk(monkeypatch, True)
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "write", writing)
    assert written(tmp_path / "f") == BYTES
    assert opened[0] & os.O_DIRECT and sizes == [4096] * (len(BYTES) // 4096)


@pytest.mark.parametrize("there", [True, False])
def test_a_file_system_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Some make the file, and then do not open it."""
    open_file = os.open

    def opening(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            if there:
                Path(path).touch()
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags, *args, **kwargs)

    on_a_disk(monkeypatch, True)
    monkeypatch.setattr(os, "open", opening)
    assert isinstance(sink(tmp_path / "g"), Cached)
    assert written(tmp_path / "f") == BYTES


@pytest.mark.parametrize("how", ["refused", "partly", "full"])
def test_a_disk_that_takes_no_such_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    write, calls = os.write, list[int]()

    def writing(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if how == "refused":
            raise OSError(errno.EINVAL, "Invalid argument")
        if how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:1024])

    file = Direct(os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT))
    monkeypatch.setattr(os, "write", writing)
    if how == "full":
        with pytest.raises(OSError, match="No space left"):
            file.put(BYTES)
    else:
        file.put(BYTES)
        file.sync()
        assert (tmp_path / "f").read_bytes() == BYTES
    file.close()


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_disk(monkeypatch, True)
    with pytest.raises(FileNotFoundError):
        sink(tmp_path / "none" / "f")
    (tmp_path / "f").touch()
    with pytest.raises(FileExistsError):
        sink(tmp_path / "f")
    assert (tmp_path / "f").exists()


@pytest.mark.parametrize("disk", [True, False])
def test_what_was_put_may_change_after_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: bool
) -> None:
    on_a_disk(monkeypatch, disk)
    file, data = DataFile(tmp_path), np.frombuffer(BYTES, np.uint8).copy()
    assert [file.append(data, b"1234"), file.append(data)] == [0, len(BYTES) + 4]
    file.flush()
    data[:] = 0
    size, check = file.close()
    path = tmp_path / file.name
    assert path.read_bytes() == BYTES + b"1234" + BYTES and size == 2 * len(BYTES) + 4
    assert checksum_file(path, check) == check
