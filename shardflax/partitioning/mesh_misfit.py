"""What to answer where the sizes of a mesh spec do not multiply to the devices there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from shardflax.partitioning.vocabulary import INSIDE_A_SLICE

if TYPE_CHECKING:
    from shardflax.partitioning.mesh_spec import MeshSpec

__all__ = ["misfit", "other_slices"]


def misfit(spec: MeshSpec, devices: int, need: int, fixed: bool = False) -> str:
    """The text for sizes that multiply to `need`, and not to the number of devices.

    `fixed` says that the sizes across slices are right.

    >>> from shardflax.partitioning.mesh_spec import parse_mesh_spec
    >>> print(misfit(parse_mesh_spec("fsdp=3,tensor=-1"), 8, 6))
    mesh 'fsdp=3,tensor=-1': the sizes that are given multiply to 3, which does not divide the
    8 devices. Write fsdp=2 or fsdp=4.
    """
    if -1 in spec.ici or -1 in spec.dcn:
        rest = math.prod(s for s in (*spec.ici, *spec.dcn) if s != -1)
        how = _or(_near(spec, devices, rest)) or "other sizes"
        return (
            f"mesh {spec.text!r}: the sizes that are given multiply to {rest}, which does not "
            f"divide the {devices} devices. Write {how}."
        )
    ways = [
        " or ".join(_exact(spec, devices, need, fixed)),
        "-1 for one of the axes (what is left)",
    ]
    if need < devices:
        ways.append(f"pass devices=jax.devices()[:{need}]")
    how = ", or ".join(way for way in ways if way)
    return f"mesh {spec.text!r} needs {need} devices, and there are {devices}. Write {how}."


def other_slices(spec: MeshSpec, devices: int, slices: int, count: int) -> str:
    """The text for sizes across slices that multiply to `count`, and not to the slices there are.

    >>> from shardflax.partitioning.mesh_spec import parse_mesh_spec
    >>> print(other_slices(parse_mesh_spec("fsdp=8"), 8, 2, 1))
    mesh 'fsdp=8': the 8 devices are in 2 slices, and no axis is across slices. Write
    'dcn(data=2) ici(fsdp=4)' or 'dcn(fsdp=2) ici(fsdp=4)'.
    """
    if slices == 1:
        return (
            f"mesh {spec.text!r}: the {devices} devices are in one slice, and dcn(...) multiplies "
            f"to {count}. Put these axes into ici(...)."
        )
    if count == 1:
        said, how = "no axis is across slices", _or(_cut(spec, slices))
    else:
        said = f"dcn(...) multiplies to {count}"
        how = _or(f"dcn({way})" for way in _changed(spec, spec.dcn, slices, count))
    how = how or f"dcn(...) sizes that multiply to {slices}"
    return (
        f"mesh {spec.text!r}: the {devices} devices are in {slices} slices, and {said}. "
        f"Write {how}."
    )


def _or(ways: Iterable[str]) -> str:
    """An enumeration of what can be written."""
    return " or ".join(ways)


def _exact(spec: MeshSpec, devices: int, need: int, fixed: bool) -> list[str]:
    """Which one size, changed, would make `need` the number of devices."""
    inside = _changed(spec, spec.ici, devices, need)
    if max(spec.dcn) == 1:
        return inside
    across = [] if fixed else _changed(spec, spec.dcn, devices, need)
    return [f"ici({way})" for way in inside] + [f"dcn({way})" for way in across]


def _changed(spec: MeshSpec, sizes: tuple[int, ...], wanted: int, product: int) -> list[str]:
    """Which one of `sizes`, changed, would turn `product` into `wanted`."""
    return [
        f"{axis}={wanted * size // product}"
        for axis, size in zip(spec.axes, sizes, strict=True)
        if (size > 1 or max(sizes) == 1) and wanted * size % product == 0
    ]


def _near(spec: MeshSpec, devices: int, rest: int) -> Iterator[str]:
    """The sizes nearest to those given with which their product would divide the devices."""
    plain = max(spec.dcn) == min(spec.dcn) == 1
    for network, sizes in (("dcn", spec.dcn), ("ici", spec.ici)):
        for axis, size in zip(spec.axes, sizes, strict=True):
            if size <= 1 or devices % (rest // size):
                continue
            room = devices // (rest // size)
            divisors = [d for d in range(1, room + 1) if room % d == 0]
            below, above = ([d for d in divisors if d < size], [d for d in divisors if d > size])
            for found in below[-1:] + above[:1]:
                yield f"{axis}={found}" if plain else f"{network}({axis}={found})"


def _cut(spec: MeshSpec, slices: int) -> Iterator[str]:
    """Specs that put a part of one axis across slices, under its own name or as `data`."""
    dims = [dim for dim, size in enumerate(spec.ici) if size > 1 and size % slices == 0]
    if not dims:
        return
    cut = min(dims, key=lambda dim: spec.axes[dim] in INSIDE_A_SLICE)
    inside = [size // slices if dim == cut else size for dim, size in enumerate(spec.ici)]
    pairs = zip(spec.axes, inside, strict=True)
    rest = ",".join(f"{axis}={size}" for axis, size in pairs if size != 1)
    across = ["data"] if "data" not in spec.axes else []
    across += [spec.axes[cut]] if spec.axes[cut] not in (*INSIDE_A_SLICE, *across) else []
    for axis in across:
        yield f"'dcn({axis}={slices}) ici({rest})'" if rest else f"'dcn({axis}={slices})'"
