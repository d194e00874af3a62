"""What runs of modules offer, against Linen: perturb, lazy_init, bind, scopes of all kinds."""

from __future__ import annotations

from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import pytest

from tests.core.harness import OURS, quick_key, registry, same

KEY = quick_key(7)
X = jnp.arange(6.0).reshape(2, 3)
SHAPE = jax.ShapeDtypeStruct((2, 3), jnp.float32)
BUILT_IN = (ValueError, AssertionError, AttributeError, KeyError, Exception)
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same(run)


def outcome(fn: Any) -> Any:
    """What a function returns, or what it raises: Linen's class of error, or a built-in one."""
    try:
        return fn()
    except Exception as error:
        kinds = [
            c
            for c in type(error).__mro__
            if (hasattr(flax.errors, c.__name__) and c.__name__ != "FlaxError") or c in BUILT_IN
        ]
        return kinds[0].__name__


# --- perturb


def perturbed(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = self.perturb("hidden", nn.Lin()(x))
            return self.perturb("out", nn.Lin(2)(x), collection="more")

    return M()


@program
def perturb_is_nothing_without_its_collection(nn: Any) -> Any:
    model = perturbed(nn)
    variables = model.init(KEY, X)
    params = {"params": variables["params"]}
    return variables, [
        model.apply(variables, X),
        model.apply(params, X),
        model.apply({**params, "perturbations": variables["perturbations"]}, X),
        model.apply(params, X, mutable=["perturbations"]),
    ]


@program
def perturb_gives_gradients(nn: Any) -> Any:
    model = perturbed(nn)
    variables = model.init(KEY, X)

    def loss(params: Any, perturbations: Any, more: Any) -> Any:
        tree = {"params": params, "perturbations": perturbations, "more": more}
        return (model.apply(tree, X) ** 2).sum()

    parts = (variables["params"], variables["perturbations"], variables["more"])
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*parts)


@program
def perturb_of_an_unknown_name(nn: Any) -> Any:
    model = perturbed(nn)
    variables = model.init(KEY, X)
    other = {**variables, "perturbations": {"other": jnp.ones(3)}}
    return outcome(lambda: model.apply(other, X)), outcome(
        lambda: model.apply({**variables, "perturbations": {}}, X)
    )


@program
def perturb_of_a_tree(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.perturb("both", {"a": x, "b": (x, x.sum())})

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def perturb_twice(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.perturb("a", self.perturb("a", x))

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def perturb_in_a_method_that_is_not_compact(nn: Any) -> Any:
    class M(nn.Module):
        def __call__(self, x: Any) -> Any:
            return self.perturb("a", x)

    return outcome(lambda: M().init_with_output(KEY, X))


# --- lazy_init


@program
def lazy_init_is_init(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, *, scale: Any = 1.0) -> Any:
            x = nn.Count()(nn.Lin()(x) * scale)
            table = self.variable("consts", "table", lambda: jnp.arange(3.0) + 1)
            return nn.Drop("params")(x) + table.value

    model = M()
    return (
        model.lazy_init(KEY, SHAPE),
        model.lazy_init({"params": KEY}, SHAPE, scale=2.0),
        model.lazy_init(KEY, X),
        model.lazy_init(KEY, x=SHAPE, scale=SHAPE),
        model.lazy_init(KEY, SHAPE, mutable=["params", "state", "consts"]),
        model.lazy_init(KEY, SHAPE, method=lambda m, x: m(x)),
    )


@program
def lazy_init_is_concrete(nn: Any) -> Any:
    """What depends on given arrays alone has values, also while the model is traced."""

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, n: Any, given: Any) -> Any:
            width = 2 if given.sum() > 3 else 5
            return self.param("w", nn.uniform, (width, n)) @ x.T[:n, :1] + given.sum()

    return M().lazy_init(KEY, SHAPE, 3, jnp.ones(4))


@program
def lazy_init_of_several(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, batch: Any) -> Any:
            return nn.Lin()(batch["a"]) + nn.Lin(2)(batch["b"][0]).sum()

    shapes = {"a": SHAPE, "b": [jax.ShapeDtypeStruct((1, 4), jnp.float32), "text", None]}
    return M().lazy_init(KEY, shapes)


def test_lazy_init_is_never_too_large() -> None:
    """No program for both: with JAX 0.12, Flax allocates the argument."""
    lin = OURS.Lin(2, use_bias=False)
    variables = lin.lazy_init(KEY, jax.ShapeDtypeStruct((10**14, 3), jnp.float32))
    assert variables["params"]["kernel"].shape == (3, 2)


@program
def lazy_init_with_lifts(nn: Any) -> Any:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return nn.Lin()(x), None

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.remat(nn.Lin)(3)(x)
            x = nn.jit(nn.Lin)(3)(x)
            options: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Body, length=2, **options)()(x, None)
            return nn.vmap(nn.Lin, **options)(3)(x)

    variables = M().lazy_init(KEY, SHAPE)
    return jax.tree.map(jnp.shape, variables), variables["params"]["VmapLin_0"]


