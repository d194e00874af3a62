"""Modules and how they run, under the name that Linen's programs import them by."""

from __future__ import annotations

from shardflax.core import (
    Module,
    Variable,
    compact,
    compact_name_scope,
    disable_named_call,
    enable_named_call,
    intercept_methods,
    nowrap,
    override_named_call,
    share_scope,
)
from shardflax.core.run import apply, init, init_with_output
from shardflax.nn.stochastic import merge_param

__all__ = [
    "Module",
    "Variable",
    "apply",
    "compact",
    "compact_name_scope",
    "disable_named_call",
    "enable_named_call",
    "init",
    "init_with_output",
    "intercept_methods",
    "merge_param",
    "nowrap",
    "override_named_call",
    "share_scope",
]
