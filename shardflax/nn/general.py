"""`DenseGeneral`: a linear map over any dims of the input to any number of feature dims."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from shardflax import partitioning
from shardflax.core import compact, nowrap
from shardflax.core.rng import is_keyless
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import dtypes, initializers
from shardflax.nn.errors import AxesError, where
from shardflax.nn.linear import choose_dot_general
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Axes, DotGeneral, Dtype, Initializer, Names, Precision

__all__ = ["DenseGeneral", "canonical_dims"]


@dataclasses.dataclass(frozen=True)
class _Flattened:
    """Draws with `init` on a shape whose dims are merged in groups, so that fans count right.

    `groups` are the numbers of dims that merge.  A box around the numbers is kept: its names
    belong to the shape that the parameter is declared with.
    """

    init: Any
    groups: tuple[int, ...]

    @property
    def keyless(self) -> bool:
        """Whether the key is ignored: see `shardflax.core.rng.is_keyless`."""
        return is_keyless(self.init)

    def __call__(self, key: Any, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Any:
        flat: list[int] = []
        start = 0
        for count in self.groups:
            flat.append(prod(shape[start : start + count]))
            start += count
        if hasattr(self.init, "box"):
            # A wrapper of ours that names dims: it draws flat, and boxes the declared shape.
            return self.init.box(jnp.reshape(self.init.fn(key, tuple(flat), dtype), shape))
        drawn = self.init(key, tuple(flat), dtype)
        return jax.tree.map(lambda value: jnp.reshape(value, shape), drawn)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The dims of one call, counted from the front and sorted."""

    batch: tuple[int, ...]
    contract: tuple[int, ...]
    features: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.batch)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        contracted = tuple(self.shape[d] for d in self.contract)
        return (*self.batch_shape, *contracted, *self.features)

    @property
    def bias_dims(self) -> list[int]:
        """The kernel's dims that the bias has too."""
        last = len(self.kernel_shape)
        return [*range(len(self.batch)), *range(last - len(self.features), last)]

    @property
    def bias_groups(self) -> tuple[int, ...]:
        return (len(self.batch) + len(self.features),)

    @property
    def kernel_groups(self) -> tuple[int, ...]:
        return len(self.batch) + len(self.contract), len(self.features)

    @property
    def dimension_numbers(self) -> Any:
        at = len(self.batch)
        within = tuple(range(at, at + len(self.contract)))
        return (self.contract, within), (self.batch, tuple(range(at)))

    def contraction(self, out_axes: Names | None, kernel_axes: Names) -> weights.Contraction:
        """The dims by labels: those of the input by number, the features counted below zero."""
        features = tuple(range(-len(self.features), 0))
        mapped = [d for d in range(len(self.shape)) if d not in (*self.batch, *self.contract)]
        if self.batch and names.is_default(out_axes):
            out_axes = None
        return weights.Contraction(
            tuple(range(len(self.shape))),
            (*self.batch, *self.contract, *features),
            (*self.batch, *mapped, *features),
            out_axes,
            kernel_axes[len(kernel_axes) - len(features) :],
        )

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The bias against the output: batch dims, ones for what is mapped over, features."""
        mapped = len(self.shape) - len(self.batch) - len(self.contract)
        return (*self.batch_shape, *(1,) * mapped, *self.features)


def canonical_dims(place: str, name: str, dims: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """`dims` counted from the front and sorted; those that do not exist are an `AxesError`.

    >>> canonical_dims("layer", "axis", (-1, 1), (2, 3, 4))
    (1, 2)
    """
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    ndim = len(shape)
    for d in given:
        if not -ndim <= d < ndim:
            raise AxesError(place, name, given, shape, f"dim {d} does not exist")
    counted = tuple(sorted(d % ndim for d in given))
    if len(set(counted)) < len(counted):
        raise AxesError(place, name, given, shape, "a dim is given twice")
    return counted


class DenseGeneral(LayerBase):
    """A linear map that contracts the dims `axis` of its input into the dims `features`.

    Dims in `batch_dims` (leading ones) have a kernel of their own each.  Parameters are `kernel`
    `(*batch, *contracted, *features)`, drawn as the matrix that it stands for, and `bias`
    `(*batch, *features)`; the output is `(*batch, *mapped, *features)`.  Dims that do not exist,
    are given twice or are both batch and contracted are an `AxesError`.

    `kernel_axes=None` names the kernel by its dims: `("embed", "mlp", None)` for one contracted
    dim and two features, `("mlp", None, "embed")` for two and one.  `bias_axes` and `out_axes`
    follow the kernel where they are not given; `out_axes=None` leaves the output to the compiler.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> to_heads = nn.DenseGeneral(features=(2, 3), kernel_axes=("embed", "heads", "head_dim"))
    >>> y, variables = to_heads.init_with_output(jax.random.key(0), jnp.ones((5, 4)))
    >>> y.shape
    (5, 2, 3)
    """

    features: int | Sequence[int]
    axis: Axes = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = initializers.lecun_normal()
    bias_init: Initializer = initializers.zeros
    precision: Precision = None
    promote_dtype: Any = dtypes.promote_dtype
    dot_general: DotGeneral | None = None
    dot_general_cls: Any = None
    kernel_axes: Names | None = field(default=None, kw_only=True)
    bias_axes: Names | None = field(default=None, kw_only=True)
    out_axes: Names | None = field(default=names.FOLLOW, kw_only=True)

    @compact
    def __call__(self, inputs: Array) -> Array:
        plan = self._plan(jnp.shape(inputs))
        kernel_axes = self.kernel_axes
        if kernel_axes is None:
            kernel_axes = names.kernel_names(
                len(plan.contract), len(plan.features), len(plan.batch)
            )
        init = partitioning.named(_Flattened(self.kernel_init, plan.kernel_groups), kernel_axes)
        kernel = self.param("kernel", init, plan.kernel_shape, self.param_dtype)
        bias = self._bias(plan, kernel_axes) if self.use_bias else None
        x, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        dot = choose_dot_general(self.dot_general, self.dot_general_cls)
        multiply = partial(dot, dimension_numbers=plan.dimension_numbers, precision=self.precision)
        stored = weights.stored_names(self.kernel_init, kernel_axes)
        out = plan.contraction(self.out_axes, kernel_axes)
        y = weights.product(multiply, x, kernel, stored, out, dot)
        if bias is not None:
            y = y + jnp.reshape(bias, plan.bias_shape)
        return names.output(y, out.names, out.features)

    @nowrap
    def _plan(self, shape: tuple[int, ...]) -> _Plan:
        place = where(self)
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        batch = canonical_dims(place, "batch_dims", tuple(self.batch_dims), shape)
        if batch != tuple(range(len(batch))):
            raise AxesError(
                place, "batch_dims", batch, shape, "they must be the leading dims, 0, 1, ..."
            )
        contract = canonical_dims(place, "axis", self.axis, shape)
        if both := sorted(set(contract) & set(batch)):
            raise AxesError(
                place, "axis", contract, shape, f"dim {both[0]} is also one of batch_dims={batch}"
            )
        return _Plan(batch, contract, features, shape)

    @nowrap
    def _bias(self, plan: _Plan, kernel_axes: Names) -> Array:
        axes = self.bias_axes
        if axes is None:
            axes = names.like_kernel(None, kernel_axes, plan.bias_dims)
        shape = (*plan.batch_shape, *plan.features)
        init = partitioning.named(_Flattened(self.bias_init, plan.bias_groups), axes)
        bias = self.param("bias", init, shape, self.param_dtype)
        return weights.bias_at_use(bias, self.bias_init, axes)
