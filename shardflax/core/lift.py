"""The transforms as users call them: of a module class, a method, or a function of modules."""

from __future__ import annotations

from shardflax.core import transforms
from shardflax.core.cross import lifted

__all__ = ["checkpoint", "jit", "remat", "scan", "vmap"]

vmap = lifted(transforms.vmap, "Vmap")
scan = lifted(transforms.scan, "Scan")
jit = lifted(transforms.jit, "Jit")
remat = checkpoint = lifted(transforms.remat, "Checkpoint")
