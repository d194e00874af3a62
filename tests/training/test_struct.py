"""shardflax.struct against flax.struct: the same class bodies, built from both namespaces."""

import dataclasses
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import pytest

import shardflax.struct


@pytest.fixture(params=[flax.struct, shardflax.struct], ids=["flax", "shardflax"])
def struct(request: pytest.FixtureRequest) -> ModuleType:
    """Flax, whose behaviour each test states, and ours."""
    return request.param


def make(struct: Any) -> Any:
    """A class with a data field and a static field with a default."""

    @struct.dataclass
    class Model:
        params: Any
        name: Any = struct.field(pytree_node=False, default="mlp")

    return Model


def test_data_fields_are_leaves_and_static_fields_are_structure(struct: Any) -> None:
    model = make(struct)
    paths, tree = jax.tree_util.tree_flatten_with_path(model({"w": 1.0}))
    assert [(jax.tree_util.keystr(p), v) for p, v in paths] == [(".params['w']", 1.0)]
    assert tree != jax.tree.structure(model({"w": 1.0}, "cnn"))
    assert jax.tree.map(lambda v: v + 1, model(1, "cnn")) == model(2, "cnn")


def test_instances_are_frozen_comparable_and_replaceable(struct: Any) -> None:
    a = make(struct)(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.params = 2
    assert (a.replace(params=2).params, a.params) == (2, 1)
    assert a == a.replace() and hash(a) == hash(a.replace())
    assert a != a.replace(params=2) and a != make(struct)(1)
    with pytest.raises(TypeError, match="nmae"):
        a.replace(nmae="x")


def test_a_decorated_class_is_left_alone(struct: Any) -> None:
    model = make(struct)
    assert struct.dataclass(model) is model


def test_subclasses_add_fields(struct: Any) -> None:
    class Base(struct.PyTreeNode):
        x: Any
        fn: Any = struct.field(pytree_node=False)

    class More(Base):
        z: Any = 1

    class Keywords(Base, kw_only=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        z: Any = 1
        q: Any

    assert jax.tree.leaves(More(1, 2)) == [1, 1]
    assert jax.tree.leaves(Keywords(1, 2, q=4)) == [1, 1, 4]
    with pytest.raises(TypeError, match="fn"):
        Base(1)


def test_a_field_outside_init_is_refused(struct: Any) -> None:
    with pytest.raises(ValueError, match="init=True"):

        @struct.dataclass
        class Bad:
            n: Any = struct.field(init=False, default=7)


def test_frozen_can_be_switched_off(struct: Any) -> None:
    @struct.dataclass(frozen=False)
    class Loose:
        x: Any

    loose = Loose(1)
    loose.x = 4
    assert jax.tree.leaves(loose) == [4]


def test_metadata_and_post_init(struct: Any) -> None:
    seen = []

    class Node(struct.PyTreeNode):
        x: Any = struct.field(metadata={"unit": "m"})

        def __post_init__(self) -> None:
            seen.append(self.x)

    assert dict(dataclasses.fields(Node)[0].metadata) == {"unit": "m", "pytree_node": True}
    jax.tree.map(lambda v: v * 3, Node(1))
    assert seen == [1, 3]


def test_static_fields_retrace_and_data_fields_do_not(struct: Any) -> None:
    model, traces = make(struct), []

    @jax.jit
    def f(m: Any) -> Any:
        traces.append(m.name)
        return m.params * 2

    for m in (model(jnp.ones(2)), model(jnp.zeros(2)), model(jnp.ones(2), "cnn")):
        f(m)
    assert traces == ["mlp", "cnn"]


def test_the_base_class_has_no_instances(struct: Any) -> None:
    with pytest.raises(NotImplementedError):
        struct.PyTreeNode()


def test_the_generated_replace_wins(struct: Any) -> None:
    @struct.dataclass
    class Own:
        x: Any

        def replace(self, **updates: Any) -> Any:
            return "own"

    assert Own(1).replace(x=2) == Own(2)
