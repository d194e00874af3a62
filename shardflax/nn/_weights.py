"""How layers use their weights: laid out for the product, see `shardflax.partitioning.at_use`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from shardflax import partitioning
from shardflax.nn import _names
from shardflax.nn.types import Array, Names
from shardflax.partitioning import LogicalInit, MeshInit, NamedInit


def stored_names(init: Any, axes: Names | None) -> Names | None:
    """The logical names that a weight is stored by: those of its initializer come first.

    None where they are not known: the initializer boxes with mesh axes, or with rules of its own.
    """
    if not _names.is_default(axes):
        return axes
    if isinstance(init, MeshInit):
        return None
    if isinstance(init, LogicalInit):
        return init.names if init.rules is None and init.mesh is None else None
    if isinstance(init, NamedInit):
        return stored_names(init.fn, axes if init.names is None else init.names)
    return axes


def bias_at_use(bias: Array, init: Any, axes: Names | None) -> Array:
    """A bias laid out for its sum with an output whose other dims are the batch's."""
    if not isinstance(bias, jax.Array):
        return bias
    return partitioning.at_use(bias, stored_names(init, axes))


def product(
    fn: Callable[[Array, Any], Array], x: Array, weight: Any, names: Names | None, dot: Any = None
) -> Array:
    """`fn(x, weight)` with the weight laid out for its use.

    `dot`, what `fn` multiplies with, may be a module with state, which cannot run twice: then the
    backward pass keeps the weight as it was used.
    """
    if not isinstance(weight, jax.Array):
        return fn(x, weight)
    if dot is None or dot is lax.dot_general:
        return partitioning.with_weight(fn, x, weight, names)
    return fn(x, partitioning.at_use(weight, names))
