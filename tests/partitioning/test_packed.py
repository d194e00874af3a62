"""Boxes kept in two slots are frozen dataclasses in every other respect, and cheap to cross."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from dataclasses import dataclass, field
from typing import Any

import jax
import pytest

from shardflax import struct
from shardflax.partitioning import LogicallyPartitioned, Partitioned

KINDS = [Partitioned, LogicallyPartitioned]


@struct.dataclass
class Noted(LogicallyPartitioned):
    """A user's box, with a field of its own."""

    note: str = struct.field(pytree_node=False, default="")


@dataclass(frozen=True)
class Plain(Partitioned):
    """One that is no pytree."""

    scale: float = 1.0
    extra: list[int] = field(default_factory=list[int])


BOXES = [kind(2.0, ("embed", None)) for kind in KINDS]
BOXES += [Noted(2.0, ("embed", None), note="why"), Plain(2.0, ("embed", None), scale=3.0)]


@pytest.mark.parametrize("box", BOXES, ids=lambda box: type(box).__name__)
def test_it_is_a_frozen_dataclass(box: Any) -> None:
    names = [f.name for f in dataclasses.fields(box)]
    assert names[:3] == ["value", "names", "mesh"]
    kind = type(box).__name__
    assert repr(box).startswith(f"{kind}(value=2.0, names=('embed', None), mesh=None")
    for name in names:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(box, name, 3.0)
    with pytest.raises((AttributeError, TypeError)):
        box.no_field = 3.0
    other = dataclasses.replace(box, names=("mlp",))
    assert (other.names, other.value, box.names) == (("mlp",), 2.0, ("embed", None))
    assert other != box
    assert box.replace(names=("mlp",)) == other
    assert box.replace_boxed(5.0).value == 5.0
    assert dataclasses.asdict(box) == {name: getattr(box, name) for name in names}


@pytest.mark.parametrize("box", BOXES, ids=lambda box: type(box).__name__)
def test_copies_and_pickles_are_equal(box: Any) -> None:
    for same in (copy.copy(box), copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
        assert type(same) is type(box)
        assert same == box
        if not isinstance(box, Plain):  # its list has no hash
            assert hash(same) == hash(box)


@pytest.mark.parametrize("box", BOXES[:3], ids=lambda box: type(box).__name__)
def test_trees_keep_class_and_metadata(box: Any) -> None:
    ((path, value),) = jax.tree_util.tree_leaves_with_path({"w": box})
    assert (jax.tree_util.keystr(path), value) == ("['w'].value", 2.0)
    doubled = jax.tree.map(lambda x: 2 * x, box)
    assert type(doubled) is type(box)
    assert doubled == box.replace_boxed(4.0)
    structure = jax.tree.structure(box)
    assert structure == jax.tree.structure(doubled)
    assert structure != jax.tree.structure(box.replace(names=("embed", "mlp")))
    # Structures compare metadata by value, and so do those of boxes made apart.
    again = type(box)(**{f.name: getattr(box, f.name) for f in dataclasses.fields(box)})
    assert structure == jax.tree.structure(again)


def test_rules_are_metadata() -> None:
    one, two = (LogicallyPartitioned(1.0, ("a",), None, (("a", axis),)) for axis in "xy")
    assert jax.tree.structure(one) != jax.tree.structure(two)
    assert jax.tree.map(lambda x: x, two).rules == (("a", "y"),)


@pytest.mark.parametrize("kind", KINDS)
def test_only_making_a_box_runs_python(kind: Any) -> None:
    tree = {f"layer_{i}": kind(1.0, ("embed", "mlp")) for i in range(10)}
    leaves, structure = jax.tree.flatten(tree)
    flatten, called = jax.tree_util.default_registry.flatten, []
    sys.setprofile(lambda frame, event, _: called.append((event, frame.f_code.co_name)))
    try:
        flatten(tree)
        structure.unflatten(leaves)
    finally:
        sys.setprofile(None)
    assert [name for event, name in called if event == "call"] == ["make"] * 10
