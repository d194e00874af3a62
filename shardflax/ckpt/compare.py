"""Two checkpoints, or a checkpoint and a state, leaf by leaf."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shardflax.ckpt.errors import CheckpointReadError
from shardflax.ckpt.leaves import LeafSpec, difference
from shardflax.ckpt.locate import find_checkpoint
from shardflax.ckpt.paths import Path, show
from shardflax.ckpt.sources import Source
from shardflax.ckpt.tree_source import TreeSource, pieces, with_names
from shardflax.core.errors import FlaxError

__all__ = ["Comparison", "Unlike", "compare_checkpoints", "compare_sources"]

_Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Unlike:
    """A leaf that differs: "missing" in the second, "extra" there, "shape", "dtype" or "value".

    >>> print(Unlike("shape", ("w",), "float32[2] and float32[3]"))
    shape    w  float32[2] and float32[3]
    """

    kind: str
    path: Path
    text: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.kind:7}  {show(self.path)}  {self.text}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs between two states, in the order of paths; `same` counts leaves that do not.

    `values` says whether values were looked at.
    """

    unlike: tuple[Unlike, ...]
    same: int
    values: bool

    def __bool__(self) -> bool:
        """True if anything differs."""
        return bool(self.unlike)

    def __str__(self) -> str:
        """A line for each leaf that differs, and the counts.

        >>> print(Comparison((), 3, values=False))
        3 leaves alike (values not compared)
        """
        end = "" if self.values else " (values not compared)"
        last = f"{_leaves(self.same)} alike{end}"
        if self.unlike:
            last = f"{_leaves(len(self.unlike))} unlike, {last}"
        return "\n".join([*map(str, self.unlike), last])


def _leaves(count: int) -> str:
    return f"{count} {'leaf' if count == 1 else 'leaves'}"


def compare_checkpoints(
    first: str | os.PathLike[str],
    second: Any,
    *,
    step: int | None = None,
    second_step: int | None = None,
    values: bool = False,
    rename: Mapping[str, str] | None = None,
) -> Comparison:
    """Compares a checkpoint with another one (a path), or with a state, which may be abstract.

    `rename` is for the paths of the first.  With `values` all is read, in parts, and compared bit
    by bit, so a NaN equals itself and 0.0 is not -0.0.  A Python number is like an array without
    dims of its kind.

    >>> import tempfile
    >>> from shardflax.ckpt.safetensors_files import save_safetensors
    >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
    >>> save_safetensors(file, {"w": np.ones(2), "b": np.ones(3)})
    >>> print(compare_checkpoints(file, {"w": np.array([1.0, 2.0]), "c": np.ones(3)}, values=True))
    missing  b  float64[3] is only in the first
    extra    c  float64[3] is only in the second
    value    w  1 of 2 elements differ, by up to 1
    3 leaves unlike, 0 leaves alike
    """
    found = find_checkpoint(first, step)
    if isinstance(second, str | os.PathLike):
        other: Source = find_checkpoint(second, second_step).source
    else:
        other = TreeSource(second)
    named = with_names(found.source, rename)
    try:
        return compare_sources(named, other, values=values)
    except FlaxError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointReadError(found.path, None, error) from error


def compare_sources(
    first: Source,
    second: Source,
    *,
    values: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Comparison:
    """Compares what two sources offer; `progress` hears how many bytes of each were compared.

    >>> bool(compare_sources(TreeSource({"a": 1}), TreeSource({"a": 2})))
    False
    """
    unlike: list[Unlike] = []
    same = 0
    for path in sorted({*first.leaves, *second.leaves}):
        a, b = first.leaves.get(path), second.leaves.get(path)
        if a is None or b is None:
            kind, where = ("extra", "second") if a is None else ("missing", "first")
            unlike.append(Unlike(kind, path, f"{a or b} is only in the {where}"))
        elif wrong := difference(a, b):
            unlike.append(Unlike(wrong.kind, path, f"{a} and {b}"))
        elif values and (text := _values(first, second, path, progress)):
            unlike.append(Unlike("value", path, text))
        else:
            same += 1
    return Comparison(tuple(unlike), same, values)


def _values(
    first: Source, second: Source, path: Path, progress: Callable[[int], object]
) -> str | None:
    """How the values of a leaf differ."""
    a, b = first.leaves[path], second.leaves[path]
    if "python" in (a.kind, b.kind):
        return _scalars(_scalar(first, path, a), _scalar(second, path, b))
    count, largest = 0, 0.0
    if not a.on_disk:
        return None
    for box in pieces(first, path):
        one, two = first.read(path, box), second.read(path, box)
        differs, most = _unequal(one(), two())
        count, largest = count + differs, max(largest, most)
        progress(box.size * a.stored[1].itemsize)
    total = int(np.prod(a.stored[0]))
    by = f", by up to {largest:.3g}" if largest else ""
    return f"{count:,} of {total:,} elements differ{by}" if count else None


def _scalar(source: Source, path: Path, spec: LeafSpec) -> Any:
    """A value without dims, of Python or numpy."""
    if spec.kind == "python":
        return spec.value
    return next(source.read(path, box)() for box in pieces(source, path))


def _scalars(a: Any, b: Any) -> str | None:
    """A Python number has the precision of the array that it is compared with."""
    if isinstance(a, np.ndarray):
        b = np.asarray(b).astype(a.dtype)
    elif isinstance(b, np.ndarray):
        a = np.asarray(a).astype(b.dtype)
    if isinstance(a, np.ndarray):
        return f"{a} and {b}" if _unequal(a, b)[0] else None
    same = a == b or (a != a and b != b)
    return None if same else f"{_short(a)} and {_short(b)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _unequal(a: _Array, b: _Array) -> tuple[int, float]:
    """How many elements have other bits, and the largest difference, if that is a number."""
    bits_a, bits_b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    where = (bits_a != bits_b).reshape(a.size, -1).any(axis=1)
    count = int(where.sum())
    if not count:
        return 0, 0.0
    kind = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        far = np.abs(a.reshape(-1)[where].astype(kind) - b.reshape(-1)[where].astype(kind))
    return count, float(np.max(far, where=np.isfinite(far), initial=0.0))
