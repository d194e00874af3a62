"""The axes that the presets know, in the order of the network: slowest first."""

from __future__ import annotations

__all__ = ["AXIS_ALIASES", "INSIDE_A_SLICE", "KNOWN_AXES", "tie_rank"]

KNOWN_AXES = ("data", "stage", "fsdp", "fsdp2", "expert", "context", "tensor")
# Axes whose collectives run in every layer: they are kept on the fast network.
INSIDE_A_SLICE = ("context", "tensor")

AXIS_ALIASES = {
    "fsdp_transpose": "fsdp2",
    "model": "tensor",
    "mdl": "tensor",
    "tp": "tensor",
    "seq": "context",
    "sequence": "context",
    "cp": "context",
    "pipeline": "stage",
    "pp": "stage",
    "replica": "data",
    "dp": "data",
    "ep": "expert",
}

_FIRST = frozenset(("mlp", "heads", "kv_heads", "vocab", "expert", "expert_mlp"))
_LAST = frozenset(("q_lora", "kv_lora"))


def tie_rank(name: str) -> int:
    """Who goes first when two dims would both yield an axis: mlp before embed before lora.

    >>> tie_rank("mlp") < tie_rank("embed") < tie_rank("q_lora")
    True
    """
    return 0 if name in _FIRST else 2 if name in _LAST else 1
