"""The default rules, and presets made of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.default_table import BATCH_NAMES, DEFAULT_TABLE
from shardflax.partitioning.errors import UnknownPresetError, kind_of
from shardflax.partitioning.rules import AxisRules, RuleAxes, as_standard

__all__ = ["DEFAULT_RULES", "PRESETS", "preset"]

DEFAULT_RULES = as_standard(AxisRules(DEFAULT_TABLE, title="default rules"))


def _cut(
    title: str, batch: str, others: str = "", changes: Mapping[str, RuleAxes] | None = None
) -> AxisRules:
    """The default rules with the axes of `batch` on batch dims and `others` on all other dims."""
    wanted = {True: batch.split(), False: others.split()}
    table: dict[str, RuleAxes] = {
        name: [axis for axis in axes if axis.rstrip("?") in wanted[name in BATCH_NAMES]]
        for name, axes in DEFAULT_RULES
    }
    return AxisRules({**table, **(changes or {})}, title=title)


_DP = _cut("dp", "data")
_LORA = ("q_lora", "kv_lora")
_WHOLE: dict[str, RuleAxes] = dict.fromkeys(("embed", "vocab_embed", *_LORA))
_ZERO1: dict[str, RuleAxes] = dict.fromkeys(
    ("embed", "vocab_embed", "expert_embed", *_LORA), "data?"
)
_EXPERTS_OVER_CONTEXT = {"expert": "context", "act_expert": "context", "expert_embed": None}
# Requests come in any number and length: what does not divide is whole.
_DECODE: dict[str, RuleAxes] = {
    **_WHOLE,
    **dict.fromkeys(("batch", "vocab_batch", "cache_batch"), "data? fsdp? fsdp2? expert?"),
    **dict.fromkeys(("length", "kv_length", "cache_length"), "context?"),
    "moe_batch": "data? fsdp? fsdp2?",
    "norm_length": "context? tensor?",
}

PRESETS: dict[str, AxisRules] = {
    rules.title: as_standard(rules)
    for rules in (
        _DP,
        AxisRules(_DP, optimizer=_ZERO1, title="zero1"),
        _cut("fsdp", "data fsdp", "fsdp"),
        _cut("hsdp", "data fsdp", "fsdp"),
        _cut("fsdp2d", "data fsdp fsdp2", "fsdp fsdp2"),
        _cut("tp_sp", "data", "tensor"),
        _cut("tp_embed", "data", "tensor", {"norm_length": None, "act_embed": "tensor"}),
        _cut("fsdp_tp", "data fsdp", "fsdp tensor"),
        _cut("cp", "data", "context"),
        _cut("ep", "data expert", "expert"),
        _cut("ep_as_cp", "data", "expert", {"length": "expert", "norm_length": "expert"}),
        _cut("cp_as_ep", "data", "context", _EXPERTS_OVER_CONTEXT),
        _cut("ep_as_dp", "data expert", "expert", _WHOLE),
        _cut("pp", "data stage", "stage"),
        _cut("decode", "", "expert tensor", _DECODE),
    )
}


def preset(name: str) -> AxisRules:
    """The preset of this name: strict rules that can be printed, changed with `|`, and hashed.

    Several are added: `preset("fsdp + tp_sp")` is `preset("fsdp") + preset("tp_sp")`.  An axis
    that the mesh lacks is of size 1, so a preset may name more axes than are there; `"default"`
    names all.

    | preset | axes of the mesh | what it spreads |
    |---|---|---|
    | `dp` | data | the batch; parameters are whole on every device |
    | `zero1` | data | the batch, and the optimizer's state (Rajbhandari et al., 2020) |
    | `fsdp` | fsdp | the batch and the parameters, by `embed`, over the same axis |
    | `hsdp` | data fsdp | the rules of `fsdp`, with whole copies over `data`, across slices |
    | `fsdp2d` | fsdp fsdp2 | parameters by `embed` and by `mlp`, the batch over both |
    | `tp_sp` | tensor | heads, mlp and vocabulary, and between blocks the length |
    | `tp_embed` | tensor | the same, and between blocks the width: for lengths that do not divide |
    | `fsdp_tp` | fsdp tensor | `fsdp + tp_sp` |
    | `cp` | context | the length of activations; parameters by `embed` |
    | `ep` | expert | experts; outside of them the batch, and parameters by `embed` |
    | `ep_as_cp` | expert | experts; outside of them the length, and parameters by `embed` |
    | `cp_as_ep` | context | the length; inside expert blocks experts, over the same axis |
    | `ep_as_dp` | expert | experts; outside of them the batch, with parameters whole |
    | `pp` | stage | pipeline stages, and the batch of logits and loss |
    | `decode` | tensor | heads, mlp, vocabulary; rows and cache as far as they divide |

    All spread the batch over `data` too.

    Raises `UnknownPresetError` (did-you-mean).

    >>> preset("fsdp_tp")["mlp"]
    ('tensor',)
    >>> preset("fsdp + tp_sp") == preset("fsdp_tp")
    True
    >>> preset("fsdp_pt")
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.UnknownPresetError: no preset 'fsdp_pt': did you mean 'fsdp_tp'?
    """
    if not isinstance(cast(Any, name), str):
        raise UnknownPresetError(
            f"a preset has a name, such as 'fsdp_tp' or 'fsdp + tp_sp'; found {kind_of(name)}."
        )
    return _sum(name)


@functools.lru_cache(maxsize=256)
def _sum(name: str) -> AxisRules:
    """The presets of a sum."""
    first, *more = [_one(part.strip(), name) for part in name.split("+")]
    return sum(more, first)


def _one(part: str, name: str) -> AxisRules:
    """One preset; `name` is what was asked for."""
    if part == "default":
        return DEFAULT_RULES
    if part not in PRESETS:
        inside = "" if part == name else f" (in {name!r})"
        hint = did_you_mean(part, {*PRESETS, "default"})
        raise UnknownPresetError(f"no preset {part!r}{inside}: {hint}")
    return PRESETS[part]
