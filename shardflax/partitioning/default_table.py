"""The table of default rules: what presets are cut from, and the order of axes in each row."""

from __future__ import annotations

__all__ = ["BATCH_NAMES", "DEFAULT_TABLE"]

DEFAULT_TABLE: dict[str, str | None] = {
    # batch
    "batch": "data fsdp fsdp2 expert",
    "vocab_batch": "data fsdp fsdp2 expert stage",
    "moe_batch": "data fsdp fsdp2",
    # length
    "length": "context",
    "norm_length": "context tensor?",
    "kv_length": None,
    # activations
    "act_embed": None,
    "act_head_dim": None,
    "microbatch": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    "act_vocab": "tensor",
    "act_kv_heads": "tensor?",
    "act_expert": "expert",
    "act_stage": "stage",
    # weights
    "embed": "fsdp fsdp2? context expert",
    "vocab_embed": "fsdp fsdp2 context expert",
    "mlp": "fsdp2? tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "kv_heads": "tensor?",
    "head_dim": None,
    "qkv": None,
    "norm": None,
    "layers": None,
    "stack": None,
    "conv_spatial": None,
    "expert": "expert",
    "expert_embed": "fsdp fsdp2? context",
    "expert_mlp": "fsdp2? tensor",
    "stage": "stage",
    "q_lora": "fsdp? fsdp2? context? expert?",
    "kv_lora": "fsdp? fsdp2? context? expert?",
    # cache
    "cache_batch": "data fsdp fsdp2 expert",
    "cache_length": None,
    "cache_kv_heads": "tensor?",
}

BATCH_NAMES = ("batch", "vocab_batch", "moe_batch", "cache_batch")
