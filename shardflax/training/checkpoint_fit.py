"""Whether what a checkpoint holds fits the target that it is to be restored into."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from shardflax.core.checkpoint_errors import CheckpointTargetError

__all__ = ["Kind", "check_fit", "kind_of", "leaves_of"]


class Kind(NamedTuple):
    """Shape and dtype of a leaf; dtype None for a Python number, which has none of its own.

    >>> print(Kind((2, 3), np.dtype("float32")), Kind((), None))
    float32[2,3] a number
    """

    shape: tuple[int, ...]
    dtype: Any

    def __str__(self) -> str:
        sizes = ",".join(map(str, self.shape))
        return "a number" if self.dtype is None else f"{np.dtype(self.dtype).name}[{sizes}]"


def kind_of(leaf: Any) -> Kind | None:
    """What is compared of a leaf; None for what is neither an array nor a number.

    >>> kind_of(3), kind_of("text")
    (Kind(shape=(), dtype=None), None)
    """
    if isinstance(leaf, bool | int | float | complex):
        return Kind((), None)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return Kind(tuple(leaf.shape), leaf.dtype)
    return None


def leaves_of(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a state dict with their paths; empty dicts are none.

    >>> list(leaves_of({"a": {"b": 1}, "c": {}}))
    [('a/b', 1)]
    """
    if not isinstance(state, Mapping):
        yield path, state
        return
    for key, value in state.items():
        yield from leaves_of(value, f"{path}/{key}" if path else str(key))


def check_fit(path: str, saved: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Compares the leaves (or kinds of leaves) of a checkpoint with those of its target.

    None in the target takes anything, and a number in a numpy array (`np.array(0)`, of no dims) an
    array of any shape, with a warning if that is another one.  What the target has no place for is
    left out, with a warning that names it.

    Raises `CheckpointTargetError` with every leaf that is missing, or of another shape or dtype.

    >>> check_fit("ckpt_3", {"w": np.ones(3)}, {"w": np.zeros(4)})
    Traceback (most recent call last):
        ...
    shardflax.core.checkpoint_errors.CheckpointTargetError: the checkpoint 'ckpt_3' does not ...
      w: saved float64[3], target float64[4]
    Restore with target=None for what was saved, change that, and use from_state_dict.
    """
    given = {name: leaf for name, leaf in target.items() if leaf is not None}
    loose = {name: leaf for name, leaf in given.items() if _takes_any_shape(name, leaf, saved)}
    differences = [
        difference
        for name, leaf in given.items()
        if name not in loose and (difference := _difference(name, leaf, saved))
    ]
    if differences:
        raise CheckpointTargetError(path, differences)
    if loose:
        warnings.warn(
            f"the checkpoint {path!r} has arrays where the target has single numbers: "
            f"{', '.join(f'{n} is {_kind(saved[n])}' for n in loose)}. They are restored as saved.",
            stacklevel=4,
        )
    extra = [n for n, leaf in saved.items() if leaf is not None and not _has_place(n, target)]
    if extra:
        more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
        warnings.warn(
            f"the target has no place for what the checkpoint {path!r} holds at "
            f"{', '.join(extra[:5])}{more}: it is left out.",
            stacklevel=4,
        )


def _has_place(name: str, target: Mapping[str, Any]) -> bool:
    """True if the target has a leaf at `name`, or a None at or above it."""
    parts = name.split("/")
    above = ("/".join(parts[:n]) for n in range(len(parts) + 1))
    return name in target or any(target.get(path, ...) is None for path in above)


def _kind(leaf: Any) -> Kind | None:
    """What is compared of a saved leaf, or of its kind."""
    return leaf if isinstance(leaf, Kind) else kind_of(leaf)


def _takes_any_shape(name: str, leaf: Any, saved: Mapping[str, Any]) -> bool:
    """True for an array of no dims on the host that holds the place of one with dims."""
    have = _kind(saved.get(name))
    holds_place = isinstance(leaf, np.ndarray) and leaf.ndim == 0
    return holds_place and have is not None and have.shape != () and have.dtype == leaf.dtype


def _difference(name: str, leaf: Any, saved: Mapping[str, Any]) -> str | None:
    """What is wrong with one leaf of the target, if anything."""
    if name not in saved:
        return f"{name or 'the top'}: not in the checkpoint"
    want, have = kind_of(leaf), _kind(saved[name])
    if want is None or have is None:
        return None
    known = want.dtype is not None and have.dtype is not None
    if want.shape != have.shape or (known and want.dtype != have.dtype):
        return f"{name or 'the top'}: saved {have}, target {want}"
    return None
