"""Functions of scopes, against flax.core: the same source, trees, numbers and errors."""

from __future__ import annotations

import functools
from typing import Any

import flax.core
import flax.core.nn
import jax
import jax.numpy as jnp
import pytest

import shardflax.partitioning
from shardflax import core
from shardflax.errors import JaxTransformError, LazyInitError
from tests.core.harness import assert_equal, plain, quick_key, registry

KEY = quick_key(0)
X = jnp.ones((2, 3))
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_flax(run: Any) -> None:
    assert_equal(plain(run(core)), plain(run(flax.core)))


def dense(scope: Any, x: Any, features: int = 2) -> Any:
    kernel = scope.param("kernel", jax.random.uniform, (x.shape[-1], features))
    return x @ kernel


def drop(scope: Any, x: Any) -> Any:
    return x + jax.random.uniform(scope.make_rng("dropout"), x.shape)


@program
def init_and_apply(c: Any) -> Any:
    y, variables = c.init(dense)(KEY, X)
    return [
        y, variables, c.apply(dense)(variables, X), c.apply(dense)(c.freeze(variables), X),
        c.apply(dense, mutable=["state"])(variables, X), c.apply(dense, mutable=True)(variables, X),
        c.init(dense)({"params": KEY}, X, features=3),
        jax.jit(c.init(dense))(KEY, X),
    ]  # fmt: skip


@program
def names_of_children(c: Any) -> Any:
    def fn(scope: Any, x: Any) -> Any:
        x = scope.child(dense)(x, 4)
        x = scope.child(dense)(x, features=2)
        x = scope.child(dense, "named", features=2)(x)
        x = scope.child(dense, prefix="pre_")(x)
        x = scope.child(functools.partial(dense, features=2))(x)
        return scope.child(lambda s, x: s.param("a", lambda key: 1.0) * x)(x)

    return c.init(fn)(KEY, X)


@program
def a_child_called_twice_is_shared(c: Any) -> Any:
    def fn(scope: Any, x: Any) -> Any:
        layer, noise = scope.child(dense, "layer", features=3), scope.child(drop)
        return noise(layer(noise(layer(x))))

    y, variables = c.init(fn)({"params": KEY, "dropout": quick_key(1)}, X)
    return y, variables, c.apply(fn)(variables, X, rngs={"dropout": quick_key(2)})


@program
def pushes(c: Any) -> Any:
    def fn(scope: Any) -> Any:
        a, b, n = scope.push("a"), scope.push(prefix="p_"), scope.push()
        d, again = scope.push(prefix="p_"), scope.push("a", reuse=True)
        below = a.push("b")
        return [
            [(s.name, s.path, s.path_text) for s in (scope, a, b, n, d, again, below)],
            [s.root is scope for s in (scope, a, below)], a.parent is scope, scope.parent,
            again == a, a == b, [scope.default_name("z") for _ in range(2)],
            scope.default_name("p_"), scope.name_reserved("a"), scope.name_reserved("zz"),
            [jax.random.key_data(s.make_rng()) for s in (scope, a, again, below, a)],
        ]  # fmt: skip

    return c.init(fn)(KEY)


@program
def rewound(c: Any) -> Any:
    def fn(scope: Any, x: Any) -> Any:
        first = scope.child(dense, "layer")(x)
        again = scope.rewound()
        second = again.child(dense, "layer")(x)
        draws = [scope, again, scope.rewound(), scope.rewound(rewind_rngs=True), scope]
        keys = [s.make_rng() for s in draws]
        below = [scope.push("q"), scope.rewound().push("q"), scope.push("q", reuse=True)]
        return first, second, keys, [s.make_rng() for s in below], again.path, again is scope

    return c.init(fn)(KEY, X)


@program
def reserved_names(c: Any) -> Any:
    def fn(scope: Any) -> Any:
        scope.param("w", lambda key: 1.0)
        scope.variable("state", "w", lambda: 2.0)
        scope.push("sub")
        return [
            scope.name_reserved("w"), scope.name_reserved("w", "params"),
            scope.name_reserved("w", "cache"), scope.name_reserved("sub", "cache"),
        ]  # fmt: skip

    return c.init(fn)(KEY)


