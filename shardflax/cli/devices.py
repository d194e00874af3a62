"""Emulated devices for a command: as many CPU devices as a mesh asks for, on any machine."""

from __future__ import annotations

from typing import Any

import jax

from shardflax.cli.errors import CommandError

__all__ = ["emulated_devices"]


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
