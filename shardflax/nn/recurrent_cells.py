"""Recurrent cells with one state: `SimpleCell`, `GRUCell`, `MGUCell`, and the base of all cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import Any

import jax.numpy as jnp

from shardflax.core import compact, nowrap
from shardflax.nn import _names as names
from shardflax.nn import initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn.activation import sigmoid, tanh
from shardflax.nn.errors import CarryShapeError, InputRankError, where
from shardflax.nn.linear import Dense
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Dtype, Initializer, Names
from shardflax.partitioning import default_names

__all__ = [
    "GRUCell",
    "MGUCell",
    "RNNCellBase",
    "SimpleCell",
    "VectorCell",
    "check_state",
    "dense_pair",
    "state_like",
]


class RNNCellBase(LayerBase):
    """The base of recurrent cells: `cell(carry, inputs)` gives `(carry, output)`.

    A cell says how its first carry looks (`initialize_carry`), and how many trailing dims of its
    inputs are features (`num_feature_axes`); the dims before them are the batch's.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class Sum(nn.RNNCellBase):
    ...     @nn.compact
    ...     def __call__(self, carry, x):
    ...         return carry + x, carry + x
    ...
    ...     @nn.nowrap
    ...     def initialize_carry(self, rng, input_shape):
    ...         return jnp.zeros(input_shape)
    ...
    ...     @property
    ...     def num_feature_axes(self):
    ...         return 1
    >>> nn.RNN(Sum()).apply({}, jnp.ones((1, 3, 1)))[0, :, 0].tolist()
    [1.0, 2.0, 3.0]
    """

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """The carry before the first step, for inputs of `input_shape` `(*batch, *features)`."""
        raise NotImplementedError(f"{type(self).__name__} must define `initialize_carry`.")

    @property
    def num_feature_axes(self) -> int:
        """How many trailing dims of an input are features."""
        raise NotImplementedError(f"{type(self).__name__} must define `num_feature_axes`.")


class VectorCell(RNNCellBase):
    """The base of the cells whose states are vectors: the names of their dims, and a first carry.

    >>> import shardflax.nn as nn
    >>> issubclass(nn.GRUCell, VectorCell), issubclass(nn.ConvLSTMCell, VectorCell)
    (True, False)
    """

    kernel_axes: Names = field(default=default_names("embed", "mlp"), kw_only=True)
    recurrent_kernel_axes: Names = field(default=default_names("embed", "mlp"), kw_only=True)
    out_axes: Names | None = field(default=names.FOLLOW, kw_only=True)

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        return state_like(self, rng, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


def state_like(cell: Any, rng: Array, input_shape: tuple[int, ...]) -> Array:
    """A state `(*batch, features)` of a cell, laid out as its outputs are.

    >>> import jax, shardflax.nn as nn
    >>> state_like(nn.GRUCell(3), jax.random.key(0), (2, 5)).shape
    (2, 3)
    """
    check_sizes(cell, features=cell.features)
    state = cell.carry_init(rng, (*input_shape[:-1], cell.features), cell.param_dtype)
    return names.output(state, cell.out_axes, cell.kernel_axes[1:])


def check_state(cell: Any, what: str, state: Any, inputs: Array) -> None:
    """Raises unless a state broadcasts to the batch dims of `inputs`, and has the cell's features.

    >>> import shardflax.nn as nn
    >>> check_state(nn.GRUCell(3), "the carry", jnp.ones((2, 3)), jnp.ones((2, 5)))
    """
    check_sizes(cell, features=cell.features)
    shape = jnp.shape(inputs)
    if not shape:
        raise InputRankError(where(cell), "inputs", "at least 1 dim", shape)
    expected, found = (*shape[:-1], cell.features), jnp.shape(state)
    pairs = zip(reversed(found[:-1]), reversed(shape[:-1]), strict=False)
    if found[-1:] != expected[-1:] or any(1 not in (a, b) and a != b for a, b in pairs):
        raise CarryShapeError(where(cell), what, found, expected, shape)


class SimpleCell(VectorCell):
    """The cell `h' = activation(W_i x + b_i + W_h h)` (Elman, 1990), plus `h` if `residual`.

    Inputs `(*batch, in)` and the carry `(*batch, features)` give carry and output, both
    `(*batch, features)`.  A carry of another shape is a `CarryShapeError`.  Parameters are those
    of the `Dense` layers `i` and `h`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> cell, x = nn.SimpleCell(features=3), jnp.ones((2, 5))
    >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
    >>> (carry, y), variables = jax.eval_shape(cell.init_with_output, jax.random.key(1), carry, x)
    >>> y.shape, sorted(variables["params"])
    ((2, 3), ['h', 'i'])
    """

    features: int
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = initializers.lecun_normal()
    recurrent_kernel_init: Initializer = initializers.orthogonal()
    bias_init: Initializer = initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros
    residual: bool = False

    @compact
    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        check_state(self, "the carry", carry, inputs)
        of_input, of_state = dense_pair(self)
        h = of_input(name="i", bias_init=self.bias_init)(inputs)
        h = h + of_state(name="h", use_bias=False)(carry)
        if self.residual:
            h = h + carry
        h = self.activation_fn(h)
        return h, h


def dense_pair(cell: Any) -> tuple[Callable[..., Dense], Callable[..., Dense]]:
    """How a cell makes its `Dense` layers: of the input, and of the state.

    >>> import shardflax.nn as nn
    >>> of_input, of_state = dense_pair(nn.GRUCell(3))
    >>> of_state(name="h", use_bias=False).features
    3
    """
    layer = partial(
        Dense,
        features=cell.features,
        dtype=cell.dtype,
        param_dtype=cell.param_dtype,
        out_axes=cell.out_axes,
    )
    return (
        partial(layer, kernel_init=cell.kernel_init, kernel_axes=cell.kernel_axes),
        partial(
            layer, kernel_init=cell.recurrent_kernel_init, kernel_axes=cell.recurrent_kernel_axes
        ),
    )


class GRUCell(VectorCell):
    """A gated recurrent unit (arXiv:1412.3555).

    ```
    r = gate(W_ir x + b_ir + W_hr h)        z = gate(W_iz x + b_iz + W_hz h)
    n = activation(W_in x + b_in + r * (W_hn h + b_hn))        h' = (1 - z) * n + z * h
    ```

    Inputs `(*batch, in)` and the carry `(*batch, features)` give carry and output, both
    `(*batch, features)`.  A carry of another shape is a `CarryShapeError`.  Parameters are those
    of the `Dense` layers `ir`, `iz`, `in`, `hr`, `hz` and `hn`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> cell, x = nn.GRUCell(features=3), jnp.ones((2, 5))
    >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
    >>> (carry, y), variables = jax.eval_shape(cell.init_with_output, jax.random.key(1), carry, x)
    >>> y.shape, sorted(variables["params"])
    ((2, 3), ['hn', 'hr', 'hz', 'in', 'ir', 'iz'])
    """

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = initializers.lecun_normal()
    recurrent_kernel_init: Initializer = initializers.orthogonal()
    bias_init: Initializer = initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros

    @compact
    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        check_state(self, "the carry", carry, inputs)
        of_input, of_state = dense_pair(self)
        of_input = partial(of_input, bias_init=self.bias_init)

        def gate(name: str) -> Array:
            total = of_input(name="i" + name)(inputs)
            return self.gate_fn(total + of_state(name="h" + name, use_bias=False)(carry))

        reset, keep = gate("r"), gate("z")
        new = of_input(name="in")(inputs)
        new = new + reset * of_state(name="hn", bias_init=self.bias_init)(carry)
        new = self.activation_fn(new)
        h = (1.0 - keep) * new + keep * carry
        return h, h


class MGUCell(VectorCell):
    """A minimal gated unit (arXiv:1603.09420): its one gate forgets and, with `reset_gate`, resets.

    ```
    f = gate(W_if x + b_if + W_hf h)        h' = (1 - f) * n + f * h
    n = activation(W_in x + b_in + f * (W_hn h + b_hn))        with `reset_gate`, else
    n = activation(W_in x + b_in + W_hn h)
    ```

    Inputs `(*batch, in)` and the carry `(*batch, features)` give carry and output, both
    `(*batch, features)`.  A carry of another shape is a `CarryShapeError`.  Parameters are those
    of the `Dense` layers `if`, `in`, `hf` and `hn`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> cell, x = nn.MGUCell(features=3), jnp.ones((2, 5))
    >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
    >>> (carry, y), variables = jax.eval_shape(cell.init_with_output, jax.random.key(1), carry, x)
    >>> y.shape, sorted(variables["params"])
    ((2, 3), ['hf', 'hn', 'if', 'in'])
    """

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = initializers.lecun_normal()
    recurrent_kernel_init: Initializer = initializers.orthogonal()
    forget_bias_init: Initializer = initializers.ones
    activation_bias_init: Initializer = initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros
    reset_gate: bool = True

    @compact
    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        check_state(self, "the carry", carry, inputs)
        of_input, of_state = dense_pair(self)
        forget = of_input(name="if", bias_init=self.forget_bias_init)(inputs)
        forget = self.gate_fn(forget + of_state(name="hf", use_bias=False)(carry))
        of_new = of_state(name="hn", use_bias=self.reset_gate, bias_init=self.activation_bias_init)(
            carry
        )
        if self.reset_gate:
            of_new = of_new * forget
        new = of_input(name="in", bias_init=self.activation_bias_init)(inputs) + of_new
        h = (1.0 - forget) * self.activation_fn(new) + forget * carry
        return h, h