def state(scope: Any) -> Any:
    count = scope.variable("state", "count", lambda: 3)
    count.value += 1
    sub = scope.push("sub")
    sub.put_variable("state", "inner", 5)
    return [
        scope.variables(), scope.mutable_variables(), sub.variables(), sub.mutable_variables(),
        [scope.is_collection_empty(col) for col in ("state", "params", "none")],
        [scope.is_mutable_collection(col) for col in ("state", "params", "none")],
        scope.get_variable("state", "count"), scope.get_variable("state", "none", 7),
        scope.has_variable("state", "count"), scope.has_variable("state", "none"),
        scope.has_rng("params"), scope.has_rng("none"), scope.has_flag("initializing"),
        count.is_mutable(),
    ]  # fmt: skip


@program
def variables_at_init(c: Any) -> Any:
    return c.init(state)(KEY)


@program
def variables_at_apply(c: Any) -> Any:
    variables = {"params": {"a": {"w": 1}}, "state": {"count": 4, "other": {"x": 1}}, "empty": {}}
    return c.apply(state, mutable=["state", "more"])(variables), variables


@program
def filters(c: Any) -> Any:
    variables = {"params": {"w": 1}, "state": {"n": 1}, "empty": {}}
    filters = [True, "state", ["params"], c.DenyList("params"), c.DenyList(["state", "empty"])]
    return [c.apply(lambda s: None, mutable=f)(variables) for f in filters]


@program
def bound(c: Any) -> Any:
    scope = c.bind({"params": {"a": 1.0}}, rngs={"params": KEY}, mutable=["state"])
    scope.put_variable("state", "b", 2)
    return scope.param("a", lambda key: 2.0), scope.variables(), scope.make_rng(), scope.invalid


@program
def temporary(c: Any) -> Any:
    with c.Scope({"params": {"a": 1.0}}, rngs={"params": KEY}).temporary() as root:
        seen = root.param("a", lambda key: 2.0), root.make_rng("params"), root.invalid
    return seen, root.invalid


@program
def flags(c: Any) -> Any:
    def fn(scope: Any) -> Any:
        sub = scope.push("sub")
        return [
            sub.get_flag("depth"), sub.get_flag("none", 3), sub.has_flag("none"),
            sub.has_flag("initializing"),
        ]  # fmt: skip

    flags = {"depth": 2}
    return c.init(fn, flags=flags)(KEY), c.apply(fn, flags=flags)({})


@program
def empty_collections(c: Any) -> Any:
    def fn(scope: Any) -> None:
        scope.push("a")
        scope.variable("state", "q", dict)

    return c.init(fn)(KEY), c.apply(fn, mutable=True)({"none": {}})


@program
def boxes(c: Any) -> Any:
    def fn(scope: Any, x: Any) -> Any:
        init = PARTITIONED[c](jax.random.uniform, ("embed",))
        seen = scope.variable("state", "seen", init, KEY, (2,))
        seen.value = seen.value + 1
        raw = scope.param("raw", init, (2,), unbox=False)
        return x[:, :2] + scope.param("b", init, (2,)) + c.unbox(raw)

    y, variables = c.init(fn)(KEY, X)
    return y, variables, c.meta.unbox(variables), c.apply(fn, mutable=True)(variables, X)


@program
def lazy(c: Any) -> Any:
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    return c.lazy_init(dense)(KEY, shape), c.lazy_init(dense)(KEY, shape, features=4)


@program
def trace_levels(c: Any) -> Any:
    level = c.current_trace()
    c.check_trace_level(level)
    inside = []
    jax.jit(lambda x: inside.append(c.current_trace() == level))(1.0)
    return inside, c.current_trace() == level


# --- a few layers as functions


@program
def layers(c: Any) -> Any:
    image = jnp.arange(48.0).reshape(1, 4, 4, 3)

    def fn(scope: Any) -> Any:
        y = scope.child(c.nn.conv)(image, 2, (3, 3), strides=(2, 2))
        y = scope.child(c.nn.batch_norm)(y)
        y = scope.child(c.nn.layer_norm)(y)
        y = scope.child(c.nn.dropout)(y, 0.5)
        return scope.child(c.nn.dense)(y.reshape(1, -1), 2)

    keys = {"params": KEY, "dropout": quick_key(1)}
    y, variables = jax.jit(c.init(fn))(keys)
    # One operation at a time: of a program compiled as a whole the last bit of a sum is up to XLA,
    # and changes with what the process compiled before.
    run = c.apply(fn, mutable=["batch_stats"])
    return jax.tree.map(jnp.shape, variables), run(variables, rngs=keys)[1], y.shape


