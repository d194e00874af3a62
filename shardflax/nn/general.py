"""`DenseGeneral`: a linear map over any dims of the input to any number of feature dims."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from dataclasses import field
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.core import compact, nowrap
from shardflax.core.rng import is_keyless
from shardflax.core.variable import is_array
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import dtypes, initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn.errors import AxesError
from shardflax.nn.linear import choose_dot_general
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import (
    INTEGERS,
    Array,
    Axes,
    DotGeneral,
    Dtype,
    Initializer,
    Names,
    Precision,
)

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
        if is_array(drawn):
            return jnp.reshape(drawn, shape)
        return jax.tree.map(lambda value: jnp.reshape(value, shape), drawn)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """The dims of a call, counted from the front and sorted, and their names."""

    batch: tuple[int, ...]
    contract: tuple[int, ...]
    features: tuple[int, ...]
    shape: tuple[int, ...]
    kernel_axes: Names
    bias_axes: Names
    out_axes: Names | None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.batch)

    @cached_property
    def kernel_shape(self) -> tuple[int, ...]:
        contracted = tuple(self.shape[d] for d in self.contract)
        return (*self.batch_shape, *contracted, *self.features)

    @cached_property
    def kernel_groups(self) -> tuple[int, ...]:
        return len(self.batch) + len(self.contract), len(self.features)

    @cached_property
    def bias_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, *self.features)

    @cached_property
    def bias_groups(self) -> tuple[int, ...]:
        return (len(self.batch) + len(self.features),)

    @cached_property
    def bias_against_output(self) -> tuple[int, ...]:
        """The shape of the bias in the sum: batch dims, ones for what is mapped, features."""
        mapped = len(self.shape) - len(self.batch) - len(self.contract)
        return (*self.batch_shape, *(1,) * mapped, *self.features)

    @cached_property
    def dimension_numbers(self) -> Any:
        at = len(self.batch)
        within = tuple(range(at, at + len(self.contract)))
        return (self.contract, within), (self.batch, tuple(range(at)))

    @cached_property
    def contraction(self) -> weights.Contraction:
        """The dims by labels: those of the input by number, the features counted below zero."""
        features = tuple(range(-len(self.features), 0))
        mapped = [d for d in range(len(self.shape)) if d not in (*self.batch, *self.contract)]
        return weights.Contraction(
            tuple(range(len(self.shape))),
            (*self.batch, *self.contract, *features),
            (*self.batch, *mapped, *features),
            None if self.batch and names.is_default(self.out_axes) else self.out_axes,
            self.kernel_axes[len(self.kernel_axes) - len(features) :],
        )


@lru_cache(maxsize=1024, typed=True)  # typed: default names equal the same names if written
def _plan_of(
    batch: tuple[int, ...],
    contract: tuple[int, ...],
    features: tuple[int, ...],
    shape: tuple[int, ...],
    kernel_axes: Names | None,
    bias_axes: Names | None,
    out_axes: Names | None,
) -> _Plan:
    """The plan for such dims, made once: a model has many layers of the same shape."""
    if kernel_axes is None:
        kernel_axes = names.kernel_names(len(contract), len(features), len(batch))
    if bias_axes is None:
        last = len(batch) + len(contract) + len(features)
        dims = [*range(len(batch)), *range(last - len(features), last)]
        bias_axes = names.like_kernel(None, kernel_axes, dims)
    return _Plan(batch, contract, features, shape, kernel_axes, bias_axes, out_axes)


def canonical_dims(layer: Any, name: str, dims: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """`dims` counted from the front and sorted; those that do not exist are an `AxesError`.

    `layer` is a module, or a text, for the error.

    >>> canonical_dims("layer", "axis", (-1, 1), (2, 3, 4))
    (1, 2)
    """
    given = (dims,) if isinstance(dims, INTEGERS) else tuple(dims)
    counted = _counted(given, len(shape))
    if isinstance(counted, str):
        raise AxesError(layer, name, given, shape, counted)
    return counted


@lru_cache(maxsize=1024)
def _counted(dims: tuple[int, ...], ndim: int) -> tuple[int, ...] | str:
    """`dims` of `ndim` counted from the front and sorted, or what is wrong with them."""
    for d in dims:
        if not -ndim <= d < ndim:
            return f"dim {d} does not exist"
    counted = tuple(sorted(d % ndim for d in dims))
    return counted if len(set(counted)) == len(counted) else "a dim is given twice"


def _as_tuple(given: Any) -> tuple[Any, ...]:
    """The numbers of features, where they are not one plain number."""
    try:
        return (operator.index(given),)  # an array without dims, say
    except TypeError:
        several = isinstance(given, Iterable) and not isinstance(given, str)
        return tuple(given) if several else (given,)


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
    >>> x = jnp.ones((5, 4))
    >>> y, variables = jax.eval_shape(to_heads.init_with_output, jax.random.key(0), x)
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
        init = weights.named(_Flattened(self.kernel_init, plan.kernel_groups), plan.kernel_axes)
        kernel = self.param("kernel", init, plan.kernel_shape, self.param_dtype)
        bias = self._bias(plan) if self.use_bias else None
        x, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        dot = choose_dot_general(self.dot_general, self.dot_general_cls)
        multiply = partial(dot, dimension_numbers=plan.dimension_numbers, precision=self.precision)
        stored = weights.stored_names(self.kernel_init, plan.kernel_axes)
        out = plan.contraction
        y = weights.product(multiply, x, kernel, stored, out, dot)
        if bias is not None:
            y = y + jnp.reshape(bias, plan.bias_against_output)
        return names.output(y, out.names, out.features)

    @nowrap
    def _plan(self, shape: tuple[int, ...]) -> _Plan:
        given = self.features
        features = (given,) if isinstance(given, INTEGERS) else _as_tuple(given)
        for size in features:
            check_sizes(self, features=size)
        batch = canonical_dims(self, "batch_dims", self.batch_dims, shape)
        if batch != tuple(range(len(batch))):
            raise AxesError(
                self, "batch_dims", batch, shape, "they must be the leading dims, 0, 1, ..."
            )
        contract = canonical_dims(self, "axis", self.axis, shape)
        if batch and (both := sorted(set(contract) & set(batch))):
            raise AxesError(
                self, "axis", contract, shape, f"dim {both[0]} is also one of batch_dims={batch}"
            )
        axes = self.kernel_axes, self.bias_axes, self.out_axes
        return _plan_of(batch, contract, features, shape, *axes)

    @nowrap
    def _bias(self, plan: _Plan) -> Array:
        init = weights.named(_Flattened(self.bias_init, plan.bias_groups), plan.bias_axes)
        bias = self.param("bias", init, plan.bias_shape, self.param_dtype)
        return weights.bias_at_use(bias, self.bias_init, plan.bias_axes)
