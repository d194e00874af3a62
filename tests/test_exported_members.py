"""What is public is said in `__all__`, in order, and each of it is explained with an example."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any

import pytest

import launch
import shardflax

PARSER = doctest.DocTestParser()


def module_names() -> list[str]:
    """All modules of the library: public ones are those without a leading underscore."""
    found = ["shardflax", "launch"]
    for package in (shardflax, launch):
        walk = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found += [m.name for m in walk]
    return sorted(n for n in found if not any(part.startswith("_") for part in n.split(".")))


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions (ruff's RUF022 sorts so too)."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name


def public(module: ModuleType) -> list[str]:
    exported = getattr(module, "__all__", None)
    assert exported is not None, f"{module.__name__} has no __all__"
    return list(exported)


def defined_here(module: ModuleType) -> set[str]:
    """Public functions and classes that this very module defines."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and value.__name__ == name
    }


def namespaces() -> list[str]:
    """The modules a user imports from: packages, and the small modules beside them."""
    found = [(name, importlib.util.find_spec(name)) for name in module_names()]
    return [n for n, s in found if n.count(".") <= 1 or (s and s.submodule_search_locations)]


def own_members() -> list[tuple[str, str]]:
    """(module, name) of the functions and classes in a namespace, where they are defined."""
    pairs: set[tuple[str, str]] = set()
    for name in namespaces():
        try:
            module = importlib.import_module(name)
        except Exception:  # while tests are collected; the tests of the module itself fail of it
            continue
        for member in getattr(module, "__all__", []):
            value = getattr(module, member, None)
            home = getattr(value, "__module__", "") or ""
            if home.partition(".")[0] in ("shardflax", "launch") and _is_explained(value):
                pairs.add((home, getattr(value, "__name__", member)))
    return sorted(pairs)


def _is_explained(value: Any) -> bool:
    """Functions and classes carry docstrings; constants and modules are explained elsewhere."""
    return inspect.isclass(value) or inspect.isroutine(value)


def example_of(value: Any) -> list[doctest.Example]:
    """The examples of a docstring; a class may show its use in one of its methods."""
    found = PARSER.get_examples(inspect.getdoc(value) or "")
    if inspect.isclass(value):
        for method in vars(value).values():
            found += PARSER.get_examples(getattr(method, "__doc__", None) or "")
    return found


@pytest.mark.parametrize("name", module_names())
def test_all_is_complete_and_sorted(name: str) -> None:
    if name.endswith(".__main__"):
        return
    module = importlib.import_module(name)
    exported = public(module)
    missing = [n for n in exported if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ names what does not exist"
    assert sorted(set(exported), key=order) == exported, f"{name}.__all__: sort it (ruff RUF022)"
    unsaid = defined_here(module) - set(exported)
    assert not unsaid, f"{name}: add to __all__ or give it a leading underscore"


@pytest.mark.parametrize(("module", "name"), own_members())
def test_public_names_are_explained(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    text = (inspect.getdoc(value) or "").strip()
    first = re.split(r"\n\s*\n", text)[0]
    assert re.search(r"[.:?!]$|[.:?!]\s", first), f"{module}.{name}: begin with one sentence"
    # An error is explained by its message, which the tests of whatever raises it compare.
    is_error = inspect.isclass(value) and issubclass(value, BaseException)
    assert is_error or example_of(value), f"{module}.{name}: show one short example (>>>)"


@pytest.mark.parametrize("name", module_names())
def test_modules_are_explained(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name}: say in one sentence what it is for"


def test_the_checks_find_faults() -> None:
    module = ModuleType("shardflax.made_up", "A module.")

    def undocumented() -> None: ...

    undocumented.__module__ = module.__name__
    undocumented.__name__ = "undocumented"
    vars(module)["undocumented"] = undocumented
    assert defined_here(module) == {"undocumented"}
    assert not example_of(undocumented)
    assert sorted(["a_function", "Z", "AClass", "A_CONSTANT"], key=order) == [
        "A_CONSTANT",
        "AClass",
        "Z",
        "a_function",
    ]
