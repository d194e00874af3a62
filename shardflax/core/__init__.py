"""The core: modules, scopes and lifted transforms.  It knows no mesh and no rules."""

from shardflax.core.boxes import AxisMetadata, unbox
from shardflax.core.calls import intercept_methods
from shardflax.core.cross import lifted
from shardflax.core.lift import checkpoint, jit, remat, scan, vmap
from shardflax.core.module import Module, compact, nowrap
from shardflax.core.names import CollectionFilter, DenyList
from shardflax.core.run import apply, init, init_with_output
from shardflax.core.scope import Scope, Variable
from shardflax.core.transforms import In, Out, broadcast

__all__ = [
    "AxisMetadata",
    "CollectionFilter",
    "DenyList",
    "In",
    "Module",
    "Out",
    "Scope",
    "Variable",
    "apply",
    "broadcast",
    "checkpoint",
    "compact",
    "init",
    "init_with_output",
    "intercept_methods",
    "jit",
    "lifted",
    "nowrap",
    "remat",
    "scan",
    "unbox",
    "vmap",
]
