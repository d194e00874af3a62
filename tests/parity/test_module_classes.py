"""Classes of modules against Linen: dataclasses, inheritance, descriptors, copies, repr."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import inspect
from typing import Any, Generic, Protocol, TypeVar

import jax.numpy as jnp
import pytest

from tests.core.harness import quick_key, registry, same

KEY = quick_key(7)
X = jnp.arange(6.0).reshape(2, 3)
T = TypeVar("T")
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same(run)


def parameters(cls: Any) -> Any:
    """What can be passed to a class, and how."""
    return [(p.name, str(p.kind)) for p in inspect.signature(cls).parameters.values()]


def has_no_hash(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return True
    return False


def outcome(fn: Any) -> Any:
    """What a function returns, or the name of what it raises."""
    try:
        return fn()
    except Exception as error:
        return type(error).__name__


# --- dataclasses


@program
def signatures(nn: Any) -> Any:
    class Plain(nn.Module):
        a: int
        b: int = 2

    class More(Plain):
        c: int = 3

    class Keyword(nn.Module, kw_only=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        a: int = 1
        b: int

    class Mixed(Keyword):
        c: int = 3

    class Late(Plain, kw_only=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        c: int

    seen = [parameters(c) for c in (Plain, More, Keyword, Mixed, Late)]
    # `parent` and `name` are last, whatever is between them and the others.
    return [[p for p in params if p[0] not in ("parent", "name")] for params in seen]


@program
def positional_name_and_parent(nn: Any) -> Any:
    class M(nn.Module):
        a: int = 1

    return [outcome(lambda: M(1, None)), outcome(lambda: M(1, None, "name")), M(1, name="n").name]


@program
def field_options(nn: Any) -> Any:
    class M(nn.Module):
        shown: int
        hidden: int = dataclasses.field(default=2, repr=False)
        uncompared: int = dataclasses.field(default=3, compare=False)
        made: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
        later: int = dataclasses.field(init=False, default=5)

        @nn.compact
        def __call__(self) -> Any:
            return self.shown + self.hidden + self.uncompared + sum(self.made) + self.later

    model = M(1)
    return model.apply({}), M(1) == M(1, uncompared=4), M(1) == M(1, hidden=4), model.clone().made


@program
def fields_in_order(nn: Any) -> Any:
    """Who lists fields finds `parent` and `name` last, of classes that inherit, too."""

    class Base(nn.Module, kw_only=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        a: int
        b: int = 1

    class Derived(Base):
        c: int = 2

    return [[f.name for f in dataclasses.fields(cls)] for cls in (Base, Derived, nn.remat(Derived))]


@program
def name_declared_as_it_is(nn: Any) -> Any:
    """A field `name` may be declared if it is a text; the default is that of every module."""

    def declared(kind: Any) -> Any:
        class M(nn.Module):
            width: int = 1
            name: kind = "given"  # pyright: ignore[reportGeneralTypeIssues, reportInvalidTypeForm]

            def __call__(self) -> Any:
                return self.width, self.name

        return M(2).apply({}), M(2, name="own").name, outcome(lambda: M(2, "own"))

    kinds = (str, str | None, "str", int, str | int)
    return [outcome(lambda kind=kind: declared(kind)) for kind in kinds]


@program
def required_field_is_missing(nn: Any) -> Any:
    class M(nn.Module):
        a: int

    return [outcome(M), outcome(lambda: M(1, 2)), outcome(lambda: M(b=2))]


@program
def field_without_default_after_default(nn: Any) -> Any:
    def make() -> Any:
        class M(nn.Module):
            a: int = 1
            b: int

        return M(1, 2).b

    return outcome(make)


@program
def generic(nn: Any) -> Any:
    class Wrap(nn.Module, Generic[T]):
        inner: T

        @nn.compact
        def __call__(self, x: Any) -> Any:
            inner: Any = self.inner
            return inner(x)

    class Of(Wrap[int]):
        pass

    return [m.init_with_output(KEY, X) for m in (Wrap(nn.Lin()), Wrap[int](nn.Lin()), Of(nn.Lin()))]


@program
def abstract_and_protocol(nn: Any) -> Any:
    class Named(Protocol):
        def title(self) -> str: ...

    class Base(nn.Module, abc.ABC):
        @abc.abstractmethod
        def body(self, x: Any) -> Any: ...

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.body(x)

    class M(Base, Named):
        def body(self, x: Any) -> Any:
            return nn.Lin()(x)

        def title(self) -> str:
            return "m"

    return outcome(Base), M().init_with_output(KEY, X), M().title()


@program
def init_subclass(nn: Any) -> Any:
    made: list[Any] = []

    class Base(nn.Module):
        def __init_subclass__(cls, tag: str = "none", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            made.append((cls.__name__, tag))

    class A(Base, tag="a"):
        width: int = 2

    class B(A):
        pass

    return made, B(3).width


@program
def mixin_that_is_no_module(nn: Any) -> Any:
    class Twice:
        def twice(self, x: Any) -> Any:
            return 2 * self.body(x)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

    class M(Twice, nn.Module):
        @nn.compact
        def body(self, x: Any) -> Any:
            return nn.Lin()(x)

        def __call__(self, x: Any) -> Any:
            return self.twice(x)

    return M().init_with_output(KEY, X)


@program
def dataclass_mixin(nn: Any) -> Any:
    @dataclasses.dataclass
    class Config:
        width: int = 4

    class M(nn.Module, Config):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(self.width)(x)

    return M().init_with_output(KEY, X), M(width=2).width


@program
def override_compact_with_compact(nn: Any) -> Any:
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    class Derived(Base):
        def __call__(self, x: Any) -> Any:
            return super().__call__(x) + 1

    class Again(Derived):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return super().__call__(x) + nn.Lin()(x)

    return [m.init_with_output(KEY, X) for m in (Derived(), Again())]


@program
def compact_on_a_call_of_another_signature(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
            return scale * sum(nn.Lin()(x) for x in [*args, *kwargs.values()])

    return M().init_with_output(KEY, X, X, more=X, scale=2.0)


@program
def own_hash_and_eq(nn: Any) -> Any:
    class M(nn.Module):
        table: Any

        def __hash__(self) -> int:
            return 17

    class E(nn.Module):
        a: int = 1

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 3

    class Child(M):
        pass

    return hash(M([1])), M([1]) == M([1]), E(1) == E(2), hash(E()), has_no_hash(Child([]))


@program
def unhashable_fields(nn: Any) -> Any:
    class M(nn.Module):
        table: Any

    return [
        has_no_hash(M([1])),
        M([1]) == M([1]),
        M({"a": (1, [2])}) == M({"a": (1, [3])}),
        M(1) == 1,
        M(1) != M(2),
        nn.Lin(name="a") in {nn.Lin(name="a")},
    ]


@program
def equality_needs_the_same_class(nn: Any) -> Any:
    class A(nn.Module):
        a: int = 1

    class B(A):
        pass

    return A() == B(), A() == A(1), hash(A()) == hash(A(1))


@program
def bound_modules_are_equal(nn: Any) -> Any:
    a, b = nn.Lin(2).bind({}), nn.Lin(2).bind({"params": {}})
    return a == b, a == nn.Lin(2)


# --- representation


@program
def representation(nn: Any) -> Any:
    class M(nn.Module):
        width: int
        inner: Any = None
        many: Any = ()

        def setup(self) -> None:
            self.a = nn.Lin(2)
            self.rest = [nn.Lin(3), nn.Drop()]

        def __call__(self, x: Any) -> Any:
            return x

    class Empty(nn.Module):
        pass

    model = M(3, nn.Lin(kernel_init=None), (nn.Lin(2, None),))
    bound = model.bind({})
    values = (nn.uniform, jnp.float32, jnp.sin, int, functools.partial(max, 1), {"fn": max})
    texts = [repr(M(3, x)) for x in values]
    return [*texts, repr(model), repr(Empty()), repr(Empty(name="a")), repr(bound), str(model)]


@program
def representation_while_running(nn: Any) -> Any:
    seen: list[str] = []

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Lin(2, None)
            seen.append(repr(layer))
            nn.Drop("params")(x)
            seen.append(repr(self))
            return x

    M().init(KEY, X)
    return seen


# --- descriptors


@program
def cached_property(nn: Any) -> Any:
    class M(nn.Module):
        width: int = 2

        @functools.cached_property
        def double(self) -> int:
            return 2 * self.width

        def __call__(self) -> Any:
            return self.double + self.double

    return M().apply({}), M(3).double


@program
def own_descriptor(nn: Any) -> Any:
    class Doubled:
        def __get__(self, module: Any, cls: Any = None) -> Any:
            return self if module is None else 2 * module.width

    class M(nn.Module):
        width: int = 2
        double = Doubled()

        def __call__(self) -> Any:
            return self.double

    return M().apply({}), M(3).double


@program
def descriptor_as_default_of_a_field(nn: Any) -> Any:
    class Default:
        def __get__(self, module: Any, cls: Any = None) -> Any:
            return 5 if module is None else module.__dict__["width"]

        def __set__(self, module: Any, value: Any) -> None:
            module.__dict__["width"] = value

    class M(nn.Module):
        width: int = Default()  # pyright: ignore[reportAssignmentType]

        def __call__(self) -> Any:
            return self.width

    return M(3).width, M(3).apply({})


@program
def property_of_a_class_of_its_own(nn: Any) -> Any:
    class Tagged(property):
        tag = "of the class"

        def __get__(self, module: Any, cls: Any = None) -> Any:
            return self if module is None else ("got", super().__get__(module, cls))

    class M(nn.Module):
        width: int = 2

        @Tagged
        def double(self) -> Any:
            return 2 * self.width

        @double.setter
        def double(self, value: Any) -> None:
            object.__setattr__(self, "width", value / 2)

        @Tagged
        def missing(self) -> Any:
            return self.nothing

        unreadable = property(None)

    model: Any = M(3)
    model.double = 8
    seen: Any = M
    found = [model.double, seen.double.tag, outcome(lambda: M().missing)]
    return [*found, outcome(lambda: M().unreadable), outcome(lambda: setattr(model, "missing", 1))]


@program
def descriptor_that_can_be_set(nn: Any) -> Any:
    class Kept:
        def __get__(self, module: Any, cls: Any = None) -> Any:
            return self if module is None else module.__dict__.get("_kept") or module.nothing

        def __set__(self, module: Any, value: Any) -> None:
            module.__dict__["_kept"] = value

    class M(nn.Module):
        kept = Kept()

    model = M()
    before = outcome(lambda: model.kept)
    model.kept = 3
    return before, model.kept, type(M.kept).__name__


@program
def property_uses_submodules(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()
            self.scale = self.param("scale", nn.uniform, (3,))

        @property
        def scaled(self) -> Any:
            return self.scale * 2

        @scaled.setter
        def scaled(self, value: Any) -> None:
            raise AssertionError("never set")

        def __call__(self, x: Any) -> Any:
            return self.layer(x) * self.scaled

    variables = M().init(KEY, X)
    return variables, M().apply(variables, method=lambda m: m.scaled), M().bind(variables).scaled


@program
def static_and_class_methods(nn: Any) -> Any:
    class M(nn.Module):
        width: int = 2

        @classmethod
        def wide(cls) -> Any:
            return cls(9)

        @staticmethod
        def twice(x: Any) -> Any:
            return 2 * x

        def __call__(self, x: Any) -> Any:
            return self.twice(x)

        def __len__(self) -> int:
            return self.width

        def __getitem__(self, i: int) -> int:
            return i

        def __contains__(self, i: int) -> bool:
            return i < self.width

    return M.wide().apply({}, X), len(M()), M()[4], 1 in M(), M.twice(2)


@program
def functions_as_class_attributes(nn: Any) -> Any:
    class M(nn.Module):
        act: Any = jnp.sin
        own = staticmethod(jnp.cos)

        def __call__(self, x: Any) -> Any:
            return self.act(x) + self.own(x)

    return M().apply({}, X), M(act=jnp.tan).apply({}, X)


@program
def call_of_super_and_helpers(nn: Any) -> Any:
    class Base(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()

        def helper(self, x: Any) -> Any:
            return self.a(x)

    class M(Base):
        def setup(self) -> None:
            super().setup()
            self.b = nn.Lin()

        def helper(self, x: Any) -> Any:
            return self.b(super().helper(x))

        def __call__(self, x: Any) -> Any:
            return self.helper(x)

    return M().init_with_output(KEY, X)


@program
def wraps_of_wraps(nn: Any) -> Any:
    def logged(fn: Any) -> Any:
        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs) + 1

        return wrapper

    class Inside(nn.Module):
        @nn.compact
        @logged
        @logged
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    class Outside(nn.Module):
        @logged
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    class Partly(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

        shout = logged(__call__)

    variables = Inside().init(KEY, X)
    return variables, [
        outcome(lambda m=m: m().apply(variables, X)) for m in (Inside, Outside, Partly)
    ]


@program
def method_assigned_from_another_class(nn: Any) -> Any:
    class A(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    class B(nn.Module):
        __call__ = A.__call__

    return B().init_with_output(KEY, X)


@program
def partials_of_modules(nn: Any) -> Any:
    class M(nn.Module):
        make: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.make(name="a")(self.make()(x))

    wrapped = functools.partial(functools.partial(nn.Lin, use_bias=False), features=3)
    return M(wrapped).init_with_output(KEY, X), M(functools.partial(nn.Lin)).init(KEY, X)


@program
def partial_method_in_a_class(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def body(self, x: Any, scale: float) -> Any:
            return scale * nn.Lin()(x)

        twice = functools.partialmethod(body, scale=2.0)

        def __call__(self, x: Any) -> Any:
            return self.twice(x)

    return outcome(lambda: M().init_with_output(KEY, X))


# --- copies


@program
def copies(nn: Any) -> Any:
    class M(nn.Module):
        width: int
        inner: Any

    model = M(2, nn.Lin(3), name="m")
    shallow, deep = copy.copy(model), copy.deepcopy(model)
    clone = model.clone()
    return [
        shallow == model,
        deep == model,
        clone == model,
        clone.name,
        shallow.inner is model.inner,
        deep.inner is model.inner,
        clone.inner is model.inner,
        model.clone(width=5).width,
        model.clone(name="n").name,
        dataclasses.replace(model, width=7, parent=None).width,
        outcome(lambda: model.clone(nothing=3)),
    ]


@program
def deep_clone_and_reset_names(nn: Any) -> Any:
    class M(nn.Module):
        a: Any
        b: Any

    shared = nn.Lin(3, name="given")
    model = M(shared, [shared], name="top")
    deep = model.clone(_deep_clone=True)
    bare = model.clone(_deep_clone=True, _reset_names=True)
    return [
        deep.a == model.a,
        deep.a is model.a,
        deep.a is deep.b[0],
        deep.a.name,
        bare.name,
        bare.a.name,
        model.clone(_reset_names=True).name,
        model.clone(_reset_names=True).a.name,
    ]


@program
def clone_while_running(nn: Any) -> Any:
    class M(nn.Module):
        inner: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Lin(4)
            y = layer(x)
            again = layer.clone(name="again")
            free = layer.clone(parent=None)
            return y, again.scope is None, free.name, self.inner.clone(parent=None).name

    return M(nn.Lin()).init_with_output(KEY, X)


@program
def copy_of_a_submodule(nn: Any) -> Any:
    class M(nn.Module):
        inner: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for i in range(3):
                x = self.inner.copy(name=f"layer_{i}")(x)
            return self.inner.copy()(x)

    return M(nn.Lin()).init_with_output(KEY, X)


@program
def copy_of_an_unshared_tree(nn: Any) -> Any:
    class Pair(nn.Module):
        a: Any
        b: Any

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    class M(nn.Module):
        block: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.block.copy(name="one")(self.block.copy(name="two")(x))

    return M(Pair(nn.Lin(), nn.Lin())).init_with_output(KEY, X)
