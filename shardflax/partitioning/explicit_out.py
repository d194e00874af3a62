"""Operations on explicit axes: what to tell JAX where the types of operands do not say enough.

On an explicit mesh every array's type says how it is laid out, and an operation whose result has
more than one possible type (a sum over a sharded dim, a gather) must be told which is meant.  The
names of the output say it first; where they say nothing, its dims stay as the operands have them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from shardflax.partitioning.constraints import wanted_spec
from shardflax.partitioning.scope import axis_kinds
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.untyped import jx

__all__ = [
    "InAuto",
    "Operand",
    "explicit_axes",
    "laid_out_like",
    "operand",
    "out_spec",
]


def explicit_axes() -> frozenset[str]:
    """The explicit axes of the mesh in scope.

    >>> explicit_axes()
    frozenset()
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return frozenset()
    return frozenset(axis for axis, kind in axis_kinds(mesh) if kind == AxisType.Explicit)


@dataclass(frozen=True)
class Operand:
    """An operand: a label, a size and the entry of a spec for each dim.

    >>> Operand("ab", (2, 3), (None, "tensor")).spec[1]
    'tensor'
    """

    labels: Sequence[Hashable]
    shape: tuple[int, ...]
    spec: tuple[Any, ...]


def operand(labels: Sequence[Hashable], x: Any, spec: PartitionSpec | None = None) -> Operand:
    """`x` with a label a dim, as its type says it is laid out, or laid out as `spec`.

    >>> operand("ab", np.ones((2, 3)))
    Operand(labels='ab', shape=(2, 3), spec=(None, None))
    """
    said = tuple(jx.typeof(x).sharding.spec if spec is None else spec)
    return Operand(labels, tuple(np.shape(x)), said + (None,) * (np.ndim(x) - len(said)))


def out_spec(
    labels: Sequence[Hashable], operands: Sequence[Operand], names: tuple[Any, ...] | None = None
) -> PartitionSpec | None:
    """The `out_sharding` of an operation whose result has `labels`; None without explicit axes.

    A dim is laid out as `names` (those that the result will be constrained to, or None) say; if
    they do not, as the first of `operands` that has its label.  No axis is used twice.

    >>> x, w = Operand("bd", (8, 4), ("data", None)), Operand("df", (4, 6), (None, "tensor"))
    >>> out_spec("bf", [w, x]) is None
    True
    >>> from shardflax.partitioning import AxisRules, make_mesh, use
    >>> with use(make_mesh("data=4,tensor=2", axis_types="explicit"), AxisRules({})):
    ...     out_spec("bf", [w, x])
    P('data', 'tensor')
    """
    explicit = explicit_axes()
    if not explicit:
        return None
    sizes = {label: n for x in operands for label, n in zip(x.labels, x.shape, strict=True)}
    wanted = _wanted(tuple(sizes[label] for label in labels), names)
    claims = [(dim, entry) for dim, entry in enumerate(wanted) if not _unsaid(entry)]
    claims += [
        (labels.index(label), entry)
        for x in operands
        for label, entry in zip(x.labels, x.spec, strict=True)
        if label in labels and _unsaid(wanted[labels.index(label)])
    ]
    found: dict[int, tuple[str, ...]] = {}
    used: set[str] = set()
    for dim, entry in claims:
        axes = tuple(axis for axis in spec_axes(entry) if axis in explicit - used)
        if axes and dim not in found:
            found[dim] = axes
            used.update(axes)
    return PartitionSpec(*[found.get(dim) for dim in range(len(labels))])


def _wanted(shape: tuple[int, ...], names: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """One entry a dim: what `names` say of it under the rules in scope, or UNCONSTRAINED."""
    spec = None if names is None else wanted_spec(shape, names)
    if spec is None:
        return (PartitionSpec.UNCONSTRAINED,) * len(shape)
    return tuple(spec) + (None,) * (len(shape) - len(spec))


def _unsaid(entry: Any) -> bool:
    return entry is PartitionSpec.UNCONSTRAINED


@dataclass(frozen=True)
class InAuto:
    """`fn` of arrays, run with the explicit axes auto; its result is typed as `spec`.

    >>> from shardflax.partitioning import AxisRules, make_mesh, use
    >>> with use(make_mesh("data=8", axis_types="explicit"), AxisRules({})):
    ...     y = InAuto(jax.numpy.sin, PartitionSpec("data"))(np.ones(8, "float32"))
    >>> y.sharding.spec
    P('data',)
    """

    fn: Callable[..., Any]
    spec: PartitionSpec

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        def run(*arrays: Any) -> Any:
            return self.fn(*arrays, **options)

        axes = tuple(sorted(explicit_axes()))
        return jx.sharding.auto_axes(run, axes=axes, out_sharding=self.spec)(*arrays)


def laid_out_like(x: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, of the shape of `x`, laid out as `x` is: random numbers, say.

    On explicit axes they would otherwise be typed replicated, and made whole on every device.

    >>> laid_out_like(np.ones(2), jax.numpy.zeros, (2,)).shape
    (2,)
    """
    if not explicit_axes():
        return fn(*args)
    leaves, structure = jx.tree.flatten(args)
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def run(*arrays: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        return fn(*jx.tree.unflatten(structure, filled))

    return InAuto(run, jx.typeof(x).sharding.spec)(*[leaves[i] for i in traced])
