"""Nodes: the Python-side state of a run, a tree beside the tree of its variables."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["Frozen", "Node", "Path"]

Path = tuple[str, ...]
Frozen = tuple[Any, Any, Any]  # what a node is between two traces: counts, numbering, children


class Node:
    """The Python-side state of one module path: nothing of it is ever traced.

    >>> node = Node()
    >>> node.counts["params"] = 2
    >>> Node.thaw(node.freeze()).counts
    {'params': 2}
    """

    __slots__ = ("base", "children", "counts", "cursor", "owners", "reserved")

    def __init__(self, base: Node | None = None) -> None:
        self.base = base  # counts are shared with it, here and below
        self.children: dict[str, Node] = {}
        self.counts: dict[str, int] = {} if base is None else base.counts
        self.cursor: dict[str, int] = {}
        self.reserved: dict[str, set[str | None]] = {}
        # If there are several nodes of one path: which of them took a name, for which collection.
        self.owners: dict[str, dict[str | None, Node]] | None = None

    def beside(self) -> Node:
        """Another node of the same path: names are numbered apart, and none is in both."""
        node = Node(self.base)
        node.children, node.counts = self.children, self.counts
        if self.owners is None:
            taken = self.reserved.items()
            self.owners = {name: dict.fromkeys(cols, self) for name, cols in taken}
        node.owners = self.owners
        return node

    def claim(self, name: str, col: str | None) -> bool:
        """True if no other node of this path has the name."""
        if self.owners is None:
            return True
        taken = self.owners.setdefault(name, {})
        if any(n is not self and (c == col or None in (c, col)) for c, n in taken.items()):
            return False
        taken[col] = self
        return True

    def child(self, name: str) -> Node:
        node = self.children.get(name)
        if node is None:
            base = self.base and self.base.child(name)
            node = self.children[name] = Node(base)
        return node

    def at(self, path: Path) -> Node:
        return functools.reduce(Node.child, path, self)

    def names(self) -> dict[str, set[str | None]]:
        """A copy of which names are in use."""
        return {name: {*cols} for name, cols in self.reserved.items()}

    def rewind(self) -> None:
        """Forgets which names are in use: the next call of the module takes them again."""
        self.cursor = {}
        self.reserved = {}

    def renew(self) -> None:
        """Forgets names, as another module stands here from now on."""
        self.rewind()
        self.owners = None

    def freeze(self) -> Frozen:
        """A hashable snapshot: counts and numbering.  Names in use do not cross a lift."""
        if self.base is not None:
            for name in self.base.children:
                self.child(name)
        children = ((n, c.freeze()) for n, c in self.children.items())
        return (
            tuple(sorted(self.counts.items())),
            tuple(sorted(self.cursor.items())),
            tuple(sorted(c for c in children if any(c[1]))),
        )

    @classmethod
    def thaw(cls, frozen: Frozen) -> Node:
        """A node forked from a snapshot."""
        counts, cursor, children = frozen
        node = cls()
        node.counts, node.cursor = dict(counts), dict(cursor)
        node.children = {name: cls.thaw(child) for name, child in children}
        return node

    def count_on(self, frozen: Frozen) -> None:
        """Takes over counts, but no numbering of names, from a snapshot of a fork of this node."""
        counts, _, children = frozen
        self.counts = dict(counts)
        for name, child in children:
            self.child(name).count_on(child)

    def adopt(self, frozen: Frozen) -> None:
        """Takes over counts and numbering from a snapshot of a fork of this node."""
        counts, cursor, children = frozen
        self.counts.update(counts)
        self.cursor = dict(cursor)
        for name, child in children:
            self.child(name).adopt(child)
