"""Leaves of scanned layers, `(layers, ...)` under one path, and of unrolled ones, one path each.

The paths differ in one component: `decoder/layers/kernel` against `decoder/layers_0/kernel`,
`decoder/layers_1/kernel`, ...; or, for lists of layers, `decoder/layers/0/kernel`, ...
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping

from shardflax.ckpt.leaves import LeafSpec
from shardflax.ckpt.paths import Names, Path

__all__ = ["STACK_NAMES", "Taken", "find_stacked"]

STACK_NAMES = frozenset({"layers", "layer", "stack", "stage", "blocks"})
"""Logical names of dims along which layers are stacked."""
_NUMBERED = re.compile(r"(.+)_(\d+)")


@dataclasses.dataclass(frozen=True)
class Taken:
    """The saved leaves that a leaf is made from.

    One path, taken as it is; with `index`, one slice of it along `dim`; several paths are stacked
    along `dim`.

    >>> Taken((("a",),), dim=0, index=3).shape((12, 5)), Taken((("a",), ("b",)), dim=1).shape((5,))
    ((5,), (5, 2))
    """

    paths: tuple[Path, ...]
    dim: int | None = None
    index: int | None = None

    def shape(self, saved: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that comes of leaves of shape `saved`."""
        if self.dim is None:
            return saved
        if self.index is not None:
            return saved[: self.dim] + saved[self.dim + 1 :]
        return (*saved[: self.dim], len(self.paths), *saved[self.dim :])


def find_stacked(
    path: Path,
    target: LeafSpec,
    names: Names,
    saved: Mapping[Path, LeafSpec],
    names_of: Callable[[Path], Names],
) -> Taken | None:
    """What a leaf that was not saved under its path can be restacked from, or None.

    >>> specs = {("layers", "w"): LeafSpec("array", (3, 5), "float32")}
    >>> want = LeafSpec("array", (5,), "float32")
    >>> find_stacked(("layers_2", "w"), want, None, specs, lambda path: None)
    Taken(paths=(('layers', 'w'),), dim=0, index=2)
    """
    for scanned, index in _scanned(path):
        if scanned in saved:
            shape = saved[scanned].shape
            dim = _dim(shape, target.shape, names_of(scanned))
            if dim is not None and index < shape[dim]:
                return Taken((scanned,), dim, index)
    for unrolled in _unrolled(path, saved):
        shapes = {saved[p].shape for p in unrolled}
        dim = _dim(target.shape, next(iter(shapes)), names) if len(shapes) == 1 else None
        if dim is not None and target.shape[dim] == len(unrolled):
            return Taken(unrolled, dim)
    return None


def _scanned(path: Path) -> Iterator[tuple[Path, int]]:
    """The paths that a numbered component may stand for, and its number."""
    for i, part in enumerate(path):
        if numbered := _NUMBERED.fullmatch(part):
            yield (*path[:i], numbered[1], *path[i + 1 :]), int(numbered[2])
        elif part.isdecimal() and i:
            yield (*path[:i], *path[i + 1 :]), int(part)


def _unrolled(path: Path, saved: Mapping[Path, LeafSpec]) -> Iterator[tuple[Path, ...]]:
    """Runs of saved paths, numbered from 0, that one component may stand for."""
    for i, part in enumerate(path):
        for before, stem in (((), f"{part}_"), ((part,), "")):
            numbered = (
                (*path[:i], *before, f"{stem}{n}", *path[i + 1 :]) for n in itertools.count()
            )
            run = tuple(itertools.takewhile(saved.__contains__, numbered))
            if run:
                yield run


def _dim(stacked: tuple[int, ...], single: tuple[int, ...], names: Names) -> int | None:
    """The dim that one shape has beyond the other: by its name, else the first that fits."""
    fits = [d for d in range(len(stacked)) if stacked[:d] + stacked[d + 1 :] == single]
    named = [d for d in fits if names and len(names) == len(stacked) and names[d] in STACK_NAMES]
    return next(iter(named or fits), None)
