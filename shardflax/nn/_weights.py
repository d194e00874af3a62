"""How layers use their weights: laid out for the product, see `shardflax.partitioning.at_use`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from shardflax import partitioning
from shardflax.core import Module
from shardflax.nn import _names
from shardflax.nn.types import Array, Initializer, Names
from shardflax.partitioning import DefaultNames, LogicalInit, MeshInit, NamedInit
from shardflax.partitioning.at_use import used_spec
from shardflax.partitioning.explicit_out import InAuto, explicit_axes, operand, out_spec
from shardflax.partitioning.scope import rules_in_scope


def named(init: Initializer, axes: Names | None) -> Initializer:
    """`init` with names for the dims of its value; as it is, where nothing would come of them."""
    return init if _names.silent(axes) else partitioning.named(init, axes)


def stored_names(init: Any, axes: Names | None) -> Names | None:
    """The logical names that a weight is stored by: those of its initializer come first.

    None where they are not known: the initializer boxes with mesh axes, or with rules of its own.
    """
    if not (isinstance(axes, DefaultNames) and isinstance(init, _NAMING)):
        return axes
    if isinstance(init, MeshInit):
        return None
    if isinstance(init, LogicalInit):
        return init.names if init.rules is None and init.mesh is None else None
    return stored_names(init.fn, axes if init.names is None else init.names)


_NAMING = (MeshInit, LogicalInit, NamedInit)


def bias_at_use(bias: Array, init: Any, axes: Names | None) -> Array:
    """A bias laid out for its sum with an output whose other dims are the batch's."""
    if rules_in_scope() is None or not isinstance(bias, jax.Array):
        return bias
    return partitioning.at_use(bias, stored_names(init, axes))


@dataclass(frozen=True)
class Contraction:
    """The dims of a product, by labels, and what its output is going to be laid out as."""

    x: Sequence[Hashable]
    weight: Sequence[Hashable]
    out: Sequence[Hashable]
    names: Names | None = None
    features: Sequence[Any] | None = None

    def spec(self, x: Any, weight: Any, stored: Names | None) -> PartitionSpec | None:
        """What the product has to be told on explicit axes; None where there are none."""
        if not explicit_axes():
            return None
        used = used_spec(weight, stored)
        operands = [operand(self.weight, weight, used), operand(self.x, x)]
        sizes = {n: size for o in operands for n, size in zip(o.labels, o.shape, strict=True)}
        shape = tuple(sizes[label] for label in self.out)
        return out_spec(self.out, operands, _names.said(shape, self.names, self.features))


def product(
    fn: Callable[..., Array],
    x: Array,
    weight: Any,
    stored: Names | None,
    dims: Contraction,
    dot: Any = None,
) -> Array:
    """`fn(x, weight)` with the weight, stored by the names `stored`, laid out for its use.

    `dot`, what `fn` multiplies with, may be a module with state, which cannot run twice: then the
    backward pass keeps the weight as it was used.
    """
    if rules_in_scope() is None and not explicit_axes():
        return fn(x, weight)
    if not isinstance(weight, jax.Array):
        return fn(x, weight)
    spec = dims.spec(x, weight, stored)
    if spec is not None:
        fn = _told(fn, dot, spec)
    if isinstance(dot, Module):
        return fn(x, partitioning.at_use(weight, stored))
    return partitioning.with_weight(fn, x, weight, stored)


def _told(fn: Callable[..., Array], dot: Any, spec: PartitionSpec) -> Callable[..., Array]:
    """`fn` with its output laid out as `spec`: told so, or, where it cannot be, on auto axes."""
    if dot is None or _takes_out_sharding(dot):
        return partial(fn, out_sharding=spec)
    return fn if isinstance(dot, Module) else InAuto(fn, spec)


def _takes_out_sharding(dot: Any) -> bool:
    """Whether what multiplies can be told how to lay its output out, as JAX's functions can."""
    try:
        known = inspect.signature(dot).parameters
    except (TypeError, ValueError):
        return False
    return "out_sharding" in known
