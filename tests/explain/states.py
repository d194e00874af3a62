"""States to explain: small ones with everything in them that an explanation can say."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shardflax.partitioning import AxisRules, LogicallyPartitioned, Partitioned

__all__ = ["RULES", "SPEC", "boxed", "many", "state"]

SPEC = "dcn(data=2) ici(fsdp=4,tensor=2)"
RULES = AxisRules(
    {
        "batch": "data fsdp",
        "embed": "fsdp",
        "mlp": "fsdp? tensor",
        "vocab": "tensor?",
        "norm": None,
        "layers": None,
    },
    title="mine",
)


def boxed(shape: tuple[int, ...], *names: Any) -> LogicallyPartitioned:
    """A shape with names."""
    return LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def state() -> dict[str, Any]:
    """Two parameters and one by mesh axes, moments of the first two, and a leaf without names."""
    kernel = jax.ShapeDtypeStruct((64, 96), jnp.float32)
    scale = jax.ShapeDtypeStruct((64,), jnp.float32)
    by_axes = Partitioned(jax.ShapeDtypeStruct((8, 2), jnp.bfloat16), ("tensor", None))
    return {
        "params": {
            "up": {"kernel": boxed((64, 96), "embed", "mlp")},
            "norm": {"scale": boxed((64,), "norm")},
            "head": {"kernel": boxed((64, 17), "embed", "vocab")},
            "axes": by_axes,
        },
        "mu": {"up": {"kernel": kernel}, "norm": {"scale": scale}},
        "loose": jax.ShapeDtypeStruct((30, 5), jnp.int32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }


def many(count: int) -> dict[str, Any]:
    """A state of `count` parameters, one of them misspelt, one with a path made to break pages."""
    params: dict[str, Any] = {
        f"layers_{i}": {"kernel": boxed((64, 32 * (1 + i % 5)), "embed", "mlp")}
        for i in range(count - 2)
    }
    params["layers_7x"] = {"kernel": boxed((64, 96), "emebd", "mlp")}
    params["</script><img src=x onerror=alert(1)>"] = {"kernel": boxed((64, 17), "embed", "vocab")}
    return {"params": params}
