"""Namespaces whose names are imported when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["lazily"]


def lazily(
    package: str, names: Mapping[str, str], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], Iterable[str]]]:
    """`__getattr__` and `__dir__` of a package that imports what it offers on first use.

    `names` says what comes from where: modules, and the names taken from each, apart by blanks.
    `modules` are modules that are offered themselves, by the name they have here.  Submodules of
    `package` among the former are there as well, as after an ordinary import.

    >>> import sys, types
    >>> sys.modules["made_up"] = module = types.ModuleType("made_up")
    >>> module.__getattr__, module.__dir__ = lazily("made_up", {"math": "pi e"}, {"js": "json"})
    >>> module.js.loads("[1]"), dir(module)[-3:]
    ([1], ['e', 'js', 'pi'])
    >>> module.tau
    Traceback (most recent call last):
    ...
    AttributeError: module 'made_up' has no attribute 'tau'
    """
    below = {home.rpartition(".")[2]: home for home in names if home.startswith(f"{package}.")}
    whole = {**below, **modules}
    homes = {name: home for home, line in names.items() for name in line.split()}

    def get(name: str) -> Any:
        here = sys.modules[package]
        if name in homes:
            value = getattr(importlib.import_module(homes[name]), name)
        elif name in whole:
            value = importlib.import_module(whole[name])
        else:
            text = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=here)
        vars(here)[name] = value  # found without us from now on
        return value

    def listing() -> Iterable[str]:
        return sorted({*vars(sys.modules[package]), *homes, *whole})

    return get, listing
