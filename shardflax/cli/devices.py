"""Devices for a command, on any machine: emulated CPU devices, or TPUs to compile for."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax

from shardflax.cli.errors import CommandError
from shardflax.partitioning import tpu_topology
from shardflax.partitioning.mesh_spec import parse_mesh_spec

__all__ = ["emulated_devices", "tpus"]


def emulated_devices(count: int) -> list[Any]:
    """`count` devices of the CPU, emulated; XLA compiles for them as for so many real ones.

    Raises `CommandError` in a process that has started JAX with fewer.

    >>> len(emulated_devices(4))
    4
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has started: with enough devices, perhaps
    found = jax.devices("cpu")
    if len(found) < count:
        raise CommandError(
            f"this process has started JAX with {len(found)} CPU devices, and {count} are needed. "
            f"Run the command by itself, or with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return found[:count]


def tpus(topology: str, mesh: str, other_axes: Collection[str] = ()) -> list[Any]:
    """TPUs that are not there, as many slices of them as the spec of a mesh joins.

    Raises what `tpu_topology` raises.

    >>> tpus("v6:2x4", "dcn(data=2) ici(fsdp=8)")
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.UnknownTopologyError: no TPU topology 'v6:2x4': did you mean
    'v6e:2x4'? Write a generation and its chips, such as 'v5e:4x4' or 'v5p:2x2x4'.
    """
    return tpu_topology(topology, max(1, math.prod(parse_mesh_spec(mesh, other_axes).dcn)))
