"""Checks that a value is used at the trace level where it was made."""

from __future__ import annotations

from typing import Any

from shardflax.core.errors import JaxTransformError
from shardflax.core.staging import current_trace

__all__ = ["check_trace_level", "current_trace"]


def check_trace_level(base_level: Any) -> None:
    """Raises `JaxTransformError` unless JAX is at the trace level that `base_level` stands for.

    `base_level` comes from `current_trace()`.

    >>> check_trace_level(current_trace())
    """
    if current_trace() != base_level:
        raise JaxTransformError(())
