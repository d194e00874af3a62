"""Trees of names beside trees of arrays: which names are whose, and where the trees differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from jax.sharding import PartitionSpec

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import Problem, TreeMismatchError, raise_problems
from shardflax.partitioning.paths import Path, keys_of, path_text
from shardflax.partitioning.untyped import jx

__all__ = ["is_names", "names_of_leaves", "tree_problems"]


def is_names(x: Any) -> bool:
    """True for one tuple of names, or None, in a tree of them.

    >>> is_names(("embed", None)), is_names([("embed", None)])
    (True, False)
    """
    if x is None or isinstance(x, PartitionSpec):
        return True
    return isinstance(x, tuple) and all(_is_name(name) for name in cast(tuple[Any, ...], x))


def _is_name(x: Any) -> bool:
    if x is None or isinstance(x, str) or x is PartitionSpec.UNCONSTRAINED:
        return True
    return isinstance(x, tuple) and all(isinstance(n, str) for n in cast(tuple[Any, ...], x))


def names_of_leaves(names: Any, tree: Any) -> list[Any]:
    """The names of each leaf of `tree`, out of one tuple for all or a tree of tuples.

    A tuple in the tree of names is for all leaves below its place.  Raises `TreeMismatchError`,
    with every path, for trees that differ.

    >>> names_of_leaves({"a": ("embed",), "b": None}, {"a": [1, 2], "b": 3})
    [('embed',), ('embed',), None]
    """
    said, structure = jx.tree.flatten(names, is_leaf=is_names)
    if words := [one for one in said if isinstance(one, str)]:
        listed = isinstance(names, list) and words == names
        meant = tuple(words) if listed else (words[0],)
        raise TreeMismatchError(f"the names of an array are a tuple: write {meant!r}.")
    try:
        parts = structure.flatten_up_to(tree)
    except ValueError as error:
        found = tree_problems(_paths(names, is_names), _paths(tree), "names")
        raise_problems(list(found))
        raise TreeMismatchError(f"the tree of names is none of this tree: {error}") from error
    return [one for one, part in zip(said, parts, strict=True) for _ in jx.tree.leaves(part)]


def _paths(tree: Any, is_leaf: Any = None) -> list[Path]:
    return [keys_of(path) for path, _ in jx.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def tree_problems(said: Sequence[Path], there: Sequence[Path], what: str) -> Iterator[Problem]:
    """What the `said` paths, each for a leaf or all below it, lack of those `there`, or add.

    >>> print(*tree_problems([("a",)], [("b",)], "names"), sep="\\n")
    a: the names have a leaf there, and the tree has none: known: b.
    b: the names say nothing of this leaf. Say None for a replicated one.
    """
    prefixes = {path[:n] for path in there for n in range(len(path) + 1)}
    for path in said:
        if path not in prefixes:
            hint = did_you_mean(path_text(path), map(path_text, there))
            text = f"the {what} have a leaf there, and the tree has none: {hint}"
            yield Problem(TreeMismatchError, text, where=path_text(path))
    known = set(said)
    for path in there:
        if not any(path[:n] in known for n in range(len(path) + 1)):
            text = f"the {what} say nothing of this leaf. Say None for a replicated one."
            yield Problem(TreeMismatchError, text, where=path_text(path))
