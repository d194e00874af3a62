"""The default rules, and presets made of them."""

from __future__ import annotations

from collections.abc import Iterable

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import UnknownPresetError
from shardflax.partitioning.rules import AxisRules

__all__ = ["DEFAULT_RULES", "PRESETS", "preset"]

_TABLE: dict[str, str | None] = {
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

DEFAULT_RULES = AxisRules(_TABLE, title="default rules")

_BATCH = ("batch", "vocab_batch", "moe_batch", "cache_batch")


def _only(title: str, batch: Iterable[str], others: Iterable[str]) -> AxisRules:
    """The default rules with the axes of `batch` on batch dims and `others` on all other dims."""

    def kept(name: str, axes: tuple[str, ...]) -> tuple[str, ...]:
        wanted = batch if name in _BATCH else others
        return tuple(axis for axis in axes if axis.rstrip("?") in wanted)

    return AxisRules([(name, kept(name, axes)) for name, axes in DEFAULT_RULES], title=title)


PRESETS: dict[str, AxisRules] = {
    rules.title: rules
    for rules in (
        _only("dp", ("data",), ()),
        _only("fsdp", ("data", "fsdp"), ("fsdp",)),
        _only("tp_sp", ("data",), ("tensor",)),
        _only("fsdp_tp", ("data", "fsdp"), ("fsdp", "tensor")),
    )
}


def preset(name: str) -> AxisRules:
    """The preset of this name: strict rules that can be printed, changed with `|`, and hashed.

    `dp`: the batch over `data`, every parameter whole on every device.  `fsdp`: parameters and
    batch over `fsdp`, the batch over `data` too.  `tp_sp`: heads, mlp and vocabulary over
    `tensor`, and the residual stream's length with them.  `fsdp_tp`: both.

    Raises `UnknownPresetError` (did-you-mean).

    >>> preset("fsdp_tp")["mlp"]
    ('tensor',)
    >>> preset("fsdp_pt")
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.UnknownPresetError: no preset 'fsdp_pt': did you mean 'fsdp_tp'?
    """
    if name == "default":
        return DEFAULT_RULES
    if name not in PRESETS:
        raise UnknownPresetError(f"no preset {name!r}: {did_you_mean(name, PRESETS)}")
    return PRESETS[name]
