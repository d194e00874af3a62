"""How modules are made, against Linen: who sees that fields are set, and what `__init__` may do."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax.numpy as jnp
import pytest

from shardflax import nn as ours
from tests.core.harness import registry, same

program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same(run)


def recording(nn: Any) -> Any:
    class Recording(nn.Module):
        a: int
        b: int = 2

        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("a", "b"):
                value = value * 10
            super().__setattr__(name, value)

    return Recording


def fields_of(module: Any) -> list[Any]:
    return [getattr(module, f.name) for f in dataclasses.fields(module) if f.name != "parent"]


@program
def own_setattr_sees_fields(nn: Any) -> Any:
    base = recording(nn)

    class Below(base):
        c: int = 3

    return sorted(map(str, fields_of(base(1)))), sorted(map(str, fields_of(Below(1, c=4))))


@program
def own_setattr_of_a_subclass_with_own_init(nn: Any) -> Any:
    class Plain(nn.Module):
        a: int
        b: int = 2

    class Own(Plain):
        def __init__(self, twice: int, **kwargs: Any) -> None:
            super().__init__(2 * twice, **kwargs)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value * 10 if name == "a" else value)

    module = Own(4, b=5, name="n")
    return module.a, module.b, module.name


@program
def mixin_with_setattr(nn: Any) -> Any:
    class Doubles:
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value * 2 if name == "a" else value)

    class M(Doubles, nn.Module):
        a: int = 1

    return M(3).a, M().a  # pyright: ignore[reportCallIssue]


@program
def own_init(nn: Any) -> Any:
    class M(nn.Module):
        a: int

        def __init__(self, text: str, name: str | None = None) -> None:
            self.a = len(text)
            self.parent = None
            self.name = name
            self.__post_init__()

        def __call__(self) -> int:
            return self.a

    module = M("four", name="n")
    return module.a, module.name


@program
def field_behind_a_data_descriptor(nn: Any) -> Any:
    class Squared:
        def __get__(self, module: Any, owner: Any = None) -> Any:
            return 7 if module is None else module.__dict__["_x"]

        def __set__(self, module: Any, value: Any) -> None:
            module.__dict__["_x"] = value**2

    class M(nn.Module):
        x: int = Squared()  # pyright: ignore[reportAssignmentType]

    return M(3).x, M().x


@program
def init_only_variable(nn: Any) -> Any:
    class M(nn.Module):
        a: int
        scale: dataclasses.InitVar[int] = 2

        def __post_init__(self, scale: int) -> None:
            self.a = self.a * scale
            super().__post_init__()

    return M(3).a, M(3, scale=5).a


@program
def post_init_changes_fields_and_adds_more(nn: Any) -> Any:
    class M(nn.Module):
        a: Any
        b: Any = None

        def __post_init__(self) -> None:
            self.b = self.a if self.b is None else self.b
            self.extra = [self.b]
            super().__post_init__()

        def __call__(self, x: Any) -> Any:
            return x * self.b + self.extra[0]

    return M(2).b, M(2).apply({}, jnp.ones(2)), M(a=2, b=5).apply({}, jnp.ones(2))


@program
def field_named_like_python(nn: Any) -> Any:
    class M(nn.Module):
        cls: int
        dict: int = 2

        def __call__(self) -> int:
            return self.cls + self.dict

    return M(1).apply({}), M(cls=3, dict=4).apply({})


@program
def what_is_wrong_with_arguments(nn: Any) -> Any:
    class M(nn.Module):
        a: int
        b: int = 2

    def said(make: Any) -> str:
        with pytest.raises(TypeError) as caught:
            make()
        return str(caught.value).replace(M.__qualname__, "M")

    return [
        said(make) for make in (M, lambda: M(1, b=2, c=3), lambda: M(1, a=1), lambda: M(name="n"))
    ]


def test_making_a_module_calls_no_setattr() -> None:
    class M(ours.Module):
        a: int
        b: int = 2

    called: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        module = M(1, b=3, name="n")
    finally:
        sys.setprofile(None)
    assert (module.a, module.b, module.name) == (1, 3, "n")
    assert called[:2] == ["__init__", "__post_init__"]
    assert "__setattr__" not in called
