"""Modules in fields and attributes, against Linen: every kind of container, sharing, names."""

from __future__ import annotations

import collections
import functools
from typing import Any, NamedTuple

import flax.core
import flax.errors
import flax.struct
import jax
import jax.numpy as jnp
import pytest

from shardflax import struct
from shardflax.core.frozen_dict import FrozenDict
from tests.core.harness import OURS, quick_key, registry, same

KEY = quick_key(7)
X = jnp.arange(6.0).reshape(2, 3)
BUILT_IN = (ValueError, AssertionError, AttributeError, KeyError, Exception)
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same(run)


class Pair(NamedTuple):
    first: Any
    second: Any


def frozen(nn: Any) -> Any:
    return FrozenDict if nn is OURS else flax.core.FrozenDict


def dataclass(nn: Any) -> Any:
    @(struct if nn is OURS else flax.struct).dataclass
    class Record:
        left: Any
        right: Any

    return Record


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


def containers(nn: Any) -> dict[str, tuple[Any, Any]]:
    """For each kind of container, two modules in one, and how to get them out."""
    a, b = nn.Lin(3, parent=None), nn.Lin(2, parent=None)
    return {
        "list": ([a, b], lambda c: (c[0], c[1])),
        "tuple": ((a, b), lambda c: (c[0], c[1])),
        "dict": ({"p": a, "q": b}, lambda c: (c["p"], c["q"])),
        "nested": ([{"p": (a, 1)}, [None, b]], lambda c: (c[0]["p"][0], c[1][1])),
        "namedtuple": (Pair(a, b), lambda c: (c.first, c.second)),
        "frozen": (frozen(nn)({"p": a, "q": b}), lambda c: (c["p"], c["q"])),
        "numbers": ({1: a, 2: b}, lambda c: (c[1], c[2])),
        "ordered": (collections.OrderedDict(q=a, p=b), lambda c: (c["q"], c["p"])),
        "record": (dataclass(nn)(a, b), lambda c: (c.left, c.right)),
        "mixed": ([dataclass(nn)(a, None), Pair(2.0, b)], lambda c: (c[0].left, c[1].second)),
    }


