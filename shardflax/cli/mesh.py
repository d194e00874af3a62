"""Meshes of a command: a spec, and as options what Python would say beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from shardflax.partitioning import LayoutError, make_mesh
from shardflax.partitioning.explained import mesh_of_spec

__all__ = ["MeshOptions"]

_KEYWORD = re.compile(r"make_(?:abstract_)?mesh\(\.\.\., (\w+)=(?:\('(\w+)',\)|(\w+))\)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """What is said about a mesh beside its spec.

    >>> MeshOptions(devices=8).read("fsdp=-1,tensor=2")[0].shape["fsdp"]
    4
    """

    devices: int | None = None
    """How many devices there are: -1 in the mesh is what is left of them. None is looked for."""

    across_dcn: tuple[str, ...] = ()
    """Of tensor and context, those that may be across slices: every layer sends along them."""

    other_axes: tuple[str, ...] = ()
    """Axes that look like a slip for one that the presets know, and are none."""

    def read(self, spec: str) -> tuple[Any, dict[str, int]]:
        """The mesh, without devices, and the size of each axis across slices.

        Raises `MeshSpecError` or `UnknownAxisError`, with options for a cure.

        >>> MeshOptions().read("fsdp=-1")
        Traceback (most recent call last):
            ...
        shardflax.partitioning.errors.MeshSpecError: mesh 'fsdp=-1': nothing says how many devices
        there are, of which -1 is what is left. Write the size, or --devices 256.
        """
        with _options_for_a_cure():
            return mesh_of_spec(spec, self.devices, **self._said)

    def place(self, spec: str, devices: list[Any]) -> Any:
        """The same on these devices.

        >>> import jax
        >>> dict(MeshOptions().place("fsdp=-1", jax.devices()[:4]).shape)
        {'fsdp': 4}
        """
        with _options_for_a_cure():
            return make_mesh(spec, devices, **self._said)

    @property
    def _said(self) -> dict[str, Any]:
        return {"across_dcn": self.across_dcn, "other_axes": self.other_axes}


@contextlib.contextmanager
def _options_for_a_cure() -> Iterator[None]:
    """Errors say options of the command where they would say keywords of Python's."""
    try:
        yield
    except LayoutError as error:
        raise type(error)(_KEYWORD.sub(_option, str(error))) from None


def _option(call: re.Match[str]) -> str:
    """A keyword of `make_mesh` as the option of its name."""
    return f"--{call[1].replace('_', '-')} {call[2] or call[3]}"
