"""The words of the presets: axes in the order of the network, slowest first; names; aliases."""

from __future__ import annotations

from shardflax.partitioning.default_table import DEFAULT_TABLE

__all__ = ["AXIS_ALIASES", "INSIDE_A_SLICE", "KNOWN_AXES", "known_name", "tie_rank"]

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

_NAME_ALIASES = {
    "cache_heads": "cache_kv_heads",
    "cache_kv": "head_dim",
    "cache_sequence": "cache_length",
    "embed_moe": "expert_embed",
    "embed_vocab": "vocab_embed",
    "exp": "expert",
    "experts": "expert",
    "head_size": "head_dim",
    "key_position": "kv_length",
    "kv": "head_dim",
    "kv_head": "kv_heads",
    "kv_head_dim": "head_dim",
    "mlp_moe": "expert_mlp",
    "position": "length",
    "q_heads": "heads",
}

# Batches of parts of a model, by what they are called in rules that call activations so.
_BATCHES = {
    "activation_batch_no_exp": "moe_batch",
    "activation_embed_and_logits_batch": "vocab_batch",
    "activation_batch": "batch",
}

_FIRST = frozenset(("mlp", "heads", "kv_heads", "vocab", "expert", "expert_mlp"))
_LAST = frozenset(("q_lora", "kv_lora"))


def known_name(name: str) -> str:
    """What the default rules call a dim that another codebase calls `name`; else `name`.

    >>> known_name("activation_kv"), known_name("q_heads"), known_name("embed")
    ('act_head_dim', 'heads', 'embed')
    """
    for start, batch in _BATCHES.items():
        if name.startswith(start):
            return batch
    kind, _, rest = name.partition("_")
    if kind != "activation" or not rest:
        return _NAME_ALIASES.get(name, name)
    known = _NAME_ALIASES.get(rest, rest)
    return known if known.endswith("length") and known in DEFAULT_TABLE else f"act_{known}"


def tie_rank(name: str) -> int:
    """Who goes first when two dims would both yield an axis: mlp before embed before lora.

    Activations and caches go as the weights that they come from.

    >>> tie_rank("mlp") == tie_rank("act_mlp") < tie_rank("embed") < tie_rank("q_lora")
    True
    """
    base = name.removeprefix("act_").removeprefix("cache_")
    return 0 if base in _FIRST else 2 if base in _LAST else 1
