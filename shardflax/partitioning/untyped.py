"""JAX as an untyped value: pyright is strict here, and some of JAX's functions are half typed."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["jx"]

jx: Any = jax
