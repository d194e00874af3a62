"""Flags of the library, each also an environment variable.

A flag `flax_x` starts with the value of `FLAX_X`, or with its default, and is changed by
`config.update("flax_x", value)`.

>>> from shardflax import config
>>> config.flax_filter_frames
True
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from typing import Any

from shardflax.core.errors import did_you_mean
from shardflax.core.frozen_dict import return_frozen

__all__ = [
    "Flag",
    "define_bool_state",
    "on_update",
    "static_bool_env",
    "temp_flip_flag",
    "update",
]


class Flag:
    """A flag, read through `value`.

    >>> define_bool_state("flax_example_flag", False, "An example.").value
    False
    """

    def __init__(self, name: str, default: bool, help: str) -> None:
        self.name = name
        self.help = help
        self.value = static_bool_env(name.upper(), default)
        self._listeners: list[Callable[[bool], None]] = []

    def __bool__(self) -> bool:
        raise TypeError(f"a flag is neither true nor false: use the value of {self.name}.")

    def __repr__(self) -> str:
        return f"Flag({self.name}={self.value})"


_flags: dict[str, Flag] = {}


def define_bool_state(name: str, default: bool, help: str) -> Flag:
    """A new flag; its name begins with `flax_`, or gets that in front.

    Raises ValueError if there is a flag of that name.

    >>> define_bool_state("other_flag", True, "Another example.")
    Flag(flax_other_flag=True)
    """
    name = name if name.startswith("flax_") else f"flax_{name}"
    if name in _flags:
        raise ValueError(f"the flag {name!r} is defined already: {_flags[name].help}")
    flag = _flags[name] = Flag(name, default, help)
    return flag


def static_bool_env(varname: str, default: bool) -> bool:
    """An environment variable as a bool; `default` if it is not set.

    Raises ValueError for anything but y, yes, t, true, on, 1, n, no, f, false, off, 0.

    >>> static_bool_env("A_VARIABLE_THAT_IS_NOT_SET", True)
    True
    """
    value = os.environ.get(varname, str(default)).lower()
    if value in ("y", "yes", "t", "true", "on", "1"):
        return True
    if value in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(f"the environment variable {varname} is {value!r}; expected true or false.")


def _flag(name: str) -> Flag:
    if name not in _flags:
        raise LookupError(f"there is no flag {name!r}; {did_you_mean(name, _flags)}")
    return _flags[name]


def update(name: str, value: bool) -> None:
    """Changes a flag.

    Raises LookupError for a name that is no flag, TypeError for a value that is no bool.

    >>> update("flax_filter_frames", True)
    """
    flag = _flag(name)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is true or false; got {type(value).__name__}: {value!r}.")
    flag.value = value
    for listener in flag._listeners:
        listener(value)


def on_update(name: str, listener: Callable[[bool], None]) -> None:
    """Calls `listener` with the value of a flag, now and whenever it changes.

    >>> flag = define_bool_state("flax_told_flag", True, "A flag with a listener.")
    >>> on_update("flax_told_flag", print)
    True
    """
    flag = _flag(name)
    flag._listeners.append(listener)
    listener(flag.value)


@contextlib.contextmanager
def temp_flip_flag(var_name: str, var_value: bool) -> Generator[None]:
    """Within this context, the flag `flax_<var_name>` has another value.

    >>> with temp_flip_flag("filter_frames", False):
    ...     print(_flags["flax_filter_frames"].value)
    False
    """
    name = f"flax_{var_name}"
    old = _flag(name).value
    update(name, var_value)
    try:
        yield
    finally:
        update(name, old)


def __getattr__(name: str) -> Any:
    if name in _flags:
        return _flags[name].value
    raise AttributeError(f"config has no {name!r}; {did_you_mean(name, _flags)}")


define_bool_state(
    "flax_filter_frames",
    True,
    "Leave this library's own frames out of the tracebacks that JAX filters.",
)
define_bool_state(
    "flax_return_frozendict",
    False,
    "Return the variables of init and apply as FrozenDicts, as Flax did before 0.7.",
)
on_update("flax_return_frozendict", return_frozen)
