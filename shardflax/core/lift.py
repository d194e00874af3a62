"""The transforms as users call them: of a module class, a method, or a function.

Functions take modules or scopes first; so these are the transforms of the functional core too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from shardflax.core import mapping, transforms
from shardflax.core.control import cond, switch, while_loop
from shardflax.core.cross import lifted
from shardflax.core.derivatives import custom_vjp, grad, jvp, value_and_grad, vjp
from shardflax.core.pack import pack, tree_map_rngs
from shardflax.core.remat import remat as remat_lift
from shardflax.core.transforms import In, Out, broadcast

__all__ = [
    "In",
    "Out",
    "add_metadata_axis",
    "broadcast",
    "checkpoint",
    "cond",
    "custom_vjp",
    "fold_rngs",
    "grad",
    "jit",
    "jvp",
    "map_variables",
    "named_call",
    "pack",
    "remat",
    "remat_scan",
    "scan",
    "switch",
    "tree_map_rngs",
    "value_and_grad",
    "vjp",
    "vmap",
    "while_loop",
]

# The last arguments end up in names of parameters: what Linen calls `scope.child(vmap(fn))`.
vmap = lifted(transforms.vmap, "Vmap", "inner")
scan = lifted(transforms.scan, "Scan", "inner")
jit = lifted(transforms.jit, "Jit", "inner")
remat = checkpoint = lifted(remat_lift, "Checkpoint", "inner")
remat_scan = lifted(mapping.remat_scan, "Remat_scan", "<lambda>")
map_variables = lifted(mapping.map_scope_variables, "Map_variables", "wrapper")
add_metadata_axis = lifted(mapping.add_metadata_axis, "Map_variables")  # Linen's name
fold_rngs = lifted(mapping.fold_rngs, "Fold_rngs", "inner_fold_rngs")

F = TypeVar("F", bound=Callable[..., Any])


def named_call(class_fn: F, force: bool = True) -> F:
    """Labels what a method computes, in profiles and compiled programs, with its name.

    Methods of modules carry labels anyway; with `force`, this one does even where they are off.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Half(nn.Module):
    ...     @nn.transforms.named_call
    ...     def __call__(self, x):
    ...         return x / 2
    >>> float(Half().apply({}, jnp.ones(())))
    0.5
    """

    @functools.wraps(class_fn)
    def labelled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not force:
            return class_fn(self, *args, **kwargs)
        with jax.named_scope(f"{self.name or type(self).__name__}.{class_fn.__name__}"):
            return class_fn(self, *args, **kwargs)

    return labelled  # pyright: ignore[reportReturnType]