# --- bind, unbind, setup


@program
def bind_is_lazy(nn: Any) -> Any:
    class M(nn.Module):
        width: int = 3

        def setup(self) -> None:
            raise KeyError("setup")

        def __call__(self, x: Any) -> Any:
            return x

    bound = M().bind({})
    return bound.width, outcome(lambda: bound(X))


@program
def setup_runs_once(nn: Any) -> Any:
    seen: list[str] = []

    class M(nn.Module):
        tag: str

        def setup(self) -> None:
            seen.append(self.tag)
            self.layer = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    class Two(nn.Module):
        def setup(self) -> None:
            self.used = M("used")
            self.unused = M("unused")

        def __call__(self, x: Any) -> Any:
            return self.used(self.used(x)) + self.used.layer(x)

    return Two().init_with_output(KEY, X), seen


@program
def setup_called_by_hand(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = 3

        def __call__(self, x: Any) -> Any:
            return self.a

    bound = M().bind({})
    bound.setup()
    return bound.a, outcome(M().setup), outcome(nn.Lin().setup)


@program
def unbind_of_a_submodule(nn: Any) -> Any:
    class Inner(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.layer(x) + nn.Lin()(x)

    class M(nn.Module):
        def setup(self) -> None:
            self.inner = Inner(nn.Lin(2, name="given"))

        def __call__(self, x: Any) -> Any:
            return self.inner(x)[:, :2]

    class N(nn.Module):
        shared: Any

        def setup(self) -> None:
            self.inner = Inner(self.shared)

        def __call__(self, x: Any) -> Any:
            return self.inner(x)

    n = N(nn.Lin())
    bound = n.bind(n.init(KEY, X))
    inner, variables = bound.inner.unbind()
    outer, everything = bound.unbind()
    return variables, everything, inner.name, inner.layer.name, outer == n


@program
def rngs_of_bound_modules(nn: Any) -> Any:
    class M(nn.Module):
        def __call__(self, x: Any) -> Any:
            return x + jax.random.uniform(self.make_rng("a"), ()), self.has_rng("a")

    bound = M().bind({}, rngs={"a": KEY})
    return bound(X), bound(X), outcome(lambda: M().bind({}).make_rng("a"))


@program
def bound_and_written(nn: Any) -> Any:
    bound = nn.Count().bind(nn.Count().init(KEY, X), mutable=["state"])
    bound(X)
    y = bound(X)
    return y, bound.variables, bound.get_variable("state", "count"), bound.unbind()[1]


@program
def variables_of_parts(nn: Any) -> Any:
    seen: list[Any] = []

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Lin()
            y = nn.Count()(layer(x))
            seen.append((sorted(layer.variables), layer.path, layer.scope is None, layer.name))
            seen.append(sorted(self.variables))
            return y

    return M().init_with_output(KEY, X), seen


@program
def state_of_unbound_modules(nn: Any) -> Any:
    layer = nn.Lin()
    calls = {
        "path": lambda: layer.path,
        "variables": lambda: layer.variables,
        "param": lambda: layer.param("a", nn.uniform, (2,)),
        "variable": lambda: layer.variable("a", "b", lambda: 1),
        "get": lambda: layer.get_variable("a", "b"),
        "put": lambda: layer.put_variable("a", "b", 1),
        "has": lambda: layer.has_variable("a", "b"),
        "rng": lambda: layer.make_rng("a"),
        "has_rng": lambda: layer.has_rng("a"),
        "sow": lambda: layer.sow("a", "b", 1),
        "perturb": lambda: layer.perturb("a", X),
        "is_initializing": layer.is_initializing,
        "is_mutable": lambda: layer.is_mutable_collection("a"),
        "unbind": layer.unbind,
        "call": lambda: layer(X),
        "scope": lambda: layer.scope is None,
    }
    found: dict[str, Any] = {}
    for name, fn in calls.items():
        try:
            found[name] = fn()
        except (ValueError, AssertionError):  # Linen has bare assertions at `param`
            found[name] = "unbound"
        except Exception as error:
            found[name] = type(error).__name__
    return found


# --- methods and collections


@program
def methods_in_all_forms(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()

        def __call__(self, x: Any, scale: float = 1.0) -> Any:
            return self.layer(x) * scale

        def twice(self, x: Any) -> Any:
            return 2 * self.layer(x)

        @nn.nowrap
        def plain(self, x: Any) -> Any:
            return self.layer(x) + 1

        @staticmethod
        def static(x: Any) -> Any:
            return x

    model = M()
    variables = model.init(KEY, X)
    methods = [
        None,
        "twice",
        M.twice,
        model.twice,
        M().twice,
        M.__call__,
        "plain",
        M.plain,
        lambda m, x: m.twice(x) - 1,
        lambda m, x: m.layer(x),
        lambda m, x: m.layer.variables,
    ]
    bad = ["no_such", 3, M, X, "static", "width"]
    return (
        [model.apply(variables, X, method=m) for m in methods],
        [model.init(KEY, X, method=m) for m in methods[1:5]],
        [outcome(lambda m=m: model.apply(variables, X, method=m)) for m in bad[:2]],
        model.apply(variables, X, scale=3.0),
    )


@program
def method_of_a_subclass_and_of_a_base(nn: Any) -> Any:
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    class M(Base):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(nn.Lin()(x))

    return [M().init(KEY, X, method=m) for m in (Base.__call__, M.__call__, None)]


@program
def mutable_with_denylists(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            self.sow("losses", "l", 1.0)
            return nn.Sow()(nn.Count()(x))

    model = M()
    variables = model.init(KEY, X)
    forms = [nn.DenyList(()), nn.DenyList("losses"), nn.DenyList(nn.DenyList("state"))]
    forms += [nn.DenyList(False), {"state": 1}, ("state",)]
    return [outcome(lambda m=m: model.apply(variables, X, mutable=m)) for m in forms]


@program
def sow_again_and_again(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Sow()
            layer(layer(x))
            self.sow("sums", "s", x, init_fn=lambda: 0, reduce_fn=lambda a, b: a + b)
            self.sow("last", "s", x, init_fn=lambda: None, reduce_fn=lambda a, b: b)
            return x

    model = M()
    _, once = model.apply({}, X, mutable=True)
    return once, model.apply(once, X, mutable=True), model.init(KEY, X)


@program
def sow_collides(nn: Any) -> Any:
    class Param(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            self.param("a", nn.uniform, (2,))
            return self.sow("intermediates", "a", x)

    class Child(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            nn.Lin(name="a")(x)
            return self.sow("intermediates", "a", x)

    found = [
        outcome(lambda m=m: m().init_with_output(KEY, X, mutable=True)) for m in (Param, Child)
    ]
    return [found[0], isinstance(found[1], str)]  # Linen's is no error of its own


@program
def variables_with_the_names_of_others(nn: Any) -> Any:
    class M(nn.Module):
        which: str

        @nn.compact
        def __call__(self, x: Any) -> Any:
            a = self.param("a", nn.uniform, (2,))
            if self.which == "variable":
                return self.variable("state", "a", lambda: jnp.ones(2)).value + a
            if self.which == "again":
                return self.variable("params", "a", lambda: jnp.ones(2)).value
            return nn.Lin(name="a")(x)

    return [outcome(lambda w=w: M(w).init(KEY, X)) for w in ("variable", "again", "module")]


@program
def capture_by_filter(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.a(self.helper(x))

        def helper(self, x: Any) -> Any:
            return self.a(x) + 1

    model = M()
    variables = model.init(KEY, X)
    filters = [
        lambda m, name: name != "__call__",
        lambda m, name: m.name == "a",
        lambda m, name: isinstance(m, M) and name == "helper",
        lambda m, name: False,
        lambda m, name: True,
    ]
    return [
        model.apply(variables, X, capture_intermediates=f, mutable="intermediates") for f in filters
    ]


@program
def nested_interceptors(nn: Any) -> Any:
    seen: list[Any] = []

    def named(tag: str, add: float) -> Any:
        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            seen.append((tag, type(context.module).__name__, context.method_name))
            result = next_fun(*args, **kwargs)
            return result if result is None else result + add

        return interceptor

    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.other(self.a(x))

        def other(self, x: Any) -> Any:
            return x * 2

        @nn.nowrap
        def hidden(self) -> Any:
            return 1

    model = M()
    variables = model.init(KEY, X)
    with nn.intercept_methods(named("outer", 1.0)):
        with nn.intercept_methods(named("inner", 10.0)):
            y = model.apply(variables, X)
        z = model.apply(variables, X)
    return y, z, model.apply(variables, X), seen


@program
def interceptors_that_replace(nn: Any) -> Any:
    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Lin):
            return context.orig_method(args[0] + 1)
        if context.method_name == "skip":
            return args[0]
        return next_fun(*args, **kwargs)

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.skip(nn.Lin()(x))

        def skip(self, x: Any) -> Any:
            raise AssertionError("never called")

    with nn.intercept_methods(interceptor):
        return M().init_with_output(KEY, X)


@program
def interceptors_see_lifted_calls(nn: Any) -> Any:
    seen: list[Any] = []

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and not type(context.module).__name__.startswith("Ck"):
            seen.append(context.module.name)
        return next_fun(*args, **kwargs)

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.jit(nn.Lin)(3, name="a")(nn.Lin(name="b")(x))

    with nn.intercept_methods(interceptor):
        M().init(KEY, X)
    return sorted(set(seen) - {None}) == ["a", "b"]


@program
def interceptors_change_what_is_jitted(nn: Any) -> Any:
    def doubled(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        return y * 2 if context.method_name == "__call__" else y

    def of(cls: Any) -> Any:
        return lambda module, name: isinstance(module, cls)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.jit(Block)(name="block")(x)

    variables = M().init(KEY, X)
    filters = (True, of(nn.Lin), of(Block), True)
    captured = [M().apply(variables, X, capture_intermediates=f)[1] for f in filters]
    plain = M().apply(variables, X)
    with nn.intercept_methods(doubled):
        intercepted = M().apply(variables, X)
    return captured, plain, intercepted, M().apply(variables, X)


# --- shared scopes


def adapter(nn: Any) -> Any:
    class Adapter(nn.Module):
        base: Any

        def setup(self) -> None:
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.base(x) + x @ self.param("extra", nn.uniform, (3, 3))

    return Adapter


@program
def share_scope_at_the_top(nn: Any) -> Any:
    model = adapter(nn)(nn.Lin())
    variables = model.init(KEY, X)
    return variables, model.apply(variables, X)


@program
def share_scope_of_a_child(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = adapter(nn)(nn.Lin())(x)
            x = adapter(nn)(nn.Lin(name="given"), name="named")(x)
            return nn.Lin()(x)

    return M().init_with_output(KEY, X)


@program
def share_scope_of_a_module_from_elsewhere(nn: Any) -> Any:
    seen: list[Any] = []

    class M(nn.Module):
        def setup(self) -> None:
            self.lin = nn.Lin()
            self.adapter = adapter(nn)(self.lin)

        def __call__(self, x: Any) -> Any:
            y = self.adapter(self.lin(x))
            seen.append((self.adapter.path, self.lin.path, self.adapter.name))
            return y

    return M().init_with_output(KEY, X), seen


@program
def share_scope_in_compact(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            shared = nn.Lin(name="shared")
            y = shared(x)
            return adapter(nn)(shared)(y), adapter(nn)(shared, name="again")

    return outcome(lambda: M().init_with_output(KEY, X)[0][0])


@program
def share_scope_of_setup_submodules(nn: Any) -> Any:
    class Two(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = nn.Lin(2)

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    class M(nn.Module):
        two: Any

        def setup(self) -> None:
            nn.share_scope(self, self.two)
            self.c = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.c(self.two(x)), self.path, self.two.path, self.c.path

    return M(Two()).init_with_output(KEY, X)


@program
def share_scope_collides(nn: Any) -> Any:
    class M(nn.Module):
        base: Any

        def setup(self) -> None:
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.base(x) + self.param("kernel", nn.uniform, (3, 3)).sum()

    return outcome(lambda: M(nn.Lin()).init(KEY, X))


@program
def share_scope_of_unbound_modules(nn: Any) -> Any:
    return outcome(lambda: nn.share_scope(nn.Lin(), nn.Lin()))


@program
def share_scope_with_keys(nn: Any) -> Any:
    class M(nn.Module):
        base: Any

        def setup(self) -> None:
            nn.share_scope(self, self.base)

        def __call__(self, x: Any) -> Any:
            return self.base(x) + jax.random.uniform(self.make_rng("dropout"), x.shape)

    class Top(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return M(nn.Drop())(x), M(nn.Drop())(x)

    return M(nn.Drop()).apply({}, X, rngs={"dropout": KEY}), Top().apply(
        {}, X, rngs={"dropout": KEY}
    )


# --- compact methods with scopes of their own


@program
def compact_name_scopes(nn: Any) -> Any:
    seen: list[Any] = []

    class M(nn.Module):
        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            seen.append((self.path, self.name))
            return nn.Lin(4)(x) + nn.Lin(4, name="two")(x)

        @nn.compact_name_scope
        def down(self, x: Any) -> Any:
            return nn.Drop("params")(nn.Lin(3)(nn.Lin(2)(x)))

        def __call__(self, x: Any) -> Any:
            return self.down(self.up(x))

    variables = M().init(KEY, X)
    return (
        variables,
        M().apply(variables, X, rngs={"params": KEY}),
        M().apply(variables, X, method="up"),
        seen,
    )


@program
def compact_name_scopes_beside_compact(nn: Any) -> Any:
    class M(nn.Module):
        width: int = 3

        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            return nn.Lin(self.width)(x)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(self.up(self.up(nn.Lin()(x))))

    return M().init_with_output(KEY, X)


@program
def compact_name_scopes_beside_setup(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()

        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            return self.layer(nn.Lin()(x))

        def __call__(self, x: Any) -> Any:
            return self.up(self.layer(x))

    return M().init_with_output(KEY, X)


@program
def compact_name_scopes_nest(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact_name_scope
        def inner(self, x: Any) -> Any:
            return nn.Lin()(x)

        @nn.compact_name_scope
        def outer(self, x: Any) -> Any:
            return self.inner(nn.Lin()(x))

        def __call__(self, x: Any) -> Any:
            return self.inner(self.outer(x))

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def compact_name_scopes_in_subclasses(nn: Any) -> Any:
    class Base(nn.Module):
        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            return nn.Lin()(x)

        def __call__(self, x: Any) -> Any:
            return self.up(x)

    class Plain(Base):
        pass

    return Plain().init_with_output(KEY, X)


@program
def compact_name_scopes_with_state(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            self.sow("intermediates", "x", x)
            return nn.Count()(x) + jax.random.uniform(self.make_rng("dropout"), x.shape)

        def __call__(self, x: Any) -> Any:
            return self.up(self.up(x))

    class Declares(nn.Module):
        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            return x + self.param("bias", nn.uniform, (3,))

        def __call__(self, x: Any) -> Any:
            return self.up(x)

    class Compact(Declares):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.up(x)

    run: Any = {"rngs": {"dropout": KEY}, "mutable": True}
    return (
        M().apply({}, X, **run),
        outcome(lambda: Declares().init(KEY, X)),
        Compact().init_with_output(KEY, X),
    )


@program
def compact_name_scopes_collide(nn: Any) -> Any:
    class M(nn.Module):
        first: bool

        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            return nn.Lin()(x)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            if self.first:
                x = self.up(x)
            x = nn.Lin(name="up")(x)
            return x if self.first else self.up(x)

    return [outcome(lambda first=first: M(first).init(KEY, X)) for first in (True, False)]


# --- raw JAX transforms


def raw(nn: Any, transform: Any, use: Any, **run: Any) -> Any:
    """A module that does `use(self, layer, x)` inside of a JAX transform."""

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Lin(name="layer")
            if self.is_initializing():
                layer(x)
            return transform(lambda x: use(self, layer, x))(x)

    variables = M().init({"params": KEY, "dropout": KEY}, X) if not run.get("fresh") else {}
    return M().apply(variables, X, rngs={"dropout": KEY})


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, x)[1],
}


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_inside_of_a_jax_transform(name: str) -> None:
    """Parameters are read, keys are drawn, submodules found: nothing of it leaks."""

    def use(self: Any, layer: Any, x: Any) -> Any:
        noise = jax.random.uniform(self.make_rng("dropout"), ())
        return layer(x) * self.variables["params"]["layer"]["bias"].sum() + noise

    same(lambda nn: raw(nn, TRANSFORMS[name], use))


@program
def parameters_made_inside_of_vmap_and_grad(nn: Any) -> Any:
    """What does not depend on the mapped values is no tracer, and may be written."""

    class M(nn.Module):
        transform: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Lin(name="layer")
            return self.transform(lambda x: layer(x).sum())(x)

    vmap, grad = M(jax.vmap), M(jax.grad)
    return (
        vmap.init_with_output(KEY, X),
        grad.init_with_output(KEY, X),
        jax.jit(vmap.init_with_output)(KEY, X),
    )


@program
def lifts_inside_of_jax_transforms(nn: Any) -> Any:
    class M(nn.Module):
        lift: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = self.lift(nn.Lin)(3, name="layer")
            return jax.vmap(layer)(x)

    variables = {"params": {"layer": nn.Lin().init(KEY, X)["params"]}}
    return [M(lift).apply(variables, X) for lift in (nn.remat, nn.jit)]