@program
def layers_with_running_averages(c: Any) -> Any:
    x = jnp.arange(12.0).reshape(4, 3)
    _, variables = c.init(c.nn.batch_norm)(KEY, x)
    return c.apply(c.nn.batch_norm)(variables, x, use_running_average=True)


# --- errors


def _leaked(c: Any) -> Any:
    scope, _ = c.init(lambda scope: scope)(KEY)
    return scope.param("a", lambda key: 1.0)


def _twice(c: Any, *makes: Any) -> Any:
    return c.init(lambda scope: [make(scope) for make in makes])(KEY)


ERRORS = {
    "InvalidScopeError": _leaked,
    "ScopeCollectionNotFound": lambda c: c.init(dense, mutable=False)(KEY, X),
    "ScopeParamNotFoundError": lambda c: c.apply(dense)({"params": {"x": 1.0}}, X),
    "ScopeParamShapeError": lambda c: c.apply(dense)({"params": {"kernel": jnp.ones(2)}}, X),
    "ScopeVariableNotFoundError": lambda c: c.apply(lambda s: s.variable("a", "b"))(
        {"a": {"c": 1}}
    ),
    "ModifyScopeVariableError": lambda c: c.apply(lambda s: s.put_variable("a", "b", 1))({}),
    "ApplyScopeInvalidVariablesTypeError": lambda c: c.bind({"params": 1}),
    "ApplyScopeInvalidVariablesStructureError": lambda c: c.apply(dense)(
        {"params": {"params": {}}}, X
    ),
    "InvalidRngError": lambda c: c.init(lambda s: s.make_rng("drop"))({"other": KEY}),
    "InvalidFilterError": lambda c: c.apply(dense, mutable=3)({"params": {}}, X),
}
PARTITIONED = {
    core: shardflax.partitioning.with_partitioning,
    flax.core: flax.core.meta.with_partitioning,
}


@pytest.mark.parametrize("name", ERRORS)
def test_same_errors(name: str) -> None:
    for c in (flax.core, core):
        with pytest.raises(Exception) as info:
            ERRORS[name](c)
        assert type(info.value).__name__ == name, repr(info.value)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c: _twice(c, lambda s: s.push("a"), lambda s: s.push("a")),
        lambda c: _twice(c, lambda s: s.param("a", lambda key: 1.0), lambda s: s.push("a")),
        lambda c: _twice(c, lambda s: s.reserve("a"), lambda s: s.reserve("a", "params")),
        lambda c: c.init(dense)(3, X),
        lambda c: c.init(lambda s: s.get_flag("none"))(KEY) and _raise_found(c),
    ],
)
def test_same_value_errors(wrong: Any) -> None:
    for c in (flax.core, core):
        with pytest.raises(ValueError):
            wrong(c)


def _raise_found(c: Any) -> Any:
    # flax.core gives the error back instead of raising it.
    raise c.init(lambda s: s.get_flag("none"))(KEY)[0]


def test_lazy_init_says_what_it_cannot_know() -> None:
    """Flax says so, too, but not with every JAX: with 0.12 it gives zeros."""
    lazy = core.lazy_init(lambda scope, x: scope.param("w", lambda key: x))
    assert lazy(KEY, jnp.ones(2))["params"]["w"].tolist() == [1.0, 1.0]
    with pytest.raises(LazyInitError, match="'params/w' depends on the values"):
        lazy(KEY, jax.ShapeDtypeStruct((2,), jnp.float32))


def test_check_trace_level() -> None:
    level = core.current_trace()
    with pytest.raises(JaxTransformError, match="inside of a JAX transform"):
        jax.jit(lambda x: core.check_trace_level(level))(1.0)


def test_modules_and_functions_run_on_one_kind_of_scope() -> None:
    """A function of a scope works on the scope of a module, and shares its names and keys."""
    import shardflax.nn as nn

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            assert self.scope is not None
            return self.scope.child(dense, "inner")(nn.Dense(3)(x))

    y, variables = Mixed().init_with_output(KEY, X)
    assert sorted(variables["params"]) == ["Dense_0", "inner"]
    assert y.shape == (2, 2)
    assert Mixed().apply(variables, X).tolist() == y.tolist()
