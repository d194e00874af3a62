"""`ConvLSTMCell`: long short-term memory of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.core import compact, nowrap
from shardflax.nn import initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn._windows import BATCH_FIRST
from shardflax.nn.activation import sigmoid, tanh
from shardflax.nn.conv import Conv
from shardflax.nn.errors import CarryShapeError, InputRankError, where
from shardflax.nn.recurrent_cells import RNNCellBase
from shardflax.nn.types import Array, Dtype, Initializer, Names
from shardflax.partitioning import default_names

__all__ = ["ConvLSTMCell"]


class ConvLSTMCell(RNNCellBase):
    """A convolutional long short-term memory cell (arXiv:1506.04214, without peepholes).

    ```
    i, g, f, o = W_i * x + b_i + W_h * h + b_h         (convolutions, split along the features)
    c' = sigmoid(f + 1) c + sigmoid(i) tanh(g)          h' = sigmoid(o) tanh(c')
    ```

    Inputs `(*batch, *spatial, in)`, with as many spatial dims as `kernel_size` has, and the carry
    `(c, h)`, both `(*batch, *spatial, features)`, give the carry `(c', h')` and the output
    `h'`.  A state of another shape is a `CarryShapeError`.  Parameters are those of the `Conv`
    layers `ih` and `hh`, each with `4 * features` outputs.  By default these outputs have no name:
    spread over devices, whole gates would lie on some of them, and be sent around at each step.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> cell, x = nn.ConvLSTMCell(features=3, kernel_size=(3, 3)), jnp.ones((2, 4, 4, 1))
    >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
    >>> (carry, y), variables = jax.eval_shape(cell.init_with_output, jax.random.key(1), carry, x)
    >>> y.shape, variables["params"]["hh"]["kernel"].shape
    ((2, 4, 4, 3), (3, 3, 3, 12))
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] | None = None
    padding: str | Sequence[tuple[int, int]] = "SAME"
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros
    kernel_axes: Names | None = field(default=None, kw_only=True)
    recurrent_kernel_axes: Names | None = field(default=None, kw_only=True)
    out_axes: Names | None = field(default=BATCH_FIRST, kw_only=True)

    @compact
    def __call__(
        self, carry: tuple[Array, Array], inputs: Array
    ) -> tuple[tuple[Array, Array], Array]:
        c, h = carry
        check_sizes(self, features=self.features)
        self._check(c, h, inputs)
        layer = partial(
            Conv,
            features=4 * self.features,
            kernel_size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            out_axes=self.out_axes,
        )
        spatial = [None] * len(self.kernel_size)
        of_input = self.kernel_axes or default_names(*spatial, None, None)
        of_state = self.recurrent_kernel_axes or default_names(*spatial, "embed", None)
        gates = layer(name="ih", kernel_axes=of_input)(inputs)
        of_h = layer(name="hh", kernel_axes=of_state)(h)
        # Strides and padding decide which size a state has.
        for what, found in (("`c` of the carry", c), ("`h` of the carry, convolved,", of_h)):
            self._check_places(what, jnp.shape(found), gates.shape, jnp.shape(inputs))
        gates = gates + of_h
        i, g, f, o = jnp.split(gates, 4, axis=-1)
        c = sigmoid(f + 1) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        return (c, h), h

    @nowrap
    def _check(self, c: Array, h: Array, inputs: Array) -> None:
        shape = jnp.shape(inputs)
        if len(shape) < self.num_feature_axes:
            dims = f"(*batch, *spatial, in) with {len(self.kernel_size)} spatial dims"
            raise InputRankError(where(self), "inputs", dims, shape)
        expected = (*shape[:-1], self.features)
        for what, state in (("`c` of the carry", c), ("`h` of the carry", h)):
            if jnp.shape(state)[-1:] != expected[-1:] or jnp.ndim(state) > len(expected):
                raise CarryShapeError(where(self), what, jnp.shape(state), expected, shape)

    @nowrap
    def _check_places(self, what: str, found: Any, gates: Any, inputs: Any) -> None:
        """Raises unless a state broadcasts to the batch and the places of the gates."""
        pairs = zip(reversed(found[:-1]), reversed(gates[:-1]), strict=False)
        if any(1 not in (a, b) and a != b for a, b in pairs):
            raise CarryShapeError(where(self), what, found, (*gates[:-1], found[-1]), inputs)

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> tuple[Array, Array]:
        check_sizes(self, features=self.features)
        shape = (*input_shape[:-1], self.features)
        of_c, of_h = jax.random.split(rng)
        return (
            self.carry_init(of_c, shape, self.param_dtype),
            self.carry_init(of_h, shape, self.param_dtype),
        )

    @property
    def num_feature_axes(self) -> int:
        return len(self.kernel_size) + 1
