"""What layers have to know inside `shard_map`: over which axes a value differs."""

from __future__ import annotations

from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
    """The manual axes over whose devices `x` may differ; none outside `shard_map`."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying
