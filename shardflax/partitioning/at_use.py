"""The layout in which weights are used: without the axes over which the activations are spread.

A weight is stored over as many axes as possible, those of the batch included (`embed` over `fsdp`).
A product of such a weight and a batch over `fsdp` has two claims on one axis, and only one of its
results can have it.  The usual answer is to gather the weight over those axes first: said here,
once, and not left to the compiler, which also finds worse ones (docs/layouts.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from shardflax.core.staging import regions
from shardflax.partitioning.call_site import located
from shardflax.partitioning.defaults import DefaultNames, in_force
from shardflax.partitioning.errors import Problem, raise_problems
from shardflax.partitioning.lowering import lower
from shardflax.partitioning.override_lookup import stored_by_path
from shardflax.partitioning.resolve import MeshAxes, resolve
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.scope import (
    AnyMesh,
    free_axes,
    init_trace,
    mesh_in_scope,
    rules_in_scope,
)
from shardflax.partitioning.spec_check import make_spec, spec_axes
from shardflax.partitioning.untyped import jx

__all__ = ["at_use", "spec_at_use", "used_spec", "with_weight"]

Names = tuple[Any, ...]

_BESIDE = ("batch", "length")


def at_use(weight: Any, names: Names | None, beside: tuple[str, ...] = _BESIDE) -> Any:
    """Lays a weight out for its use: without the axes that the rules give to the dims `beside` it.

    The layout is that of the compute rules (`AxisRules(..., compute=...)`; unsaid, those of the
    stored weight), less those axes.
    `names` are those of the stored weight (explicit or default), `beside` those of the dims that
    the activations have and the weight lacks: a layer of experts says `("moe_batch", "length")`.
    Gradients come back in the stored layout.  It does something only under strict rules, with a
    mesh, outside of the init that `init_sharded` traces, and where such an axis is taken;
    anywhere else it returns `weight` and leaves no trace.

    A product that is differentiated keeps its operands: `with_weight` keeps the stored weight.

    Raises a `LayoutError` for explicit names that do not fit the weight, the rules, or the mesh.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh, preset, use
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     kernel = at_use(jnp.ones((8, 6)), ("embed", "mlp"))
    >>> kernel.sharding.spec
    P(None, 'tensor')
    """
    change = _change(weight, names, beside)
    return weight if change is None else change(weight)


def with_weight(
    fn: Callable[[Any, Any], Any],
    x: Any,
    weight: Any,
    names: Names | None,
    beside: tuple[str, ...] = _BESIDE,
) -> Any:
    """`fn(x, at_use(weight, names, beside))`, where the backward pass lays the weight out again.

    So what is kept between the passes is the stored weight, not the gathered one: a stack of
    layers needs the room of one gathered weight at a time.  `fn` must be a pure function of two
    arrays; what it computes besides products is computed again in the backward pass.

    Directly inside of `nn.remat` or `jax.checkpoint` the weight is laid out plainly: that runs
    again before its backward pass, and its policy says what is kept.

    >>> import jax, jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh, preset, use
    >>> x, kernel = jnp.ones((8, 8)), jnp.ones((8, 6))
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     y = jax.jit(lambda x, k: with_weight(jnp.dot, x, k, ("embed", "mlp")))(x, kernel)
    >>> y.shape
    (8, 6)
    """
    change = _change(weight, names, beside)
    if change is None:
        return fn(x, weight)
    around = regions()
    if around[:1] == ["remat"]:
        # What is recomputed lays the weight out for itself and for the backward pass after it.
        return fn(x, change(weight))
    return jx.checkpoint(_Product(fn, change), prevent_cse=_barrier(around))(x, weight)


def _barrier(around: list[str]) -> bool | tuple[bool, bool]:
    """What of a product and its weight a barrier keeps apart from the forward pass.

    It ties the weight to what comes back: or XLA would merge the two gathers, and keep their
    result.  The array has none: what was sent for it need not be sent again.
    """
    if "remat" not in around:
        return False, True
    # JAX trips over barriers of parts inside of a `jax.checkpoint` that saves something by its
    # policy.  Of a loop, forward and backward pass are two loops, which nothing merges.
    return around[0] != "scan"


def used_spec(
    weight: Any, names: Names | None, beside: tuple[str, ...] = _BESIDE
) -> PartitionSpec | None:
    """The spec in which `at_use` lays `weight` out; None where it returns it as it is.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh, preset, use
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     used_spec(jnp.ones((8, 6)), ("embed", "mlp"))
    P(None, 'tensor')
    """
    change = _change(weight, names, beside)
    return None if change is None else change.used


def spec_at_use(
    names: Names,
    rules: AxisRules,
    shape: tuple[int, ...],
    axes: MeshAxes,
    beside: tuple[str, ...] = _BESIDE,
) -> PartitionSpec | None:
    """The same for a weight of which these are known, whatever is in scope.

    >>> from shardflax.partitioning import preset
    >>> spec_at_use(("embed", "mlp"), preset("fsdp_tp"), (8, 6), (("fsdp", 4), ("tensor", 2)))
    P(None, 'tensor')
    """
    specs, _ = _specs(names, rules, shape, axes, beside, True)
    return None if specs is None else specs[1]


@dataclass(frozen=True)
class _Change:
    """From the layout `stored` to the layout `used`, on one mesh."""

    stored: PartitionSpec
    used: PartitionSpec
    mesh: AnyMesh

    def __call__(self, weight: Any) -> Any:
        # The first constraint is for the way back: the gradient of the second has its layout.
        stored = lower(weight, self.stored, self.mesh, "a stored weight")
        return lower(stored, self.used, self.mesh, "a weight at its use")


@dataclass(frozen=True)
class _Product:
    """A function of an array and a weight, with the weight laid out for it."""

    fn: Callable[[Any, Any], Any]
    change: _Change

    def __call__(self, x: Any, weight: Any) -> Any:
        return self.fn(x, self.change(weight))


def _change(weight: Any, names: Names | None, beside: tuple[str, ...]) -> _Change | None:
    """What has to be done to `weight` under the rules and the mesh in scope, if anything."""
    rules = rules_in_scope()
    if rules is None or names is None:
        return None
    if not isinstance(rules, AxisRules) or init_trace() is not None:
        return None
    names = stored_by_path(weight, rules) or names
    mesh, said = mesh_in_scope(), in_force(names, np.ndim(weight), rules)
    if mesh is None or said is None:
        return None
    advice = isinstance(names, DefaultNames)
    shape, axes = tuple(np.shape(weight)), free_axes(mesh)
    specs, problems = _specs(tuple(said), rules, shape, axes, beside, advice)
    raise_problems(located(problems, "weight at its use"))
    return None if specs is None else _Change(*specs, mesh)


@functools.lru_cache(maxsize=4096)
def _specs(
    names: Names,
    rules: AxisRules,
    shape: tuple[int, ...],
    axes: MeshAxes,
    beside: tuple[str, ...],
    advice: bool,
) -> tuple[tuple[PartitionSpec, PartitionSpec] | None, tuple[Problem, ...]]:
    """The stored and the used spec, or None where they are equal; and what is wrong.

    Names that nobody wrote are `advice`: where they do not fit, nothing is done.
    """
    stored = resolve(names, rules, shape, axes, rules.min_size)
    where_used = resolve(names, rules.compute, shape, axes, rules.min_size)
    problems = stored.problems or where_used.problems
    unknown = [p for name in beside for p in resolve((name,), rules.compute).problems]
    if beside != _BESIDE and unknown:
        return None, tuple(unknown)
    if problems:
        return None, () if advice else problems
    busy = {axis.rstrip("?") for name in beside for axis in rules.compute.get(name) or ()}
    used = make_spec(_without(entry, busy) for entry in where_used.spec)
    return None if used == stored.spec else (stored.spec, used), ()


def _without(entry: Any, axes: set[str]) -> Any:
    """One entry of a spec without `axes`."""
    if entry is PartitionSpec.UNCONSTRAINED:
        return entry
    return tuple(axis for axis in spec_axes(entry) if axis not in axes)