KINDS = sorted(containers(OURS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["field", "setup", "compact"])
def test_containers(kind: str, where: str) -> None:
    def run(nn: Any) -> Any:
        container, get = containers(nn)[kind]

        class Field(nn.Module):
            layers: Any

            @nn.compact
            def __call__(self, x: Any) -> Any:
                one, two = get(self.layers)
                return two(one(x)), one.name, two.name

        class Setup(nn.Module):
            def setup(self) -> None:
                self.layers = jax.tree.map(
                    lambda m: m.clone(parent=self) if isinstance(m, nn.Module) else m,
                    container,
                    is_leaf=lambda m: isinstance(m, nn.Module),
                )

            def __call__(self, x: Any) -> Any:
                one, two = get(self.layers)
                return two(one(x)), one.name, two.name

        class Compact(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return Field(container)(x)

        model = {"field": lambda: Field(container), "setup": Setup, "compact": Compact}[where]()
        y, variables = model.init_with_output(KEY, X)
        return y, variables, model.apply(variables, X)[0]

    same(run)


@program
def frozen_attributes(nn: Any) -> Any:
    class M(nn.Module):
        given: Any
        table: Any

        def setup(self) -> None:
            self.many = [nn.Lin(), [nn.Lin()]]
            self.by_name = {"a": nn.Lin(), "b": {"c": nn.Lin()}, "d": [nn.Lin()]}
            self.numbers = [1, {"a": [2]}]
            self.group = (nn.Lin(), [1])

        def __call__(self) -> Any:
            kinds = [type(v).__name__ for v in (self.many, self.many[1], self.by_name)]
            kinds += [type(v).__name__ for v in (self.by_name["b"], self.by_name["d"])]
            kinds += [type(v).__name__ for v in (self.numbers, self.numbers[1], self.group[1])]
            kinds += [type(self.given).__name__, type(self.table).__name__]

            def put() -> None:
                self.by_name["z"] = 1

            return kinds, outcome(put), outcome(lambda: self.many.append(1))

    return M([1], {"a": 1}).apply({}), type(M([1], {"a": 2}).given).__name__


@program
def frozen_fields_of_modules(nn: Any) -> Any:
    class M(nn.Module):
        layers: Any
        table: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return type(self.layers).__name__, type(self.table).__name__

    model = M([nn.Lin()], {"a": nn.Lin()})
    return model.apply({}, X), type(model.layers).__name__, type(model.table).__name__


@program
def the_same_module_twice_in_containers(nn: Any) -> Any:
    class M(nn.Module):
        layers: Any
        other: Any = None

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x if self.other is None else self.other(x)

    a = nn.Lin()
    return [m.init_with_output(KEY, X) for m in (M([a, a]), M([a, nn.Lin(), a]), M([a], a))]


@program
def shared_in_setup(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            layer = nn.Lin()
            self.a = layer
            self.b = layer
            self.c = [layer, nn.Lin()]

        def __call__(self, x: Any) -> Any:
            return self.c[1](self.c[0](self.b(self.a(x)))), self.a.name, self.b.name

    return M().init_with_output(KEY, X)


@program
def setup_attribute_of_a_field(nn: Any) -> Any:
    class M(nn.Module):
        layer: Any

        def setup(self) -> None:
            self.again = self.layer
            self.parts = [self.layer, nn.Lin()]

        def __call__(self, x: Any) -> Any:
            return self.parts[1](self.again(x)), self.again.name

    return M(nn.Lin()).init_with_output(KEY, X)


@program
def setup_overwrites_an_attribute(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.n = 1
            self.n = 2
            self.a = self.a

        def __call__(self, x: Any) -> Any:
            return self.a(x) * self.n

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def setup_overwrites_a_submodule(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.a = nn.Lin(4)

        def __call__(self, x: Any) -> Any:
            return self.a(x)

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def explicit_names_in_setup(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin(name="given")
            self.b = [nn.Lin(name="one"), nn.Lin()]
            nn.Lin(name="unused")

        def __call__(self, x: Any) -> Any:
            return self.b[1](self.b[0](self.a(x))), self.a.name

    return M().init_with_output(KEY, X)


@program
def unassigned_in_setup(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            layer = nn.Lin()
            self.fn = lambda x: layer(x)

        def __call__(self, x: Any) -> Any:
            return self.fn(x)

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def unassigned_in_setup_with_a_name(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            layer = nn.Lin(name="hidden")
            self.fn = lambda x: layer(x)

        def __call__(self, x: Any) -> Any:
            return self.fn(x)

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def used_in_setup(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()
            self.y = self.layer(X)

        def __call__(self, x: Any) -> Any:
            return self.y + x

    return M().init_with_output(KEY, X)


@program
def sequential_in_setup(nn: Any) -> Any:
    class Chain(nn.Module):
        layers: Any

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    class M(nn.Module):
        def setup(self) -> None:
            self.chain = Chain([nn.Lin(), jnp.sin, nn.Lin()])

        def __call__(self, x: Any) -> Any:
            return self.chain(x)

    class C(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Chain([nn.Lin(), jnp.sin, Chain([nn.Lin(), nn.Lin()])])(x)

    return [m.init_with_output(KEY, X) for m in (M(), C(), Chain((nn.Lin(), Chain([nn.Lin()]))))]


@program
def passed_to_two_that_nest(nn: Any) -> Any:
    class Use(nn.Module):
        inner: Any

        def __call__(self, x: Any) -> Any:
            return self.inner(x)

    class M(nn.Module):
        shared: Any

        def setup(self) -> None:
            self.a = Use(self.shared)
            self.b = Use(Use(self.shared))

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    return M(nn.Lin()).init_with_output(KEY, X), M(Use(nn.Lin())).init_with_output(KEY, X)


@program
def from_outside_in_a_container_of_a_child(nn: Any) -> Any:
    class Use(nn.Module):
        inner: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.inner["k"][0](x)

    class M(nn.Module):
        shared: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Use({"k": [self.shared]})(x) + Use({"k": (self.shared,)})(x)

    return M(nn.Lin()).init_with_output(KEY, X)


@program
def made_by_a_free_function(nn: Any) -> Any:
    def block(x: Any) -> Any:
        return nn.Lin(name="last")(nn.Lin()(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return block(x)

    return M().init_with_output(KEY, X)


@program
def made_in_a_helper_method(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.helper(self.helper(x))

        def helper(self, x: Any) -> Any:
            return nn.Lin()(x)

    return M().init_with_output(KEY, X)


@program
def closed_over_by_a_child(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            outer = nn.Lin(name="outer")

            class Inner(nn.Module):
                @nn.compact
                def __call__(self, x: Any) -> Any:
                    return nn.Lin()(outer(x))

            return Inner()(x)

    return M().init_with_output(KEY, X)


@program
def global_module_used_inside(nn: Any) -> Any:
    layer = nn.Lin()

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return layer(x)

    return outcome(lambda: M().init_with_output(KEY, X))


@program
def explicit_parent(nn: Any) -> Any:
    class Child(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(parent=self.parent, name="of_parent")(nn.Lin()(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Child()(nn.Lin(parent=self)(x)), Child(parent=self).name

    return M().init_with_output(KEY, X)


@program
def explicit_parent_that_is_none(nn: Any) -> Any:
    return outcome(lambda: nn.Lin(parent="x")), nn.Lin(parent=None, name="a").name


@program
def init_of_a_named_module(nn: Any) -> Any:
    return nn.Lin(name="top").init_with_output(KEY, X), nn.Lin(name="top").bind({}).name


@program
def init_of_a_submodule_of_a_bound_module(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    bound = M().bind(M().init(KEY, X))
    return bound.layer.init(KEY, X), bound.layer.apply(
        {"params": bound.layer.variables["params"]}, X
    )


@program
def modules_as_default_fields(nn: Any) -> Any:
    layer = nn.Lin(2)

    class M(nn.Module):
        inner: Any = layer
        act: Any = jnp.sin

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.act(self.inner(x))

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return M()(x) + M()(x)

    return M().init_with_output(KEY, X), Two().init_with_output(KEY, X)


@program
def partial_keeps_modules_as_fields(nn: Any) -> Any:
    class Use(nn.Module):
        inner: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.inner(x)

    class M(nn.Module):
        make: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.make()(x) + self.make(name="second")(x)

    use: Any = Use
    return outcome(lambda: M(functools.partial(use, nn.Lin())).init_with_output(KEY, X))


@program
def fields_with_arrays(nn: Any) -> Any:
    class M(nn.Module):
        table: Any
        tree: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x @ self.table + self.tree["a"][0] + nn.Lin(2)(x)

    return M(jnp.ones((3, 2)), {"a": [jnp.ones(2)]}).init_with_output(KEY, X)


@program
def attributes_of_other_kinds(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.fn = lambda x: x + 1
            self.text = "t"
            self.none = None
            self.some = {1, 2}
            self.make = functools.partial(nn.Lin, 2)
            self.array = jnp.ones(3)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = self.make()(self.fn(x) * self.array)
            return y, self.text, self.none, sorted(self.some)

    return M().init_with_output(KEY, X)


@program
def pass_a_bound_method(nn: Any) -> Any:
    class Use(nn.Module):
        fn: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(self.fn(x))

    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()
            self.use = Use(self.helper)

        def helper(self, x: Any) -> Any:
            return self.layer(x)

        def __call__(self, x: Any) -> Any:
            return self.use(x)

    return M().init_with_output(KEY, X)


@program
def attributes_by_name_from_outside(nn: Any) -> Any:
    class M(nn.Module):
        inner: Any

        def setup(self) -> None:
            self.layer = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.inner.layer(self.layer(x)) if self.inner else self.layer(x)

    return M(M(None)).init_with_output(KEY, X)


@program
def fields_of_a_child_that_was_not_called(nn: Any) -> Any:
    class Stack(nn.Module):
        layers: Any

        def __call__(self, x: Any) -> Any:
            return self.layers[0](x)

    class M(nn.Module):
        given: Any

        def setup(self) -> None:
            self.made = Stack([nn.Lin(2), {"a": [1]}])
            self.first = self.made.layers[0]

        @nn.compact
        def __call__(self, x: Any) -> Any:
            here = Stack([nn.Lin(4)])
            kinds = [type(v).__name__ for v in (self.made.layers, self.made.layers[1], here.layers)]
            layers = (self.given.layers[0], self.first, here.layers[0])
            return kinds, [(layer.name, layer.path, layer(x)) for layer in layers], self.made(x)

    model = M(Stack([nn.Lin()]))
    variables = model.init(KEY, X)
    return variables, model.apply(variables, X), model.bind(variables).given.layers[0](X)


@program
def dicts_with_keys_of_all_kinds(nn: Any) -> Any:
    class M(nn.Module):
        given: Any

        def setup(self) -> None:
            self.made = [{None: nn.Lin(1), "a": {(1, 2): nn.Lin(2), 0: (nn.Lin(), 3)}}]

        def __call__(self, x: Any) -> Any:
            made = self.made[0]
            layers = (self.given[1], self.given["b"], made[None], made["a"][1, 2], made["a"][0][0])
            return [(layer.name, layer(x)) for layer in layers]

    model = M({"b": nn.Lin(2), 1: nn.Lin()})
    variables = model.init(KEY, X)
    return variables, model.bind(variables)(X), model.clone(_deep_clone=True).apply(variables, X)
