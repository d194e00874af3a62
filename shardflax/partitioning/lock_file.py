"""Lock files: layouts and collectives written down, and what has changed since.

A lock file is JSON, one line a leaf, everything in order, so that a change of a layout is a
readable change of a file that is under version control.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import Mesh

from shardflax.partitioning.communication import Collective
from shardflax.partitioning.errors import LayoutError, LockDriftError, LockFileError, kind_of
from shardflax.partitioning.layout import Layout, check_layout
from shardflax.partitioning.leaf import Leaf
from shardflax.partitioning.lock_changes import changes_between
from shardflax.partitioning.locked import LockedCollective, LockedLeaf, LockEntry
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.topology import libtpu_version

__all__ = ["check_lock", "lock", "read_lock", "write_lock"]

_FORMAT, _VERSION = "shardflax.lock", 1
_ANEW = "Take it from version control again, or write it anew."


def lock(
    layout: Layout,
    collectives: Iterable[Collective] | None = None,
    *,
    asked: Mapping[str, Any] | None = None,
    memory: Any = None,
) -> LockEntry:
    """What is to be kept of a layout, and of the collectives of its compiled train step.

    `collectives` None says nothing about them, and `memory` None (or else what the step's
    `memory_analysis()` gives) nothing about that.  `asked` is kept as it is, for whoever makes the
    entry anew: any JSON.  Raises the layout's problems, if it has any.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import LogicallyPartitioned, make_abstract_mesh, preset
    >>> kernel = LogicallyPartitioned(jnp.ones((64, 96)), ("embed", "mlp"))
    >>> entry = lock(Layout({"w": kernel}, make_abstract_mesh("fsdp=4"), preset("fsdp")))
    >>> entry.leaves["w"].bytes_per_device
    6144
    """
    check_layout(layout)
    layout.check()
    rules = layout.rules
    sent, compiler = None, ""
    if collectives is not None:
        sent = _merged(collectives)
        compiler = f"jax {jax.__version__}{_libtpu(layout)} for {_platform(layout)}"
    return LockEntry(
        mesh=", ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items()),
        rules=rules.title if isinstance(rules, AxisRules) else "plain pairs",
        bytes_per_device=layout.bytes_per_device,
        leaves={leaf.where: _locked(leaf) for leaf in layout.leaves},
        collectives=sent,
        compiler=compiler,
        asked=dict(asked or {}),
        memory=None if memory is None else _memory(memory),
    )


def check_lock(
    entry: LockEntry,
    layout: Layout,
    collectives: Iterable[Collective] | None = None,
    memory: Any = None,
) -> None:
    """Checks that a layout, and the collectives and the memory of its step, are what was locked.

    Collectives and memory are compared if they are given.  Raises `LockDriftError`, whose `changes`
    are all differences, with what it was and what it is.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import LogicallyPartitioned, make_abstract_mesh, preset
    >>> kernel = LogicallyPartitioned(jnp.ones((64, 96)), ("embed", "mlp"))
    >>> entry = lock(Layout({"w": kernel}, make_abstract_mesh("fsdp=4"), preset("fsdp")))
    >>> check_lock(entry, Layout({"w": kernel}, make_abstract_mesh("fsdp=8"), preset("fsdp")))
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.LockDriftError: the layout is not what was locked:
    mesh: fsdp=4 -> fsdp=8
    bytes per device: 6.0 KiB -> 3.0 KiB (-3.0 KiB)
    ~ -3.0 KiB a leaf: w
    """
    if not isinstance(cast(Any, entry), LockEntry):
        raise LayoutError(
            f"check_lock: an entry of a lock file is expected, not {kind_of(entry)}. Write "
            f"read_lock(path)['its name']."
        )
    now = lock(layout, collectives, memory=memory)
    if collectives is None:
        entry = replace(entry, collectives=None, compiler="")
    if memory is None:
        entry = replace(entry, memory=None)
    changes = changes_between(entry, now)
    if changes:
        raise LockDriftError(changes)


def read_lock(path: str | Path) -> dict[str, LockEntry]:
    """The entries of a lock file, by name.

    Raises `LockFileError` for a file that is not there, is no lock file, or is of another version.

    >>> read_lock("no/such.lock")
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.LockFileError: no/such.lock: there is no such file. write_lock
    writes one, or `shardflax lock MODEL --mesh ...`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_merged(path, text)
        found = json.loads(text, object_pairs_hook=_once)
    except FileNotFoundError:
        how = "write_lock writes one, or `shardflax lock MODEL --mesh ...`."
        raise LockFileError(path, f"there is no such file. {how}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LockFileError(path, f"it cannot be read: {error}. {_ANEW}") from None
    if not isinstance(found, dict) or cast("Any", found).get("format") != _FORMAT:
        raise LockFileError(path, f'it is no lock file: "format": "{_FORMAT}" is not in it.')
    values = cast("dict[str, Any]", found)
    version, entries = values.get("version"), values.get("entries")
    if version != _VERSION:
        how = "Read it with the version of shardflax that wrote it, or write it anew with this one."
        text = f"it is of version {version!r}, and this library reads version {_VERSION}. {how}"
        raise LockFileError(path, text)
    if not isinstance(entries, dict):
        raise LockFileError(path, f'it has no "entries". {_ANEW}')
    read: dict[str, LockEntry] = {}
    for name, entry in cast("dict[str, Any]", entries).items():
        try:
            read[name] = _entry(entry)
        except KeyError as error:
            text = f"the entry {name!r} lacks {error.args[0]!r}. {_ANEW}"
            raise LockFileError(path, text) from None
        except (TypeError, AttributeError):
            text = f"the entry {name!r} holds something else than was written. {_ANEW}"
            raise LockFileError(path, text) from None
    return read


def write_lock(path: str | Path, entries: Mapping[str, LockEntry]) -> Path:
    """Writes a lock file: sorted, a line for each leaf and collective; equal entries, equal files.

    What was there is replaced as a whole.  Raises `LockFileError` where nothing can be written.

    >>> import tempfile
    >>> entry = LockEntry(
    ...     "fsdp=4", "fsdp", 64, {"w": LockedLeaf("float32[64]", "embed", "fsdp", 64)}
    ... )
    >>> path = write_lock(Path(tempfile.mkdtemp(), "shardflax.lock"), {"mine": entry})
    >>> read_lock(path)["mine"] == entry
    True
    """
    listed = {name: _values(entries[name]) for name in sorted(entries)}
    values = {"format": _FORMAT, "version": _VERSION, "entries": listed}
    path = Path(path)
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        written.write_text(_dump(values) + "\n", encoding="utf-8")
        written.replace(path)
    except OSError as error:
        written.unlink(missing_ok=True)
        raise LockFileError(path, f"it cannot be written: {error.strerror}.") from None
    return path


_MARK = re.compile(r"^(<{7}|\|{7}|={7}|>{7})( |$)", re.MULTILINE)


def _check_merged(path: str | Path, text: str) -> None:
    if mark := _MARK.search(text):
        line = text.count("\n", 0, mark.start()) + 1
        how = "Keep either side, and renew what is asked for: shardflax lock."
        raise LockFileError(path, f"line {line} is a mark of a merge that is not done. {how}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, if each key stands there once: a merge of lines may leave two."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


_ABOUT = ("asked", "mesh", "rules", "bytes_per_device", "compiler", "memory")


def _values(entry: LockEntry) -> dict[str, Any]:
    """An entry as JSON, what is not known left out."""
    values: dict[str, Any] = dict(vars(entry))
    values["leaves"] = {path: asdict(entry.leaves[path]) for path in sorted(entry.leaves)}
    values["asked"] = dict(sorted(entry.asked.items()))
    values["collectives"] = [_sent(one) for one in entry.collectives or ()]
    if entry.collectives is None:
        del values["collectives"], values["compiler"]
    if entry.memory is None:
        del values["memory"]
    return {key: values[key] for key in (*_ABOUT, "collectives", "leaves") if key in values}


def _sent(one: LockedCollective) -> dict[str, Any]:
    values = asdict(one)
    if one.exact:
        del values["exact"]
    return values


def _entry(values: Mapping[str, Any]) -> LockEntry:
    sent = values.get("collectives")
    leaves = {path: LockedLeaf(**leaf) for path, leaf in values["leaves"].items()}
    collectives = None if sent is None else tuple(LockedCollective(**one) for one in sent)
    numbers = [values["bytes_per_device"], *(leaf.bytes_per_device for leaf in leaves.values())]
    numbers += [number for one in collectives or () for number in (one.bytes, one.count)]
    if not all(isinstance(number, int) for number in numbers):
        raise TypeError
    return LockEntry(
        mesh=values["mesh"],
        rules=values["rules"],
        bytes_per_device=values["bytes_per_device"],
        leaves=leaves,
        collectives=collectives,
        compiler=values.get("compiler", ""),
        asked=values.get("asked", {}),
        memory=values.get("memory"),
    )


def _dump(value: Any, depth: int = 0) -> str:
    """JSON in which an entry's leaves and collectives are one line each."""
    if depth >= 4 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    pad, end = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        items = [
            f"{pad}{json.dumps(key, ensure_ascii=False)}: {_dump(item, depth + 1)}"
            for key, item in cast("dict[str, Any]", value).items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{end}}}"
    items = [f"{pad}{_dump(item, depth + 1)}" for item in cast("list[Any]", value)]
    return "[\n" + ",\n".join(items) + f"\n{end}]"


def _memory(found: Any) -> dict[str, int]:
    """What the memory analysis of a program says of one device."""
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }


