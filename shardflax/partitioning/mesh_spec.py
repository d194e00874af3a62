"""Reading a mesh spec: `"fsdp=4,tensor=-1"`, `"dcn(data=2) ici(fsdp=16,tensor=4)"`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shardflax.partitioning.errors import MeshSpecError, UnknownAxisError
from shardflax.partitioning.vocabulary import KNOWN_AXES

__all__ = ["MeshSpec", "parse_mesh_spec"]

_PART = re.compile(r"\s*(dcn|ici)\s*\(([^()]*)\)\s*,?")
_SIZE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(-?\d+)\s*")
_HOW = "Write 'fsdp=4,tensor=2', or 'dcn(data=2) ici(fsdp=16,tensor=4)'; one -1 for what is left."


@dataclass(frozen=True)
class MeshSpec:
    """Axes in mesh order, and the size of each inside a slice (ICI) and across slices (DCN)."""

    text: str
    axes: tuple[str, ...]
    ici: tuple[int, ...]
    dcn: tuple[int, ...]

    def fill(self, devices: int, slices: int | None) -> MeshSpec:
        """The spec with each -1 replaced, for so many devices (in so many slices, if known).

        Raises `MeshSpecError` if the sizes do not multiply to the devices.
        """
        dcn, ici = self.dcn, self.ici
        if -1 in dcn:
            if slices is None:
                slices = _left(devices, ici) if -1 not in ici else None
            if slices is None:
                raise MeshSpecError(
                    f"mesh {self.text!r}: nothing says how many slices there are. Write the "
                    f"number in dcn(...)."
                )
            dcn = _fill(dcn, slices)
        count = math.prod(dcn)
        if -1 in ici:
            ici = _fill(ici, devices // count if count else 0)
        need = count * math.prod(ici)
        if need != devices:
            raise MeshSpecError(self._misfit(devices, need))
        if slices is not None and count != slices:
            raise MeshSpecError(
                f"mesh {self.text!r}: dcn(...) multiplies to {count}, but the devices are in "
                f"{slices} slices. Write dcn(...) sizes that multiply to {slices}."
            )
        return MeshSpec(self.text, self.axes, ici, dcn)

    def _misfit(self, devices: int, need: int) -> str:
        """The text for sizes that do not multiply to the number of devices."""
        sizes = [d * i for d, i in zip(self.dcn, self.ici, strict=True)]
        if -1 in self.ici or -1 in self.dcn:
            rest = math.prod(s for s in (*self.ici, *self.dcn) if s != -1)
            return (
                f"mesh {self.text!r}: the sizes that are given multiply to {rest}, which does "
                f"not divide the {devices} devices. Change one of them."
            )
        fits = [
            f"{axis}={devices * size // need}"
            for axis, size in zip(self.axes, sizes, strict=True)
            if devices * size % need == 0 and devices * size >= need
        ]
        hint = f" Write {' or '.join(fits)}, or" if fits else " Write"
        more = f" or pass devices=jax.devices()[:{need}]" if need < devices else ""
        return (
            f"mesh {self.text!r} needs {need} devices, and there are {devices}.{hint} -1 for one "
            f"of the axes (what is left){',' if more else ''}{more}."
        )


def parse_mesh_spec(spec: str | Mapping[str, int], other_axes: Collection[str] = ()) -> MeshSpec:
    """Reads a spec; known axes come in the order of `KNOWN_AXES`, others after them as written.

    Raises `MeshSpecError` for syntax, sizes below 1 (but -1), an axis twice, or two -1 in one
    network; `UnknownAxisError` for an axis that looks like a slip for a known one and is not in
    `other_axes`.

    >>> parse_mesh_spec("tensor=2,fsdp=-1").axes
    ('fsdp', 'tensor')
    """
    text = spec if isinstance(spec, str) else ",".join(f"{k}={v}" for k, v in spec.items())
    networks = _networks(text)
    written = [axis for sizes in networks.values() for axis in sizes]
    for axis in written:
        _check_axis(text, axis, other_axes)
    known = [axis for axis in KNOWN_AXES if axis in written]
    axes = tuple(dict.fromkeys([*known, *written]))
    ici, dcn = (tuple(networks[net].get(axis, 1) for axis in axes) for net in ("ici", "dcn"))
    return MeshSpec(text, axes, ici, dcn)


def _networks(text: str) -> dict[str, dict[str, int]]:
    """The sizes of each network; a spec without parts is all ICI."""
    if "(" not in text and ")" not in text:
        return {"dcn": {}, "ici": _sizes(text, text)}
    found: dict[str, dict[str, int]] = {}
    rest = text
    while match := _PART.match(rest):
        if match[1] in found:
            raise MeshSpecError(f"mesh {text!r}: {match[1]}(...) stands twice. {_HOW}")
        found[match[1]] = _sizes(match[2], text)
        rest = rest[match.end() :]
    if rest.strip():
        raise MeshSpecError(f"mesh {text!r}: cannot read {rest.strip()!r}. {_HOW}")
    return {"dcn": {}, "ici": {}} | found


def _sizes(part: str, text: str) -> dict[str, int]:
    """`axis=size` pairs."""
    sizes: dict[str, int] = {}
    for item in part.split(","):
        match = _SIZE.fullmatch(item)
        if not match:
            raise MeshSpecError(f"mesh {text!r}: cannot read {item.strip()!r}. {_HOW}")
        axis, size = match[1], int(match[2])
        if axis in sizes:
            raise MeshSpecError(f"mesh {text!r}: the axis {axis!r} stands twice.")
        if size < 1 and size != -1:
            raise MeshSpecError(f"mesh {text!r}: {axis}={size} is no size. {_HOW}")
        sizes[axis] = size
    if list(sizes.values()).count(-1) > 1:
        raise MeshSpecError(f"mesh {text!r}: only one axis of a network can be -1.")
    return sizes


def _check_axis(text: str, axis: str, other_axes: Collection[str]) -> None:
    """Refuses an axis name that looks like a slip for a known one."""
    if axis in KNOWN_AXES or axis in other_axes:
        return
    close = difflib.get_close_matches(axis, KNOWN_AXES, n=1, cutoff=0.7)
    if close:
        raise UnknownAxisError(
            f"mesh {text!r}: {axis!r} is not an axis that the presets know: did you mean "
            f"{close[0]!r}? If {axis!r} is meant, say so: make_mesh(..., other_axes=({axis!r},))."
        )


def _left(total: int, sizes: tuple[int, ...]) -> int:
    return total // math.prod(sizes)


def _fill(sizes: tuple[int, ...], total: int) -> tuple[int, ...]:
    """`sizes` with the -1 replaced so that they multiply to `total`, or to less if they cannot."""
    rest = -math.prod(sizes)
    return tuple((max(total // rest, 1) if size == -1 else size) for size in sizes)
