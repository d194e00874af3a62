"""What convolutions and pooling share: sizes and padding by dim, batch dims as one, names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from shardflax.core import Module
from shardflax.nn import _names as names
from shardflax.nn._weights import Contraction, product
from shardflax.nn.errors import InputRankError, PaddingError, WindowError
from shardflax.nn.types import INTEGERS, Array, Names, Padding
from shardflax.partitioning import default_names
from shardflax.partitioning.at_use import used_spec
from shardflax.partitioning.explicit_out import Operand, explicit_axes, operand, out_spec
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.scope import free_axes, mesh_in_scope, rules_in_scope
from shardflax.partitioning.spec_check import spec_axes

ANY = PartitionSpec.UNCONSTRAINED

LAX_PADDING = ("SAME", "SAME_LOWER", "VALID")

IMAGE_CHANNELS = 4
"""Up to so many channels are those of an image (grey, colours, opacity): too few to spread."""

BATCH_FIRST = default_names("batch", ANY)
"""Output names that say where the batch is; all other dims are left to the compiler."""


def sizes(place: str, what: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes of a window; a single number is a window of one dim."""
    return per_dim(place, what, value, np.size(value))


def per_dim(
    place: str, what: str, value: int | Sequence[int] | None, ndim: int, by: str = "kernel_size"
) -> tuple[int, ...]:
    """`value` for each of `ndim` windowed dims: a single number is for all of them, `None` is 1."""
    given: Any = 1 if value is None else value
    numbers: tuple[int, ...] = (given,) * ndim if np.ndim(given) == 0 else tuple(given)
    if len(numbers) != ndim:
        raise WindowError(place, f"{what}={numbers} has {len(numbers)} entries, {by} has {ndim}.")
    if any(number < 1 for number in numbers):
        raise WindowError(place, f"{what}={numbers} must be positive in every dim.")
    return numbers


def resolve_padding(
    place: str, padding: Padding, ndim: int, strings: tuple[str, ...] = LAX_PADDING
) -> str | tuple[tuple[int, int], ...]:
    """One of `strings`, or a pair (low, high) for each windowed dim."""
    if isinstance(padding, str):
        if padding.upper() not in strings:
            raise PaddingError(place, padding, strings)
        return padding.upper()
    if isinstance(padding, INTEGERS):
        return ((padding, padding),) * ndim
    try:
        pairs = tuple((p, p) if isinstance(p, INTEGERS) else tuple(p) for p in padding)
    except TypeError:  # of `None`, say
        raise PaddingError(place, padding, strings, ndim) from None
    if len(pairs) != ndim or any(len(p) != 2 for p in pairs):
        raise PaddingError(place, padding, strings, ndim)
    return tuple((low, high) for low, high in pairs)


def fold_batch(place: str, x: Array, ndim: int) -> tuple[Array, tuple[int, ...]]:
    """`x` with one batch dim before its `ndim` windowed dims and its features, and what it was."""
    if x.ndim < ndim + 1:
        spatial = ", ".join(["(*batch", *[f"spatial_{i}" for i in range(ndim)], "features)"])
        raise InputRankError(place, "inputs", f"{spatial} for windows of {ndim} dims", x.shape)
    batch = x.shape[: x.ndim - ndim - 1]
    if len(batch) != 1:
        x = jnp.reshape(x, (prod(batch), *x.shape[len(batch) :]))
    return x, batch


def unfold_batch(y: Array, batch: tuple[int, ...]) -> Array:
    """The inverse of `fold_batch`."""
    return y if len(batch) == 1 else jnp.reshape(y, (*batch, *y.shape[1:]))


def channels_name(name: str, channels: int) -> str | None:
    """The default name of a kernel's dim of `channels` input or output features."""
    return name if channels > IMAGE_CHANNELS else None


