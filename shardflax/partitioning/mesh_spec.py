"""Reading a mesh spec: `"fsdp=4,tensor=-1"`, `"dcn(data=2) ici(fsdp=16,tensor=4:explicit)"`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from shardflax.partitioning.errors import MeshSpecError, UnknownAxisError, kind_of
from shardflax.partitioning.mesh_misfit import misfit, other_slices
from shardflax.partitioning.vocabulary import KNOWN_AXES

__all__ = ["MeshSpec", "parse_mesh_spec"]

_PART = re.compile(r"\s*(dcn|ici)\s*\(([^()]*)\)\s*,?")
_SIZE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(-?\d+)\s*(?::\s*(\w+)\s*)?")
_NETWORKS = ("dcn", "ici")
_Sizes = dict[str, tuple[int, str | None]]
_HOW = "Write 'fsdp=4,tensor=2', or 'dcn(data=2) ici(fsdp=16,tensor=4)'; one -1 for what is left."


@dataclass(frozen=True)
class MeshSpec:
    """Axes in mesh order, and the size of each inside a slice (ICI) and across slices (DCN).

    `types` has the axis types that the spec says, None for the others.

    >>> print(parse_mesh_spec("dcn(data=2) ici(data=2,tensor=4:explicit)"))
    dcn(data=2) ici(data=2,tensor=4:explicit)
    """

    text: str
    axes: tuple[str, ...]
    ici: tuple[int, ...]
    dcn: tuple[int, ...]
    types: tuple[str | None, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each axis, over both networks; of a filled spec."""
        return tuple(d * i for d, i in zip(self.dcn, self.ici, strict=True))

    def fill(self, devices: int, slices: int | None) -> MeshSpec:
        """The spec with each -1 replaced, for so many devices (in so many slices, if known).

        Raises `MeshSpecError` if the sizes do not multiply to the devices.

        >>> parse_mesh_spec("dcn(data=-1) ici(fsdp=-1,tensor=2)").fill(16, 2).sizes
        (2, 4, 2)
        """
        dcn, ici = self.dcn, self.ici
        if -1 in dcn:
            if slices is None:
                slices = max(1, devices // math.prod(ici)) if -1 not in ici else None
            if slices is None:
                raise MeshSpecError(
                    f"mesh {self.text!r}: nothing says how many slices there are. Write the "
                    f"number in dcn(...)."
                )
            dcn = _fill(dcn, slices)
        count = math.prod(dcn)
        if -1 in ici:
            ici = _fill(ici, devices // count if count else 0)
        if slices is not None and count != slices:
            filled = replace(self, ici=ici, dcn=dcn)
            raise MeshSpecError(other_slices(filled, devices, slices, count))
        if slices is not None and devices % slices:
            raise MeshSpecError(
                f"mesh {self.text!r}: {slices} slices do not divide {devices} devices."
            )
        need = count * math.prod(ici)
        if need != devices:
            raise MeshSpecError(misfit(self, devices, need, slices is not None))
        return replace(self, ici=ici, dcn=dcn)

    def __str__(self) -> str:
        parts = {net: self._written(net) for net in _NETWORKS}
        if not parts["dcn"]:
            return parts["ici"]
        return " ".join(f"{net}({text})" for net, text in parts.items() if text)

    def _written(self, network: str) -> str:
        """The axes of one network, as they are written; those of size 1 if they are in no other."""
        dcn = network == "dcn"
        items: list[str] = []
        for axis, ici, across, kind in zip(self.axes, self.ici, self.dcn, self.types, strict=True):
            size = across if dcn else ici
            if size != 1 or (not dcn and across == 1):
                items.append(f"{axis}={size}" + (f":{kind}" if kind else ""))
        return ",".join(items)


def parse_mesh_spec(spec: str | Mapping[str, int], other_axes: Collection[str] = ()) -> MeshSpec:
    """Reads a spec; known axes come in the order of `KNOWN_AXES`, others after them as written.

    Raises `MeshSpecError` for syntax, sizes below 1 (but -1), an axis twice, two types of one
    axis, or two -1 in one network; `UnknownAxisError` for an axis that looks like a slip for a
    known one and is not in `other_axes`.

    >>> parse_mesh_spec("tensor=2,fsdp=-1").axes
    ('fsdp', 'tensor')
    """
    if not isinstance(cast(Any, spec), str | Mapping):
        raise MeshSpecError(f"a mesh is described by a text, not by {kind_of(spec)}. {_HOW}")
    text = spec if isinstance(spec, str) else ",".join(f"{k}={v}" for k, v in spec.items())
    networks = _networks(text)
    written = [axis for sizes in networks.values() for axis in sizes]
    for axis in written:
        _check_axis(text, axis, other_axes)
    known = [axis for axis in KNOWN_AXES if axis in written]
    axes = tuple(dict.fromkeys([*known, *written]))
    ici, dcn = (
        tuple(networks[net].get(axis, (1, None))[0] for axis in axes) for net in ("ici", "dcn")
    )
    return MeshSpec(text, axes, ici, dcn, tuple(_type(text, axis, networks) for axis in axes))


def _networks(text: str) -> dict[str, _Sizes]:
    """The sizes of each network; a spec without parts is all ICI."""
    if "(" not in text and ")" not in text:
        return {"dcn": {}, "ici": _sizes(text, text)}
    found: dict[str, _Sizes] = {}
    rest = text
    while match := _PART.match(rest):
        if match[1] in found:
            raise MeshSpecError(f"mesh {text!r}: {match[1]}(...) stands twice. {_HOW}")
        found[match[1]] = _sizes(match[2], text)
        rest = rest[match.end() :]
    if rest.strip():
        raise MeshSpecError(f"mesh {text!r}: cannot read {rest.strip()!r}. {_HOW}")
    return {"dcn": {}, "ici": {}} | found


def _sizes(part: str, text: str) -> _Sizes:
    """`axis=size` or `axis=size:type`, separated by commas."""
    sizes: _Sizes = {}
    for item in part.split(","):
        match = _SIZE.fullmatch(item)
        if not match:
            raise MeshSpecError(f"mesh {text!r}: cannot read {item.strip()!r}. {_HOW}")
        axis, size = match[1], int(match[2])
        if axis in sizes:
            raise MeshSpecError(f"mesh {text!r}: the axis {axis!r} stands twice.")
        if size < 1 and size != -1:
            raise MeshSpecError(f"mesh {text!r}: {axis}={size} is no size. {_HOW}")
        sizes[axis] = (size, match[3])
    if [size for size, _ in sizes.values()].count(-1) > 1:
        raise MeshSpecError(f"mesh {text!r}: only one axis of a network can be -1.")
    return sizes


def _type(text: str, axis: str, networks: Mapping[str, _Sizes]) -> str | None:
    """The type that the spec says for `axis`, in one network or in both."""
    said = {sizes[axis][1] for sizes in networks.values() if axis in sizes} - {None}
    if len(said) > 1:
        raise MeshSpecError(f"mesh {text!r}: {axis!r} is {' and '.join(sorted(map(str, said)))}.")
    return said.pop() if said else None


def _check_axis(text: str, axis: str, other_axes: Collection[str]) -> None:
    """Refuses an axis name that looks like a slip for a known one."""
    if axis in KNOWN_AXES or axis in other_axes:
        return
    close = difflib.get_close_matches(axis.lower(), KNOWN_AXES, n=1, cutoff=0.7)
    if close:
        raise UnknownAxisError(
            f"mesh {text!r}: {axis!r} is not an axis that the presets know: did you mean "
            f"{close[0]!r}? If {axis!r} is meant, say so: make_mesh(..., other_axes=({axis!r},))."
        )


def _fill(sizes: tuple[int, ...], total: int) -> tuple[int, ...]:
    """`sizes` with the -1 replaced so that they multiply to `total`, or to less if they cannot."""
    rest = -math.prod(sizes)
    return tuple((max(total // rest, 1) if size == -1 else size) for size in sizes)
