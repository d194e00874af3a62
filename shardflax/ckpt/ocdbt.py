"""The index of a checkpoint's chunks: a database in TensorStore's OCDBT format, version 0.

Values are where they are (in a node, or a range of a file); a B+tree in a file of its own leads to
them, and `manifest.ocdbt` to its root.  Written once, and without compression.  The format:
https://google.github.io/tensorstore/kvstore/ocdbt/.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np

__all__ = ["INLINE_BYTES", "MANIFEST", "Place", "Tree", "Value", "read_tree", "write_tree"]

MANIFEST = "manifest.ocdbt"

INLINE_BYTES = 1024
"""Values up to this size are in the nodes."""
_MOST_HEIGHT = 16
_MOST_NAMES_BYTES = 64 << 20
_NODE_BYTES = 1 << 20
"""About as large are nodes."""
_MOST_NODE_BYTES = 8 << 20
"""No node is larger."""
_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
"""What a manifest begins with, and what a node does."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A range of bytes in a file, named relative to the folder of the database.

    >>> Place("d/0", offset=10, length=2000).length
    2000
    """

    file: str
    offset: int
    length: int


Value = bytes | Place


@dataclasses.dataclass(frozen=True)
class Tree:
    """Nodes to be written to one file, and the manifest that leads to them.

    >>> Tree(b"nodes", b"manifest").nodes
    b'nodes'
    """

    nodes: bytes
    manifest: bytes


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node that was written: its range of keys, its place, and what is below it."""

    first: bytes
    last: bytes
    place: Place
    keys: int
    tree_bytes: int
    value_bytes: int

    @property
    def prefix(self) -> int:
        """How many bytes all its keys have in common."""
        return _common(self.first, self.last)


def write_tree(values: Mapping[str, Value], file: str) -> Tree:
    """The tree of some values; its nodes will be all that is in `file`.

    >>> tree = write_tree({"a": b"1", "b/c": Place("d/0", 10, 2000)}, "d/1")
    >>> read_tree(tree.manifest, lambda place: tree.nodes)
    {'a': b'1', 'b/c': Place(file='d/0', offset=10, length=2000)}
    """
    out = bytearray()
    entries = sorted((key.encode(), value) for key, value in values.items())
    groups = list(_cut(entries, lambda e: len(e[0]) + _inline_size(e[1]) + 16))
    level = [_write_leaf(group, out, file, root=len(groups) == 1) for group in groups]
    height = 0
    while len(level) > 1:
        height += 1
        rows = list(_cut(level, lambda node: len(node.first) + 40))
        level = [_write_inner(row, height, out, file, root=len(rows) == 1) for row in rows]
    return Tree(bytes(out), _manifest(level, height))


def _inline_size(value: Value) -> int:
    return len(value) if isinstance(value, bytes) else 0


def _cut(items: Sequence[Any], size: Callable[[Any], int]) -> Iterator[Sequence[Any]]:
    """Consecutive items, up to about the size of a node."""
    start = total = 0
    for i, item in enumerate(items):
        if total + size(item) > _NODE_BYTES and i - start > 1:
            yield items[start:i]
            start, total = i, 0
        total += size(item)
    if items:
        yield items[start:]


def _write_leaf(
    entries: Sequence[tuple[bytes, Value]], out: bytearray, file: str, root: bool
) -> _Node:
    """Appends a node of values."""
    first, last = entries[0][0], entries[-1][0]
    drop = 0 if root else _common(first, last)
    files = sorted({v.file for _, v in entries if isinstance(v, Place)})
    numbers = {name: i for i, name in enumerate(files)}
    values = [v for _, v in entries]
    places = [v for v in values if isinstance(v, Place)]
    prefixes, suffixes = _compressed([key[drop:] for key, _ in entries])
    lengths = [v.length if isinstance(v, Place) else len(v) for v in values]
    body = b"".join(
        (
            b"\0",
            _file_table(files),
            _varint(len(entries)),
            _varints(prefixes[1:]),
            _varints(map(len, suffixes)),
            *suffixes,
            _varints(lengths),
            _varints(int(isinstance(v, Place)) for v in values),
            _varints(numbers[p.file] for p in places),
            _varints(p.offset for p in places),
            *(v for v in values if isinstance(v, bytes)),
        )
    )
    place = _append(out, _sealed(_NODE_MAGIC, body), file)
    stored = sum(p.length for p in places)
    return _Node(first, last, place, len(entries), place.length, stored)


