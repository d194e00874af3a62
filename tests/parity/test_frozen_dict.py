"""FrozenDict and the functions beside it, against Flax's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import pytest

from shardflax import core
from tests.core.harness import OURS, plain, quick_key, registry, same

program, PROGRAMS = registry()
NESTED = {"b": {"c": 1, "d": {}}, "a": 2}


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_flax(run: Any) -> None:
    theirs, ours = run(flax.core), run(core)
    assert plain(ours) == plain(theirs)


@program
def reads(c: Any) -> Any:
    f = c.freeze(NESTED)
    return [
        f["b"]["c"], f.get("zz"), f.get("zz", 3), "a" in f, "zz" in f, len(f), list(f),
        list(f.keys()), list(f.values()), list(f.items()), dict(f), f.unfreeze(), str(f), repr(f),
        type(f["b"]).__name__, f == NESTED, f == NESTED, f == c.freeze({"a": 2}), f != NESTED,
    ]  # fmt: skip


@program
def is_made_like_a_dict(c: Any) -> Any:
    return [
        c.FrozenDict(b=1, a=2), c.FrozenDict([("a", 1)]), c.FrozenDict({"a": {"z": [{"b": 1}]}}),
        c.FrozenDict(), c.FrozenDict(c.freeze(NESTED)), c.freeze({"a": c.freeze({"b": 1})}),
    ]  # fmt: skip


@program
def changed_copies(c: Any) -> Any:
    f = c.freeze(NESTED)
    return [
        f.copy({"z": 1}), f.copy({"b": {"n": 2}}), f.copy(), f.pop("b"), f.pop("a"),
        c.copy(f, {"x": {"y": 1}}), c.copy(NESTED, {"a": 3}), c.pop(f, "a"), c.pop(NESTED, "b"),
        c.unfreeze(f), c.unfreeze(NESTED), c.unfreeze({"a": c.freeze({"b": 1})}), c.unfreeze(3), f,
        NESTED,
    ]  # fmt: skip


@program
def the_order_of_keys(c: Any) -> Any:
    f = c.freeze(NESTED)
    made = [f, c.unfreeze(f), f.unfreeze(), c.unfreeze(NESTED), c.unfreeze({"z": f, "b": 1})["z"]]
    made += [f.copy({}), c.copy(NESTED), c.pop({**NESTED, "x": 1}, "x")[0], c.FrozenDict(f)]
    return [list(d) for d in made]


@program
def text(c: Any) -> Any:
    f = c.freeze({**NESTED, "list": [1, {"q": 2}], "s": "x", 3: None})
    return [
        f.pretty_repr(), f.pretty_repr(2), c.pretty_repr(NESTED),
        c.pretty_repr(3), c.pretty_repr("x"), c.pretty_repr({}), repr(c.freeze({})),
    ]  # fmt: skip


@program
def as_a_pytree(c: Any) -> Any:
    f = c.freeze(NESTED)
    paths, _ = jax.tree_util.tree_flatten_with_path(f)
    both = jax.tree.map(lambda x, y: x + y, f, f)
    return [
        jax.tree.leaves(f), [(str(p), x) for p, x in paths], both, type(both).__name__,
        jax.tree.structure(f) == jax.tree.structure(c.freeze(NESTED)),
        jax.tree.structure(f) == jax.tree.structure(NESTED),
        jax.tree.transpose(jax.tree.structure(f), jax.tree.structure([0, 0]),
                           jax.tree.map(lambda x: [x, -x], f)),
    ]  # fmt: skip


@program
def hashes(c: Any) -> Any:
    f, g = c.freeze({"a": {"b": 1}, "c": 2}), c.freeze({"c": 2, "a": {"b": 1}})
    return [hash(f) == hash(g), len({f, g}), {f: 1}[g], hash(f) == hash(c.freeze({"c": 2}))]


@program
def copies(c: Any) -> Any:
    f = c.freeze(NESTED)
    made = [pickle.loads(pickle.dumps(f)), copy.copy(f), copy.deepcopy(f)]
    return [*made, [type(m).__name__ for m in made]]


@program
def does_not_change_with_its_source(c: Any) -> Any:
    source = {"a": {"b": 1}}
    frozen = c.freeze(source)
    source["a"]["b"] = 2
    thawed = frozen.unfreeze()
    thawed["a"]["b"] = 3
    return frozen


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda c: c.freeze(NESTED).__setitem__("a", 1), ValueError),
        (lambda c: c.freeze(NESTED)["zz"], KeyError),
        (lambda c: c.freeze(NESTED).pop("zz"), KeyError),
        (lambda c: hash(c.freeze({"a": jnp.ones(2)})), TypeError),
        (lambda c: c.copy(3, {}), TypeError),
        (lambda c: c.pop(3, "a"), TypeError),
        (lambda c: c.freeze(3), TypeError),
        (lambda c: c.freeze(NESTED).update({}), AttributeError),
        (lambda c: c.freeze(NESTED) | {}, TypeError),
    ],
)
def test_errors(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        wrong(flax.core)
    with pytest.raises(error):
        wrong(core)


def test_items_cannot_be_deleted() -> None:
    frozen = core.freeze({"a": 1})
    with pytest.raises(ValueError, match="pop"):
        del frozen["a"]
    assert frozen == {"a": 1}


def frozen_variables_of_modules(c: Any, nn: Any) -> Any:
    """Modules take frozen variables wherever they take dicts, and give dicts."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            seen = self.variable("state", "seen", jnp.zeros, ())
            seen.value += 1
            scale = self.param("scale", lambda key, shape: jnp.ones(shape), (2,))
            return x * scale + nn.Dense(2, use_bias=False)(x) * seen.value

    x = jnp.ones((1, 2))
    model = Model()
    variables = c.freeze(model.init(quick_key(0), x))
    y, changed = model.apply(variables, x, mutable=["state"])
    return [
        y, changed, type(changed).__name__, type(changed["state"]).__name__,
        model.apply(variables, x, mutable=True, rngs={"params": quick_key(1)}),
        jax.jit(lambda v: model.apply(v, x, mutable=["state"]))(variables),
        model.bind(variables, mutable=["state"])(x), variables["state"],
    ]  # fmt: skip


def test_frozen_variables_of_modules() -> None:
    import shardflax.nn

    ours = frozen_variables_of_modules(core, shardflax.nn)
    theirs = frozen_variables_of_modules(flax.core, flax.linen)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(jnp.all(a == b)), plain(ours), plain(theirs))
    )


def test_gradients_of_frozen_parameters() -> None:
    def loss(params: Any) -> Any:
        model = OURS.Lin(features=1)
        return model.apply(core.freeze({"params": params}), jnp.ones((1, 2))).sum()

    params = core.freeze({"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)})
    grads = jax.grad(loss)(params)
    assert isinstance(grads, core.FrozenDict)
    assert grads["bias"].tolist() == [1.0]


def test_lifted_transforms_take_frozen_variables() -> None:
    def scanned(nn: Any) -> Any:
        c = core if nn is OURS else flax.core
        mapped = nn.vmap(nn.Lin, variable_axes={"params": 0}, split_rngs={"params": True})(2)
        x = jnp.ones((2, 3))
        variables = c.freeze(mapped.init(quick_key(0), x))
        return variables.unfreeze(), mapped.apply(variables, x)

    same(scanned)
