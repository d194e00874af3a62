"""Topologies of TPUs: devices to compile for, on a host that has none.

The compiler for TPUs is in the package libtpu, and needs no TPU to compile.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
from importlib import metadata
from typing import Any

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import LibtpuError, UnknownTopologyError

__all__ = ["libtpu_requirement", "libtpu_version", "tpu_topology"]

_GENERATIONS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
_HOW = "Write a generation and its chips, such as 'v5e:4x4' or 'v5p:2x2x4'."
_NAME = re.compile(r"(\w+?):(\d+(?:x\d+){1,2})(?:_twisted|_untwisted)?")
# On a host without TPUs: what libtpu would ask the network of Google's cloud for.  The type says
# nothing about what is compiled.  Processes that compile do not get into each other's way.
_NO_TPU_HERE = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_topology(name: str, slices: int = 1) -> list[Any]:
    """The devices of `slices` slices of TPUs, to compile for; no TPU has to be there.

    `name` is a generation and its chips along each dim, such as `v5e:4x4` or `v5p:4x4x8`.  Nothing
    runs on such devices: lay a state out over them by its shapes, trace, lower and compile.  The
    compiler is that of real TPUs, in the package libtpu; `libtpu_requirement` says which version.

    Raises `UnknownTopologyError` for a topology that there is not, `LibtpuError` where libtpu is
    missing or does not work.

    >>> tpu_topology("v5:4x4")
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.UnknownTopologyError: no TPU topology 'v5:4x4': did you mean
    'v5p:4x4'? Write a generation and its chips, such as 'v5e:4x4' or 'v5p:2x2x4'.
    """
    chips = _chips(name)
    if slices < 1:
        raise UnknownTopologyError(f"slices={slices} of {name!r}: there is at least one.")
    if libtpu_version() is None:
        raise LibtpuError(
            f"TPU topology {name!r}: the compiler for TPUs (libtpu) is not installed; it takes no "
            f"TPU. Install it into a folder, pip install --no-deps --target tpulib "
            f"'{libtpu_requirement()}', and set PYTHONPATH=tpulib where it is used. (Installed "
            f"among other packages it works too, but there JAX looks for a TPU at each start.)"
        )
    return list(_devices(name, slices, chips == 1))


def libtpu_requirement() -> str:
    """The libtpu that fits the installed jax, as pip wants to be told it.

    >>> libtpu_requirement().startswith("libtpu")
    True
    """
    wanted = (line.partition(";")[0].strip() for line in metadata.requires("jax") or ())
    return next((line for line in wanted if re.match(r"libtpu\b", line)), "libtpu")


def libtpu_version() -> str | None:
    """The version of the libtpu that is installed, or None.

    >>> libtpu_version() is None or libtpu_version()[0].isdigit()
    True
    """
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return None


def _chips(name: str) -> int:
    """How many chips a topology has, if its name can be one."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UnknownTopologyError(f"no TPU topology {name!r}. {_HOW}")
    generation, chips = found.groups()
    if generation not in _GENERATIONS:
        hint = did_you_mean(name, [f"{one}:{chips}" for one in _GENERATIONS])
        raise UnknownTopologyError(f"no TPU topology {name!r}: {hint} {_HOW}")
    return math.prod(map(int, chips.split("x")))


@functools.cache
def _devices(name: str, slices: int, one_chip: bool) -> tuple[Any, ...]:
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if one_chip:  # a host has four, if nothing is said
        options["chips_per_host_bounds"] = (1, 1, 1)
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # JAX sets it where it finds no TPU
        for variable, value in _NO_TPU_HERE.items():
            os.environ.setdefault(variable, value)
    topologies = importlib.import_module("jax.experimental.topologies")  # half typed
    try:
        return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:
        said = str(error).partition("\n")[0]
        if "INVALID_ARGUMENT" in said:
            raise UnknownTopologyError(f"no TPU topology {name!r}: libtpu says: {said}") from None
        raise LibtpuError(_fails(name, said)) from error


def _fails(name: str, said: str) -> str:
    """What to do where libtpu is there and does not give a topology."""
    text = f"TPU topology {name!r}: libtpu {libtpu_version()} says: {said}"
    if "lockfile" in said or "in use" in said:
        return (
            f"{text} Another process of this host has it; with ALLOW_MULTIPLE_LIBTPU_LOAD=1 in "
            f"the environment of both they may compile side by side."
        )
    return f"{text} The installed jax wants {libtpu_requirement()}."
