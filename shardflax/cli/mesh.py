"""Meshes of a command that needs no devices: their number is one more option."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardflax.cli.errors import CommandError
from shardflax.mesh_options import MeshOptions, options_for_a_cure
from shardflax.partitioning.explained import mesh_of_spec

__all__ = ["AbstractMeshOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractMeshOptions(MeshOptions):
    """What is said about a mesh without devices beside its spec.

    >>> AbstractMeshOptions(devices=8).read("fsdp=-1,tensor=2")[0].shape["fsdp"]
    4
    """

    devices: int | None = None
    """How many devices there are: -1 in the mesh is what is left of them. None is looked for."""

    def read(self, spec: str) -> tuple[Any, dict[str, int]]:
        """The mesh, without devices, and the size of each axis across slices.

        Raises `MeshSpecError` or `UnknownAxisError`, with options for a cure, or `CommandError`
        for no devices.

        >>> AbstractMeshOptions().read("fsdp=-1")
        Traceback (most recent call last):
            ...
        shardflax.partitioning.errors.MeshSpecError: mesh 'fsdp=-1': nothing says how many devices
        there are, of which -1 is what is left. Write the size, or --devices 256.
        """
        if self.devices is not None and self.devices < 1:
            raise CommandError(f"--devices {self.devices}: there is at least one.")
        with options_for_a_cure():
            return mesh_of_spec(spec, self.devices, **self.said)