def _write_inner(
    nodes: Sequence[_Node], height: int, out: bytearray, file: str, root: bool
) -> _Node:
    """Appends a node of nodes."""
    first, last = nodes[0].first, nodes[-1].last
    drop = 0 if root else _common(first, last)
    prefixes, suffixes = _compressed([node.first[drop:] for node in nodes])
    body = b"".join(
        (
            bytes([height]),
            _file_table([file]),
            _varint(len(nodes)),
            _varints(prefixes[1:]),
            _varints(map(len, suffixes)),
            _varints(node.prefix - drop for node in nodes),
            *suffixes,
            _varints(0 for _ in nodes),
            _varints(node.place.offset for node in nodes),
            _varints(node.place.length for node in nodes),
            _varints(node.keys for node in nodes),
            _varints(node.tree_bytes for node in nodes),
            _varints(node.value_bytes for node in nodes),
        )
    )
    place = _append(out, _sealed(_NODE_MAGIC, body), file)
    return _Node(
        first,
        last,
        place,
        keys=sum(node.keys for node in nodes),
        tree_bytes=place.length + sum(node.tree_bytes for node in nodes),
        value_bytes=sum(node.value_bytes for node in nodes),
    )


def _manifest(level: Sequence[_Node], height: int) -> bytes:
    """The manifest of a database of one version, whose root is the only node of a level."""
    (root,) = level
    config = b"".join(
        (
            secrets.token_bytes(16),
            _varint(0),  # one manifest, in one file
            _varint(INLINE_BYTES),
            _varint(_MOST_NODE_BYTES),
            b"\x04",
            _varint(0),  # no compression
        )
    )
    place = root.place
    numbers = (place.offset, place.length, root.keys, root.tree_bytes, root.value_bytes)
    version = b"".join(
        (
            _varints((1, 1)),  # one version: the first generation
            bytes([height]),
            _varint(0),
            _varints(numbers),
            struct.pack("<Q", time.time_ns()),
        )
    )
    body = config + _file_table([place.file]) + version + _varint(0)
    return _sealed(_MANIFEST_MAGIC, body)


def _append(out: bytearray, node: bytes, file: str) -> Place:
    place = Place(file, len(out), len(node))
    out += node
    return place


def _sealed(magic: int, body: bytes) -> bytes:
    """With header and checksum; version 0, not compressed."""
    text = struct.pack(">I", magic) + struct.pack("<Q", len(body) + 18) + b"\0\0" + body
    return text + struct.pack("<I", google_crc32c.value(text))


def _file_table(files: Sequence[str]) -> bytes:
    """Names of files, in order."""
    prefixes, suffixes = _compressed([name.encode() for name in files])
    none = bytes(len(files))  # nothing of a name is handed down to the nodes below
    lengths = _varints(map(len, suffixes))
    return b"".join((_varint(len(files)), _varints(prefixes[1:]), lengths, none, *suffixes))


def _compressed(names: Sequence[bytes]) -> tuple[list[int], list[bytes]]:
    """How much each name has in common with the one before it, and the rest of it."""
    shared = [0, *(_common(a, b) for a, b in itertools.pairwise(names))]
    return shared[: len(names)], [n[k:] for n, k in zip(names, shared, strict=False)]


