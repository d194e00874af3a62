"""Where a leaf lies in a state: a tuple of strings, the same for every kind of container."""

from __future__ import annotations

import functools
from typing import Any
from urllib.parse import quote

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from shardflax.ckpt.errors import CheckpointLeafError
from shardflax.core.boxes import is_box

__all__ = [
    "ROOT", "Names", "Path", "Tree", "is_text", "leaves_by_path", "nest", "show", "storage_names",
    "tree_and_leaves", "tree_of",
]  # fmt: skip

Path = tuple[str, ...]
Names = tuple[Any, ...] | None

ROOT: Path = ("value",)
"""The path of a state that is one array."""


def show(path: Path) -> str:
    """A path as users read it.

    >>> show(("params", "Dense_0", "kernel"))
    'params/Dense_0/kernel'
    """
    return "/".join(path)


class Tree:
    """The paths of the leaves of a state, boxes left out, and the names that the boxes gave.

    `nones` are the paths of None, `empty` those of containers with nothing in them (an empty named
    tuple is like None); `items` are the paths of what is in lists and tuples.

    >>> tree = tree_of({"w": 1.0, "n": None, "pair": (2.0, ())})
    >>> tree.paths, tree.nones, tree.empty
    ((('pair', '0'), ('w',)), (('n',),), {('pair', '1'): ()})
    >>> sorted(tree.items)
    [('pair', '0'), ('pair', '1')]
    """

    def __init__(self, treedef: Any) -> None:
        flat = jax.tree_util.tree_leaves_with_path(
            treedef.unflatten(range(treedef.num_leaves)), is_leaf=_ends
        )
        self.treedef = treedef
        found: dict[Path, Names] = {}
        nones: list[Path] = []
        self.empty: dict[Path, Any] = {}
        self.items: set[Path] = set()
        for keys, leaf in flat:
            path = tuple(map(_part, keys)) or ROOT
            if path in found:
                raise CheckpointLeafError(
                    show(path), "two leaves have this path", "Rename one of the two dict keys."
                )
            self.items |= {path[: i + 1] for i, key in enumerate(keys) if type(key) is SequenceKey}
            if leaf is None:
                nones.append(path)
            elif _hollow(leaf):
                self.empty[path] = leaf
            elif jax.tree.leaves(leaf):  # a box may hold nothing
                found[path] = _names(leaf)
        self.nones = tuple(nones)
        self.paths = tuple(found)
        self.names = tuple(found.values())
        if len(found) != treedef.num_leaves:
            raise CheckpointLeafError(show(ROOT), "a box holds several arrays", "Box them apart.")

    def zip(self, leaves: list[Any]) -> dict[Path, Any]:
        """The leaves by path."""
        return dict(zip(self.paths, leaves, strict=True))


@functools.lru_cache(maxsize=64)
def _tree(treedef: Any) -> Tree:
    return Tree(treedef)


def tree_of(state: Any) -> Tree:
    """The paths and names of a state; made once for each structure.

    Raises CheckpointLeafError where two leaves have one path (dict keys `1` and `"1"`).

    >>> tree_of({"a": 1}) is tree_of({"a": 2})
    True
    """
    return _tree(jax.tree.structure(state))


def tree_and_leaves(state: Any) -> tuple[Tree, list[Any]]:
    """The paths and names of a state, and its leaves.

    >>> tree_and_leaves({"a": 1})[1]
    [1]
    """
    leaves, treedef = jax.tree.flatten(state)
    return _tree(treedef), leaves


def leaves_by_path(state: Any) -> dict[Path, Any]:
    """The leaves of a state, boxes taken off, by path.

    >>> leaves_by_path({"opt": (1.0, {"mu": 2.0})})
    {('opt', '0'): 1.0, ('opt', '1', 'mu'): 2.0}
    """
    tree, leaves = tree_and_leaves(state)
    return tree.zip(leaves)


def _ends(x: Any) -> bool:
    """True where a path ends: at boxes, and at what JAX sees as a node without leaves."""
    return x is None or _hollow(x) or is_box(x)


def _hollow(x: Any) -> bool:
    """True for an empty dict, list or tuple."""
    return isinstance(x, dict | list | tuple) and not x


def _names(leaf: Any) -> Names:
    """What a box calls the dims of its value."""
    names = getattr(leaf, "names", None) if is_box(leaf) else None
    return tuple(names) if isinstance(names, tuple | list) else None


def _part(key: Any) -> str:
    """One key of a key path as a string."""
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case GetAttrKey(name=name):
            return name
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key)


def storage_names(paths: tuple[Path, ...]) -> dict[Path, tuple[str, bool]]:
    """The name that each leaf is stored under, and whether other readers find it there.

    Orbax joins a path with dots.  Paths that would share a name then, or of which one would lie
    inside the other, are stored under escaped names, which only the manifest knows.  Raises
    CheckpointLeafError for what is no text.

    >>> storage_names((("a", "b"),))
    {('a', 'b'): ('a.b', True)}
    >>> storage_names((("a.b",), ("a", "b")))
    {('a.b',): ('%/a%2Eb', False), ('a', 'b'): ('%/a/b', False)}
    """
    joined = {path: ".".join(path) for path in paths}
    for path, name in joined.items():
        if not is_text(name):
            raise CheckpointLeafError(
                show(path), "its name is no text (a lone surrogate)", "Rename it."
            )
    owners: dict[str, list[Path]] = {}
    for path, name in joined.items():
        owners.setdefault(name, []).append(path)
    private = {path for found in owners.values() if len(found) > 1 for path in found}
    for path, name in joined.items():
        inside = [owners[name[:i]] for i, char in enumerate(name) if char == "/"
                  if name[:i] in owners]  # fmt: skip
        if inside or not all(path) or "//" in name or name[0] in "/%" or name[-1] == "/":
            private.add(path)
        private.update(other for found in inside for other in found)
    return {
        path: (_escaped(path), False) if path in private else (name, True)
        for path, name in joined.items()
    }


def is_text(text: str) -> bool:
    """False for a string with lone surrogates, which no file can hold.

    >>> is_text("\\ud800"), is_text("x")
    (False, True)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(path: Path) -> str:
    """A name that no other path has, with neither a dot nor an empty part."""
    return "/".join(["%", *(quote(part, safe="").replace(".", "%2E") or "%" for part in path)])


def nest(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Nested dicts with the given leaves.

    >>> nest({("a", "b"): 1, ("c",): 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for (*parents, last), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
