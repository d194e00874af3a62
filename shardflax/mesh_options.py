"""Meshes of a command: a spec, and as options what Python would say beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from shardflax.partitioning import LayoutError, make_mesh
from shardflax.partitioning.errors import problems_text

__all__ = ["MeshOptions", "options_for_a_cure"]

_KEYWORD = re.compile(r"make_(?:abstract_)?mesh\(\.\.\., (\w+)=(?:\('(\w+)',\)|(\w+))\)")
_FEWER = re.compile(r", or pass devices=jax\.devices\(\)\[:\d+\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """What is said about a mesh beside its spec.

    >>> MeshOptions(other_axes=("fspd",)).place("fspd=-1").axis_names
    ('fspd',)
    """

    across_dcn: tuple[str, ...] = ()
    """Of tensor and context, those that may be across slices: every layer sends along them."""

    other_axes: tuple[str, ...] = ()
    """Axes that look like a slip for one that the presets know, and are none."""

    def place(self, spec: str, devices: Sequence[Any] | None = None) -> Any:
        """The mesh on these devices, or on all.

        Raises `MeshSpecError` or `UnknownAxisError`, with options for a cure.

        >>> import jax
        >>> dict(MeshOptions().place("fsdp=-1", jax.devices()[:4]).shape)
        {'fsdp': 4}
        >>> MeshOptions().place("fspd=-1")
        Traceback (most recent call last):
            ...
        shardflax.partitioning.errors.UnknownAxisError: mesh 'fspd=-1': 'fspd' is not an axis that
        the presets know: did you mean 'fsdp'? If 'fspd' is meant, say so: --other-axes fspd.
        """
        with options_for_a_cure():
            return make_mesh(spec, devices, **self.said)

    @property
    def said(self) -> dict[str, Any]:
        """What is said, as arguments of `make_mesh` and `make_abstract_mesh`."""
        return {"across_dcn": self.across_dcn, "other_axes": self.other_axes}


@contextlib.contextmanager
def options_for_a_cure(instead: str = "") -> Iterator[None]:
    """Errors say options of the command where they would say arguments of Python's.

    `instead` is what to say in place of changing rules or sizes in Python.

    >>> with options_for_a_cure():
    ...     make_mesh("dcn(tensor=2) ici(fsdp=4)")
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.MeshSpecError: ... or, if that is meant, say --across-dcn tensor.
    """
    try:
        yield
    except LayoutError as error:
        said = str(error)
        if instead and any(problem.cure for problem in error.problems):
            found = [problem.without_cure for problem in error.problems]
            said = f"{problems_text(found)}\n{instead}"
        said = _FEWER.sub("", _KEYWORD.sub(_option, said))
        if said == str(error):
            raise
        raise type(error)(said, error.problems) from None


def _option(call: re.Match[str]) -> str:
    """A keyword of `make_mesh` as the option of its name."""
    return f"--{call[1].replace('_', '-')} {call[2] or call[3]}"
