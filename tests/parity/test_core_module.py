"""Modules against Linen: construction, naming, state, runs, interceptors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.core.harness import quick_key, registry, same

KEY = quick_key(7)
X = jnp.arange(6.0).reshape(2, 3)
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same(run)


# --- names and sharing


@program
def compact_names(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Lin()(x)
            x = nn.Lin(name="mid")(x)
            return nn.Lin(2)(nn.Lin(use_bias=False)(x))

    return M().init_with_output(KEY, X)


@program
def explicit_name_collides_with_later_auto_name(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Lin(name="Lin_1")(x)
            return nn.Lin()(x)

    return M().init_with_output(KEY, X)


@program
def setup_names(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.stack = [nn.Lin(), nn.Lin(3)]
            self.table = {"x": nn.Lin(), "y": (nn.Lin(), nn.Lin())}
            self.scale = self.param("scale", nn.uniform, (3,))

        def __call__(self, x: Any) -> Any:
            x = self.a(x) * self.scale
            for layer in self.stack:
                x = layer(x)
            return self.table["y"][1](self.table["y"][0](self.table["x"](x)))

    return M().init_with_output(KEY, X)


@program
def unused_setup_modules_make_nothing(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.b(x)

    return M().init_with_output(KEY, X)


@program
def setup_then_compact_submodules(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(self.a(x)) + nn.Lin()(x)

    return M().init_with_output(KEY, X)


@program
def called_twice_shares(nn: Any) -> Any:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Drop("params")(nn.Lin()(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            inner = Inner()
            return inner(inner(x)), inner(x)

    return M().init_with_output(KEY, X)


@program
def called_twice_makes_all_below_anew(nn: Any) -> Any:
    class Inner(nn.Module):
        first: Any = None

        def setup(self) -> None:
            self.second = [nn.Lin()]
            self.scale = self.param("scale", nn.uniform, (3,))

        def __call__(self, x: Any) -> Any:
            return self.second[0](self.first(x)) * self.scale + nn.uniform(self.make_rng("a"), (3,))

    class Sharing(nn.Module):
        base: Any

        def setup(self) -> None:
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.base(x) + nn.Lin(name="more")(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Sharing(nn.Lin(parent=None))(Inner(nn.Lin(parent=None))(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            outer, lifted = Outer(), nn.remat(Outer)()
            return outer(lifted(lifted(outer(x))))

    model, keys = M(), {"params": KEY, "a": quick_key(8)}
    variables = model.init(keys, X)
    bound = model.bind(variables, rngs=keys)
    return variables, bound(X), bound(X)


@program
def names_that_are_empty_or_odd(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return [nn.Lin(name=name)(x) for name in ("", "a/b", "apply", "Lin_0")]

    return M().init_with_output(KEY, X)


@program
def passed_as_fields(nn: Any) -> Any:
    class M(nn.Module):
        one: Any
        many: Any
        table: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = self.one(x)
            for layer in self.many:
                x = layer(x)
            return self.table["k"](x)

    model = M(nn.Lin(), [nn.Lin(), nn.Lin(3)], {"k": nn.Lin()})
    variables = model.init(KEY, X)
    return variables, model.apply(variables, X)


@program
def passed_from_outside_and_shared(nn: Any) -> Any:
    class Half(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    class M(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Half(self.layer)(x) + Half(self.layer, name="again")(x)

    return M(nn.Lin()).init_with_output(KEY, X)


@program
def made_inside_and_passed_on(nn: Any) -> Any:
    class Half(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.layer(nn.Lin()(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            shared = nn.Lin(name="shared")
            return Half(shared)(x) + Half(layer=shared)(x)

    return M().init_with_output(KEY, X)


@program
def made_inside_passed_on_in_setup(nn: Any) -> Any:
    class Half(nn.Module):
        layer: Any

        def setup(self) -> None:
            self.own = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.layer(self.own(x))

    class M(nn.Module):
        def setup(self) -> None:
            self.shared = nn.Lin()
            self.a = Half(self.shared)
            self.b = Half(self.shared)

        def __call__(self, x: Any) -> Any:
            return self.a(x) + self.b(x)

    return M().init_with_output(KEY, X)


@program
def same_instance_in_two_fields(nn: Any) -> Any:
    class M(nn.Module):
        a: Any
        b: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.a(x) + self.b(x)

    layer = nn.Lin()
    return M(layer, layer).init_with_output(KEY, X)


@program
def field_used_before_in_nested(nn: Any) -> Any:
    class Deep(nn.Module):
        inner: Any

        def setup(self) -> None:
            self.act = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.inner(self.act(x))

    return Deep(Deep(nn.Lin())).init_with_output(KEY, X)


@program
def named_outside(nn: Any) -> Any:
    class M(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    return M(nn.Lin(name="given")).init_with_output(KEY, X)


@program
def two_methods_of_setup(nn: Any) -> Any:
    class Auto(nn.Module):
        def setup(self) -> None:
            self.enc = nn.Lin()
            self.dec = nn.Lin(name="decoder")

        def __call__(self, x: Any) -> Any:
            return self.decode(self.encode(x))

        def encode(self, x: Any) -> Any:
            return self.enc(x)

        def decode(self, z: Any) -> Any:
            return self.dec(z)

    variables = Auto().init(KEY, X)
    model = Auto()
    return (
        variables,
        model.apply(variables, X, method=Auto.encode),
        model.apply(variables, X, method="decode"),
        model.apply(variables, X, method=model.decode),
        model.apply(variables, X, method=lambda m, x: m.enc(x) + 1),
        model.init(KEY, X, method="decode"),
        model.init(KEY, X, method=lambda m, x: m.decode(x)),
    )


@program
def method_of_field_submodule(nn: Any) -> Any:
    class M(nn.Module):
        layer: Any

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    model = M(nn.Lin())
    variables = model.init(KEY, X)
    return variables, model.apply(variables, X, method="layer")


# --- classes


@program
def inheritance(nn: Any) -> Any:
    class Base(nn.Module):
        a: int
        b: int = 2

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(self.a + self.b)(x)

    class Derived(Base):
        c: int = 1

        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Lin()(x)
            return super().__call__(x) * self.c, nn.Lin()(x)

    class Only(Derived):
        pass

    model = Only(1, 2, 3, name="top")
    return model.init_with_output(KEY, X), model.name, repr(model)


@program
def kw_only(nn: Any) -> Any:
    class Base(nn.Module, kw_only=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        a: int = 1
        b: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(self.a + self.b)(x)

    class Derived(Base, kw_only=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        c: int

    return Derived(b=1, c=2).init_with_output(KEY, X)


@program
def post_init(nn: Any) -> Any:
    class M(nn.Module):
        width: Any = None

        def __post_init__(self) -> None:
            if self.width is None:
                self.width = 4
            super().__post_init__()

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(self.width)(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return M()(x) + M(1)(x)

    return Outer().init_with_output(KEY, X), M().width


@program
def post_init_makes_modules(nn: Any) -> Any:
    class M(nn.Module):
        layer: Any = None

        def __post_init__(self) -> None:
            if self.layer is None:
                self.layer = nn.Lin(2)
            super().__post_init__()

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    return M().init_with_output(KEY, X)


@program
def equality_and_hash(nn: Any) -> Any:
    class M(nn.Module):
        a: int
        b: Any = None

    return (
        M(1) == M(1),
        M(1) == M(2),
        hash(M(1)) == hash(M(1)),
        M(1, name="x") == M(1, name="x"),
        M(1, name="x") == M(1),
        M(1, M(2)) == M(1, M(2)),
        nn.Lin(3) == nn.Lin(3),
    )


@program
def class_attributes_and_properties(nn: Any) -> Any:
    class M(nn.Module):
        width: int = 2
        factor = 3

        @property
        def total(self) -> int:
            return self.width * self.factor

        @staticmethod
        def double(x: Any) -> Any:
            return 2 * x

        @classmethod
        def make(cls) -> Any:
            return cls(width=4)

        @nn.nowrap
        def make_layer(self) -> Any:
            return nn.Lin(self.total)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.double(self.make_layer()(x))

    return M.make().init_with_output(KEY, X), M().total


@program
def properties_on_setup(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()

        @property
        def kernel(self) -> Any:
            return self.layer.variables["params"]["kernel"]

        def __call__(self, x: Any) -> Any:
            y = self.layer(x)
            return y + self.kernel.sum()

    return M().init_with_output(KEY, X)


@program
def partials(nn: Any) -> Any:
    class M(nn.Module):
        layer: Any = functools.partial(nn.Lin, 4)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.layer()(x) + self.layer(use_bias=False)(x)

    return M().init_with_output(KEY, X)


@program
def clone_and_copy(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            base = nn.Lin(4, parent=None)
            return base.copy()(x) + base.copy(name="named")(x) + base.clone(parent=self)(x)

    return M().init_with_output(KEY, X), nn.Lin(2).clone(features=5).features


@program
def parent_none_modules(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            free = nn.Lin(4, parent=None)
            return free.init_with_output(quick_key(1), x)

    return M().init_with_output(KEY, X)


@program
def nested_runs(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y, made = nn.Lin(2, parent=None).init_with_output(quick_key(1), x)
            return y, made, nn.Lin()(x)

    return M().init_with_output(KEY, X)


@program
def scalar_helpers(nn: Any) -> Any:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.path, self.name, self.has_rng("dropout"), self.is_initializing()

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            has = (
                self.has_variable("params", "w"),
                self.is_mutable_collection("params"),
                self.is_mutable_collection("cache"),
                self.get_variable("params", "w", 3),
            )
            self.param("w", nn.uniform, (2,))
            return has, self.has_variable("params", "w"), Inner()(x), self.path

    model = M()
    y, variables = model.init_with_output({"params": KEY, "dropout": KEY}, X)
    return y, variables, model.apply(variables, X, mutable="cache")


# --- state


@program
def variables_and_state(nn: Any) -> Any:
    model = nn.Count()
    variables = model.init(KEY, X)
    y, new = model.apply(variables, X, mutable=["state"])
    return variables, y, new, model.apply(new, X, mutable="state")


@program
def mutable_in_all_forms(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.Sow()(nn.Lin()(x))
            self.sow("losses", "l", y.sum())
            if self.is_mutable_collection("state"):
                nn.Count()(x)
            return y

    model = M()
    variables = model.init(KEY, X)
    forms = (
        "state",
        ["losses"],
        ("losses", "intermediates"),
        {"losses", "state"},
        frozenset(["losses"]),
        [],
        True,
        False,
        nn.DenyList("params"),
        nn.DenyList(["losses", "state"]),
    )
    drop = {"params": variables["params"]}
    return [model.apply(v, X, mutable=m) for m in forms for v in (variables, drop) if m != "state"]


@program
def init_mutable(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Count()(nn.Sow()(nn.Lin()(x)))

    return [
        M().init(KEY, X, mutable=m)
        for m in (True, ["params", "state"], nn.DenyList("intermediates"))
    ]


@program
def untouched_mutable_collections(nn: Any) -> Any:
    """Collections that exist and may change come back, empty ones never appear."""
    model = nn.Lin()
    variables = model.init(KEY, X)
    full = {**variables, "cache": {"a": jnp.ones(2)}, "empty": {}}
    return [
        model.apply(full, X, mutable=m)
        for m in (True, ["cache"], ["empty"], ["absent"], ["cache", "absent"])
    ]


@program
def sow_forms(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            told = [self.sow("intermediates", "h", x), self.sow("intermediates", "h", x + 1)]
            self.sow("sums", "s", x.sum(), reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
            self.sow("sums", "s", x.sum(), reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
            return told

    model = M()
    return [model.apply({}, X, mutable=m) for m in (False, True, ["sums"], ["intermediates"])]


@program
def put_and_get(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            old = self.get_variable("cache", "a", jnp.zeros(2))
            self.put_variable("cache", "a", old + 1)
            v = self.variable("cache", "b", lambda s: jnp.zeros(s), (2,))
            v.value = v.value + old
            return old, v.value, v.is_mutable()

    y, state = M().apply({}, X, mutable=["cache"])
    return y, state, M().apply(state, X, mutable=["cache"])


@program
def dicts_as_variables(nn: Any) -> Any:
    """A dict is written into the dict that is there."""

    class M(nn.Module):
        @nn.compact
        def __call__(self) -> Any:
            found = self.variable("state", "d", lambda: {"a": {"b": 1}, "c": 2})
            found.value = {"a": {"d": 3}}
            self.put_variable("state", "d", {"e": 4, "c": {"f": 5}})
            self.put_variable("state", "number", {"a": 1})
            return found.value

    model = M()
    given = {"state": {"d": {"a": 1, "z": 2}, "number": 3}}
    return model.init_with_output({}), model.apply(given, mutable=["state"]), given


@program
def trees_as_params(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            p = self.param(
                "tree", lambda key: {"a": jax.random.uniform(key, (2,)), "b": [jnp.ones(3)]}
            )
            return p["a"].sum() + p["b"][0]

    model = M()
    variables = model.init(KEY, X)
    return variables, model.apply(variables, X)


@program
def init_with_keyword_arguments(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, *, scale: float = 1.0, extra: Any = None) -> Any:
            init = functools.partial(lambda key, shape, std: std * nn.uniform(key, shape))
            return scale * x @ self.param("w", init, (3, 2), std=2.0)

    return M().init_with_output(KEY, X, scale=2.0), M().init_with_output(KEY, x=X)


@program
def variables_are_not_changed(nn: Any) -> Any:
    model = nn.Count()
    variables = model.init(KEY, X)
    before = jax.tree.map(jnp.copy, variables)
    model.apply(variables, X, mutable=["state"])
    return variables, before


@program
def bind_and_unbind(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()
            self.count = nn.Count()

        def __call__(self, x: Any) -> Any:
            return self.count(self.layer(x))

    variables = M().init(KEY, X)
    bound = M().bind(variables, mutable=["state"])
    first, second = bound(X), bound(X)
    layer, layer_variables = bound.layer.unbind()
    module, found = bound.unbind()
    return (
        first,
        second,
        bound.variables,
        layer.apply(layer_variables, X),
        found,
        module.name,
        layer.name,
        bound.layer.variables,
    )


@program
def bind_compact_twice(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Drop()(nn.Lin()(x))

    variables = M().init({"params": KEY, "dropout": KEY}, X)
    bound = M().bind(variables, rngs={"dropout": KEY})
    return bound(X), bound(X)


@program
def variables_property(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.Lin()(x)
            return y, dict(self.variables["params"]["Lin_0"])

    return M().init_with_output(KEY, X)


# --- capture and interceptors


@program
def capture_intermediates(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.helper(self.a(x)) + self.a(x)

        def helper(self, x: Any) -> Any:
            return self.b(x)

    model = M()
    variables = model.init(KEY, X)
    by_type = lambda m, name: isinstance(m, nn.Lin)  # noqa: E731
    by_name = lambda m, name: name == "helper"  # noqa: E731
    return [
        model.apply(variables, X, capture_intermediates=c, mutable=m)
        for c in (True, by_type, by_name)
        for m in (["intermediates"], True)
    ] + [model.init(KEY, X, capture_intermediates=True)]


@program
def capture_without_mutable(nn: Any) -> Any:
    """What was captured is returned, whatever `mutable` says."""
    capture = {"capture_intermediates": True}
    runs = [nn.Sow().apply({}, X, **capture, mutable=m) for m in (False, [], "state")]
    none = nn.Sow().apply({}, X, capture_intermediates=lambda module, name: False)
    return [
        *runs,
        none,
        nn.Sow().apply({}, X, **capture),
        nn.apply(lambda model, x: model(x), nn.Sow(), **capture)({}, X),
        nn.Sow().init(KEY, X, **capture),
    ]


@program
def interceptors(nn: Any) -> Any:
    seen: list[Any] = []

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.twice(nn.Lin()(x))

        def twice(self, x: Any) -> Any:
            return 2 * x

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(("in", type(context.module).__name__, context.method_name, context.module.name))
        result = next_fun(*args, **kwargs)
        seen.append(("out", context.method_name))
        return result

    def shift(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(("shift", context.method_name))
        return next_fun(*(a + 1 for a in args), **kwargs)

    with nn.intercept_methods(record), nn.intercept_methods(shift):
        y, variables = M().init_with_output(KEY, X)
    return y, variables, seen


@program
def interceptor_sees_setup(nn: Any) -> Any:
    seen: list[Any] = []

    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append((type(context.module).__name__, context.method_name))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        M().init(KEY, X)
    return seen


# --- free functions


@program
def free_functions(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    def fn(module: Any, x: Any) -> Any:
        module.sow("intermediates", "y", x)
        return module.layer(x), module(x)

    model = M()
    variables = nn.init(fn, model)(KEY, X)
    return (
        variables,
        nn.init_with_output(fn, model)(KEY, X),
        nn.apply(fn, model)(variables, X),
        nn.apply(fn, model, mutable=["intermediates"])(variables, X),
        nn.apply(fn, model, mutable=True, capture_intermediates=True)(variables, X),
    )


# --- boxes


@program
def boxed_params(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            init = nn.with_partitioning(nn.uniform, ("in", "out"))
            boxed = self.param("boxed", init, (3, 2), unbox=False)
            state = self.variable("state", "s", init, KEY, (3, 2))
            state.value = state.value + 1
            return nn.Lin(kernel_init=init)(x), boxed, state.value

    model = M()
    variables = model.init(KEY, X)
    return variables, model.apply(variables, X, mutable=["state"])


@program
def eval_shapes(nn: Any) -> Any:
    model = nn.Lin(kernel_init=nn.with_partitioning(nn.uniform, ("in", "out")))
    return jax.eval_shape(model.init, KEY, X)