def _common(a: bytes, b: bytes) -> int:
    """The length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints(values: Iterable[int]) -> bytes:
    return b"".join(map(_varint, values))


def read_tree(manifest: bytes, read: Callable[[Place], bytes]) -> dict[str, Value]:
    """All values of a database, newest version; `read` gives the bytes of its nodes.

    Raises ValueError for what is damaged, or not what `write_tree` writes.

    >>> tree = write_tree({"a": b"1"}, "d/0")
    >>> read_tree(tree.manifest, lambda place: tree.nodes)
    {'a': b'1'}
    """
    data = _unsealed(manifest, _MANIFEST_MAGIC)
    data.take(16)
    kind, _, _ = data.varints(3)
    data.take(1)
    if kind or data.varint():
        raise ValueError("it is a database of another kind")
    files = _read_file_table(data, "")
    count = data.varint()
    data.varints(count)
    heights = data.take(count)
    numbers = data.varints(3 * count)
    if not count:
        return {}
    file, offset, length = numbers[count - 1 :: count]
    name, base = _pick(files, file)
    entries = _Reader(read).entries(Place(name, offset, length), heights[-1], b"", base)
    return {key.decode(): value for key, value in entries}


_Files = Sequence[tuple[str, str]]
"""Names of files, and what of each is handed down to the nodes below."""


class _Reader:
    """Walks down a tree, through each node once: nobody can make little data look like much."""

    def __init__(self, read: Callable[[Place], bytes]) -> None:
        self._read = read
        self._seen: set[Place] = set()

    def entries(
        self, place: Place, height: int, prefix: bytes, base: str
    ) -> Iterator[tuple[bytes, Value]]:
        """All that is below a node."""
        if height > _MOST_HEIGHT or not 0 < place.length <= 2 * _MOST_NODE_BYTES:
            raise ValueError(f"a node of height {height} with {place.length:,} bytes")
        if place in self._seen:
            raise ValueError("a node is part of it twice")
        self._seen.add(place)
        node = _unsealed(self._read(place), _NODE_MAGIC)
        if node.take(1)[0] != height:
            raise ValueError("a node is not at its height")
        files = _read_file_table(node, base)
        count = node.varint()
        if not height:
            yield from _values(node, files, count, prefix)
            return
        keys, cuts = _keys(node, count, inner=True)
        numbers = [node.varints(count) for _ in range(6)]
        for key, cut, file, offset, length in zip(keys, cuts, *numbers[:3], strict=True):
            name, below = _pick(files, file)
            child = Place(name, offset, length)
            yield from self.entries(child, height - 1, prefix + key[:cut], below)


def _values(
    node: _Bytes, files: _Files, count: int, prefix: bytes
) -> Iterator[tuple[bytes, Value]]:
    """What a leaf has."""
    keys, _ = _keys(node, count, inner=False)
    lengths, kinds = node.varints(count), node.varints(count)
    places = sum(map(bool, kinds))
    numbers, offsets = iter(node.varints(places)), iter(node.varints(places))
    for key, length, kind in zip(keys, lengths, kinds, strict=True):
        if kind:
            name, _ = _pick(files, next(numbers))
            yield prefix + key, Place(name, next(offsets), length)
        else:
            yield prefix + key, node.take(length)


def _keys(node: _Bytes, count: int, inner: bool) -> tuple[list[bytes], list[int]]:
    """The keys of a node; of an inner one, how much of each is handed down."""
    shared = [0, *node.varints(max(count - 1, 0))][:count]
    lengths = node.varints(count)
    cuts = node.varints(count) if inner else []
    return _expanded(node, shared, lengths), cuts


def _expanded(data: _Bytes, shared: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Names of which each begins like the one before it."""
    if sum(shared) + sum(lengths) > _MOST_NAMES_BYTES:
        raise ValueError("its names are too long")
    names: list[bytes] = []
    for k, length in zip(shared, lengths, strict=True):
        names.append((names[-1][:k] if names else b"") + data.take(length))
    return names


def _read_file_table(data: _Bytes, base: str) -> _Files:
    """Names of files, below a folder; none may lead out of it."""
    count = data.varint()
    shared = [0, *data.varints(max(count - 1, 0))][:count]
    lengths, bases = data.varints(count), data.varints(count)
    names = _expanded(data, shared, lengths)
    files = [(base + n.decode(), base + n[:k].decode()) for n, k in zip(names, bases, strict=True)]
    for (file, _), name in zip(files, names, strict=True):
        # What is handed down can end in the middle of a part, and "." is another name of a file.
        if name and ({"", ".", ".."} & set(file.split("/")) or "\0" in file):
            raise ValueError(f"it names a file outside of its folder: {file!r}")
    return files


def _pick(files: _Files, number: int) -> tuple[str, str]:
    if number >= len(files) or not files[number][0]:
        raise ValueError("it refers to a file that it does not name")
    return files[number]


def _unsealed(text: bytes, magic: int) -> _Bytes:
    """What is between header and checksum."""
    head = struct.pack(">I", magic) + struct.pack("<Q", len(text)) + b"\0\0"
    if len(text) < 18 or text[:14] != head:
        raise ValueError("it is no part of a database of this kind")
    if google_crc32c.value(text[:-4]) != int.from_bytes(text[-4:], "little"):
        raise ValueError("its checksum is wrong")
    return _Bytes(text[14:-4])


class _Bytes:
    """Bytes that are taken from start to end; never more than there are."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._array = np.frombuffer(data, np.uint8)
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self._data) - self._at:
            raise ValueError("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def varint(self) -> int:
        """The next number."""
        return self.varints(1)[0]

    def varints(self, count: int) -> list[int]:
        """The next numbers."""
        if count > len(self._data) - self._at:
            raise ValueError("it ends too early")
        part = self._array[self._at : self._at + 10 * count]
        ends = np.flatnonzero(part < 0x80)[:count] + 1
        if not count:
            return []
        starts = np.concatenate(([0], ends[:-1]))
        if len(ends) < count or (ends - starts).max() > 10:
            raise ValueError("a number is too long")
        self._at += int(ends[-1])
        values = np.zeros(count, np.uint64)
        for place in range(int((ends - starts).max())):
            there = starts + place < ends
            values[there] |= (part[starts[there] + place].astype(np.uint64) & 0x7F) << np.uint64(
                7 * place
            )
        return values.tolist()
