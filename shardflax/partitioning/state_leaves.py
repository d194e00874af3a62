"""Reading a state: its leaves, out of their boxes, and where its parameters are."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from shardflax.core.boxes import AxisMetadata
from shardflax.core.errors import did_you_mean
from shardflax.partitioning.boxes import Partitioned
from shardflax.partitioning.errors import LayoutError, kind_of
from shardflax.partitioning.paths import Path, keys_of, path_text
from shardflax.partitioning.untyped import jx

__all__ = ["StateLeaf", "find_root", "state_leaves"]


@dataclass(frozen=True)
class StateLeaf:
    """What stands at a path of a state: an array or a shape (`value`), and the box around it.

    >>> StateLeaf(("step",), None, 0).path
    ('step',)
    """

    path: Path
    box: Any
    value: Any


def state_leaves(state: Any) -> tuple[list[StateLeaf], Any]:
    """The leaves of a state, and the structure of the state without boxes.

    A box is one leaf; one around nothing, which `optax.masked` leaves of a boxed parameter, or
    around several arrays (SM3), is what is in it.  Raises `LayoutError` for what is no array.

    >>> [leaf.path for leaf in state_leaves({"a": 1, "b": [2.0]})[0]]
    [('a',), ('b', 0)]
    """
    flat, structure = jx.tree_util.tree_flatten_with_path(state, is_leaf=_is_box)
    if any(_is_tree_in_box(leaf) for _, leaf in flat):
        state = jx.tree.map(_without_tree_in_box, state, is_leaf=_is_box)
        flat, structure = jx.tree_util.tree_flatten_with_path(state, is_leaf=_is_box)
    return [_opened(keys_of(path), leaf) for path, leaf in flat], structure


def find_root(state: Any, leaves: Sequence[StateLeaf], said: str | Path | None = None) -> Path:
    """Where the parameters of a state are: as it is `said`, or under `params`.

    Without either, they are all of a mapping, or the first boxed element of anything else.  Raises
    `LayoutError` where it is said and there is nothing.

    >>> find_root({"params": 1, "step": 2}, [StateLeaf(("params",), None, 1)])
    ('params',)
    """
    if said is not None:
        return _said_root(said, leaves)
    tops: dict[Any, bool] = {}
    for leaf in leaves:
        if leaf.path:
            boxed = isinstance(leaf.box, Partitioned)
            tops[leaf.path[0]] = tops.get(leaf.path[0], False) or boxed
    if "params" in tops:
        return ("params",)
    if isinstance(state, Mapping):
        return ()
    return next(((top,) for top, boxed in tops.items() if boxed), ())


def _is_box(x: Any) -> bool:
    """`is_box`, asked once for each type: a state has many parts."""
    return _is_box_type(cast("type[Any]", type(x)))


@functools.cache
def _is_box_type(of: type[Any]) -> bool:
    return issubclass(of, AxisMetadata)


def _is_tree_in_box(leaf: Any) -> bool:
    """True for what optimizers that were given boxed parameters may leave of a box."""
    return _is_box(leaf) and not jx.tree_util.all_leaves([_content(leaf)])


def _without_tree_in_box(leaf: Any) -> Any:
    """What is in such a box; anything else as it is."""
    return _content(leaf) if _is_tree_in_box(leaf) else leaf


def _content(leaf: Any) -> Any:
    """What is in a box, or in boxes in a box."""
    while _is_box(leaf):
        leaf = leaf.value if isinstance(leaf, Partitioned) else leaf.unbox()
    return leaf


def _shape_of(path: Path, value: Any) -> Any:
    """The shape of a Python number."""
    try:
        return jx.eval_shape(lambda: value)
    except TypeError:
        where = f"{path_text(path)}: " if path else ""
        raise LayoutError(
            f"{where}{kind_of(value)} is no array. A state is a tree of arrays or shapes."
        ) from None


def _said_root(root: str | Path, leaves: Iterable[StateLeaf]) -> Path:
    """`root`, if something of the state is below it."""
    root = tuple(root.split("/")) if isinstance(root, str) else tuple(root)
    paths = [leaf.path for leaf in leaves]
    if all(path[: len(root)] != root for path in paths):
        hint = did_you_mean(path_text(root), {path_text(path[: len(root)]) for path in paths})
        raise LayoutError(f"parameters={root!r}: the state has nothing there: {hint}")
    return root


def _opened(path: Path, leaf: Any) -> StateLeaf:
    """A leaf with its outermost box, and the array or shape inside; Python numbers as shapes."""
    value = _content(leaf)
    if not hasattr(value, "dtype"):
        value = _shape_of(path, value)
    return StateLeaf(path, leaf if value is not leaf else None, value)
