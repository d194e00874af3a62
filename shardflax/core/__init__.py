"""The core: modules, scopes and lifted transforms.  It knows no mesh and no rules."""

from shardflax.core import frozen_dict, lift, meta, nn, tracers
from shardflax.core.boxes import AxisMetadata, unbox
from shardflax.core.boxes import map_boxes as map_axis_meta
from shardflax.core.calls import (
    disable_named_call,
    enable_named_call,
    intercept_methods,
    override_named_call,
)
from shardflax.core.cross import lifted
from shardflax.core.frozen_dict import FrozenDict, copy, freeze, pop, pretty_repr, unfreeze
from shardflax.core.functional import apply, bind, init, lazy_init
from shardflax.core.lift import (
    add_metadata_axis,
    checkpoint,
    cond,
    custom_vjp,
    fold_rngs,
    grad,
    jit,
    jvp,
    map_variables,
    named_call,
    remat,
    remat_scan,
    scan,
    switch,
    value_and_grad,
    vjp,
    vmap,
    while_loop,
)
from shardflax.core.marks import compact, compact_name_scope, nowrap
from shardflax.core.module import Module
from shardflax.core.names import CollectionFilter, DenyList
from shardflax.core.scope import Scope
from shardflax.core.sharing import share_scope
from shardflax.core.summary import tabulate
from shardflax.core.tracers import check_trace_level, current_trace
from shardflax.core.transforms import In, Out, broadcast
from shardflax.core.variable import Variable

__all__ = [
    "AxisMetadata",
    "CollectionFilter",
    "DenyList",
    "FrozenDict",
    "In",
    "Module",
    "Out",
    "Scope",
    "Variable",
    "add_metadata_axis",
    "apply",
    "bind",
    "broadcast",
    "check_trace_level",
    "checkpoint",
    "compact",
    "compact_name_scope",
    "cond",
    "copy",
    "current_trace",
    "custom_vjp",
    "disable_named_call",
    "enable_named_call",
    "fold_rngs",
    "freeze",
    "frozen_dict",
    "grad",
    "init",
    "intercept_methods",
    "jit",
    "jvp",
    "lazy_init",
    "lift",
    "lifted",
    "map_axis_meta",
    "map_variables",
    "meta",
    "named_call",
    "nn",
    "nowrap",
    "override_named_call",
    "pop",
    "pretty_repr",
    "remat",
    "remat_scan",
    "scan",
    "share_scope",
    "switch",
    "tabulate",
    "tracers",
    "unbox",
    "unfreeze",
    "value_and_grad",
    "vjp",
    "vmap",
    "while_loop",
]