def _libtpu(layout: Layout) -> str:
    """The compiler, where it is a package of its own."""
    return f", libtpu {libtpu_version()}" if _platform(layout).startswith("TPU") else ""


def _platform(layout: Layout) -> str:
    mesh = layout.mesh
    return str(mesh.devices.flat[0].device_kind) if isinstance(mesh, Mesh) else "no devices"


def _locked(leaf: Leaf) -> LockedLeaf:
    parts = [spec_axes(entry) for entry in leaf.spec]
    parts += [()] * (len(leaf.shape) - len(parts))
    return LockedLeaf(
        f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]",
        "(unnamed)" if leaf.names is None else ", ".join(_text(name) for name in leaf.names),
        ", ".join(_text(axes) for axes in parts),
        leaf.bytes_per_device,
    )


def _text(part: Any) -> str:
    """A name, or the axes of a dim."""
    if isinstance(part, str):
        return part
    return "+".join(map(str, spec_axes(part))) or "-"


def _merged(collectives: Iterable[Collective]) -> tuple[LockedCollective, ...]:
    """Those that differ only in where they come from as one, in order."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for one in collectives:
        axes = ",".join(one.axes)
        counts[one.kind, axes, one.network, one.bytes, one.exact] += one.count
    found = (
        LockedCollective(kind, axes, network, size, count, exact)
        for (kind, axes, network, size, exact), count in counts.items()
    )
    return tuple(sorted(found, key=lambda c: (c.kind, c.axes, c.network, -c.bytes, c.exact)))
