"""What a lock file holds of a layout: values that compare, and are plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardflax.partitioning.table import bytes_text

__all__ = ["LockEntry", "LockedCollective", "LockedLeaf"]


@dataclass(frozen=True)
class LockedLeaf:
    """One leaf: dtype and shape, names and axes of each dim as text, bytes per device.

    >>> print(LockedLeaf("float32[8,4]", "embed, -", "fsdp, -", 32))
    float32[8,4] (embed, -) lies as (fsdp, -)
    """

    array: str
    names: str
    spec: str
    bytes_per_device: int

    def __str__(self) -> str:
        return f"{self.array} ({self.names}) lies as ({self.spec})"


@dataclass(frozen=True)
class LockedCollective:
    """Collectives of one kind, over the same axes and network, of one size, and how often they run.

    `exact` is false for those in a loop of unknown length, where a step of the loop counts.

    >>> print(LockedCollective("all-gather", "fsdp", "ICI", 2048, 3))
    all-gather over fsdp (ICI), 2.0 KiB
    """

    kind: str
    axes: str
    network: str
    bytes: int
    count: int
    exact: bool = True

    def __str__(self) -> str:
        return f"{self.kind} over {self.axes} ({self.network}), {bytes_text(self.bytes)}"

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.bytes * self.count


@dataclass(frozen=True)
class LockEntry:
    """One layout in a lock file; `lock` makes it.

    `collectives` None: nobody asked for them.  `memory` is what the program takes on a device, in
    bytes: `arguments` as the device stores them, `outputs` that take the place of no argument, and
    `temporary`.  `compiler` says what compiled it.

    >>> LockEntry("fsdp=4", "fsdp", 0, {}).collectives is None
    True
    """

    mesh: str
    rules: str
    bytes_per_device: int
    leaves: Mapping[str, LockedLeaf]
    collectives: tuple[LockedCollective, ...] | None = None
    compiler: str = ""
    asked: Mapping[str, Any] = field(default_factory=dict[str, Any])
    memory: Mapping[str, int] | None = None
