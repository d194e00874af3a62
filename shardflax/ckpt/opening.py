"""Opening a step, whoever wrote it, and checking its files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardflax.ckpt.durable import FileRecord, checksum_file
from shardflax.ckpt.foreign import check_choice, find_item, first_format, open_orbax, read_json
from shardflax.ckpt.local_source import LocalSource
from shardflax.ckpt.manifest import NAME, Manifest
from shardflax.ckpt.orbax_files import EXTRAS, JSON_FILE, MARKER, OURS
from shardflax.ckpt.place import Place
from shardflax.ckpt.sources import OurSource, Source

__all__ = ["Opened", "claims_manifest", "damage", "is_data", "open_step"]


_SMALL = 1 << 20
"""Files up to this size are always checked as a whole."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A step that can be read: its arrays, and the JSON beside them; `manifest` if it is ours."""

    source: Source
    _extras: Place
    manifest: Manifest | None = None

    def extras(self) -> dict[str, Any]:
        """The extras; for a step of ours, all files are checked first, but not the arrays."""
        if self.manifest is not None:
            found = damage(self._extras.parent.parent, self.manifest.files, data=False)
            if found:
                raise ValueError("; ".join(found))
        elif not self._extras.is_file():
            return {}
        return read_json(self._extras)


def open_step(folder: Place) -> Opened:
    """Opens a step as far as to know what it holds.

    Raises ValueError, naming the file, if it is damaged or of no known kind.
    """
    extras = folder / EXTRAS / JSON_FILE
    if (folder / NAME).is_file():
        kind = LocalSource if isinstance(folder, Path) else OurSource
        return Opened(kind(folder, manifest := _manifest(folder)), extras, manifest)
    if claims_manifest(folder):
        raise ValueError(f"{folder / NAME} is missing")
    if (folder / "manifest" / "manifest.json").is_file():
        return Opened(first_format(folder), extras.with_name(f"{EXTRAS}.json"))
    item = find_item(folder)
    if item is None:
        raise ValueError(f"{folder} holds no checkpoint: neither {NAME} nor Orbax's files")
    check_choice(folder, item)
    return Opened(open_orbax(item), extras)


def _manifest(folder: Place) -> Manifest:
    try:
        return Manifest.read((folder / NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / NAME}: {error}") from error


@functools.singledispatch
def damage(
    folder: Any,
    files: Mapping[str, FileRecord],
    data: bool = True,
    heard: Callable[[int], object] = lambda nbytes: None,
) -> list[str]:
    """What is wrong with the files of a step, a line for each; `heard` hears of the bytes of each.

    Without `data`, of large data files only the sizes are looked at: what a restore reads of them,
    chunks and nodes of the database, has checksums of its own.

    >>> damage(Path("/nowhere"), {"f": (3, "00000000")})
    ['/nowhere/f is missing']
    """
    lines: list[str] = []
    for name, (size, crc) in sorted(files.items()):
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                lines.append(f"{path} has {found:,} bytes instead of {size:,}")
            elif (data or size <= _SMALL or not is_data(name)) and checksum_file(path, crc) != crc:
                lines.append(f"{path} is damaged (its checksum is wrong)")
        except FileNotFoundError:
            lines.append(f"{path} is missing")
        except OSError as error:
            lines.append(f"{path}: {error.strerror or error}")
        heard(size)
    return lines


def is_data(name: str) -> bool:
    """True for a file with arrays, whose parts have checksums of their own.

    >>> is_data("state/d/0a1b"), is_data("state/manifest.ocdbt")
    (True, False)
    """
    return Path(name).parent.name == "d"


def claims_manifest(folder: Place) -> bool:
    """True if Orbax's marker says that a manifest of ours belongs to the step.

    >>> claims_manifest(Path("/nowhere"))
    False
    """
    try:
        about = json.loads((folder / MARKER).read_bytes())
        return OURS in (about.get("custom_metadata") or {})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False