@dataclass(frozen=True)
class Said:
    """What is said of an output: names, the kernel's name of the features, how many batch dims."""

    axes: Names | None
    feature: Any = ANY
    batch: int = 1

    def names(self, ndim: int) -> Names | None:
        """The names of an output of `ndim` dims: by default those of the batch and the features.

        Of the other dims only one alone between the two is guessed at: it is a length.
        """
        if self.axes is None or self.axes != BATCH_FIRST:
            return self.axes
        if self.batch == 0 or ndim < 2:
            return None
        if ndim == 3 and (known := names.activation_names(3, [self.feature])) is not None:
            return known
        features = names.activation_names(2, [self.feature])
        last = ANY if features is None else features[-1]
        return default_names("batch", *[ANY] * (ndim - 2), last)

    def lay_out(self, y: Array) -> Array:
        """`y` laid out so."""
        return names.output(y, self.names(y.ndim))


@dataclass(frozen=True)
class Convolution(Contraction):
    """A convolution as a product: what it has to be told of its output on explicit axes.

    Dims over which windows move stay as they are laid out only where their size stays.
    """

    fn: Callable[..., Array] = field(kw_only=True)

    @classmethod
    def of(cls, fn: Callable[..., Array], weight: Sequence[Any], axes: Names | None) -> Convolution:
        """`weight` labels the kernel's dims: "in", "out", and a number where it varies by place."""
        places = tuple(range(len(weight) - 2))
        return cls(("batch", *places, "in"), weight, ("batch", *places, "out"), axes, fn=fn)

    def spec(self, x: Any, weight: Any, stored: Names | None) -> PartitionSpec | None:
        if not explicit_axes():
            return None
        shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, weight))
        shape = jax.eval_shape(self.fn, *shapes).shape
        entries = zip(operand(self.x, x).spec, x.shape, shape, strict=True)
        kept = [entry if old == new else None for entry, old, new in entries]
        result = Operand(self.out, shape, (*kept[:-1], None))
        kernel = operand(self.weight, weight, used_spec(weight, stored))
        return out_spec(self.out, [kernel, result], names.said(shape, self.names))


@dataclass(frozen=True)
class PerPart:
    """A convolution in groups, run by each device on its part of the batch.

    XLA's partitioner would gather the batch: it cuts such a convolution along one group a channel,
    and along nothing else.
    """

    fn: Callable[..., Array]

    def __call__(self, x: Array, kernel: Array) -> Array:
        mesh, entry = mesh_in_scope(), self._batch(x)
        if mesh is None or entry is None or explicit_axes():
            return self.fn(x, kernel)  # explicit axes are auto where it is computed: `InAuto`
        parts, whole = PartitionSpec(entry), PartitionSpec()
        return jax.shard_map(
            self.fn,
            mesh=mesh,
            in_specs=(parts, whole),
            out_specs=parts,
            axis_names={*spec_axes(entry)},
        )(x, kernel)

    def _batch(self, x: Array) -> Any:
        """The axes of the batch, where they divide it."""
        rules, mesh = rules_in_scope(), mesh_in_scope()
        if mesh is None or not isinstance(rules, AxisRules):
            return None
        said = names.said(x.shape, default_names("batch", *[None] * (x.ndim - 1)))
        spec = () if said is None else resolve(said, rules, x.shape, free_axes(mesh)).spec
        return spec[0] if spec and spec[0] is not ANY else None


def convolved(
    fn: Callable[..., Array],
    x: Array,
    kernel: Any,
    stored: Names | None,
    labels: Sequence[Any],
    said: Said,
    conv: Any = None,
) -> Array:
    """`fn(x, kernel)` with the kernel, stored by the names `stored`, laid out for its use.

    `labels` are those of the kernel's dims, `conv` is what `fn` convolves with: if that is a module
    with state, it runs once.
    """
    # Names of several batch dims say nothing of the one that they are here.
    dims = Convolution.of(fn, labels, said.names(x.ndim) if said.batch == 1 else None)
    return product(fn, x, kernel, stored, dims, conv if isinstance(conv, Module) else fn)
