"""Long short-term memory: `LSTMCell` and `OptimizedLSTMCell`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardflax import partitioning
from shardflax.core import compact, nowrap
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import dtypes, initializers
from shardflax.nn.activation import sigmoid, tanh
from shardflax.nn.policy import LayerBase
from shardflax.nn.recurrent_cells import VectorCell, check_state, dense_pair, state_like
from shardflax.nn.types import Array, Dtype, Initializer, Names
from shardflax.partitioning import default_names
from shardflax.partitioning.scope import mesh_in_scope

__all__ = ["LSTMCell", "OptimizedLSTMCell"]

GATES = ("i", "f", "g", "o")


class LSTMCell(VectorCell):
    """A long short-term memory cell (Hochreiter and Schmidhuber, 1997).

    ```
    i = gate(W_ii x + W_hi h + b_hi)        f = gate(W_if x + W_hf h + b_hf)
    g = activation(W_ig x + W_hg h + b_hg)  o = gate(W_io x + W_ho h + b_ho)
    c' = f * c + i * g                      h' = o * activation(c')
    ```

    Inputs `(*batch, in)` and the carry `(c, h)`, both `(*batch, features)`, give the carry
    `(c', h')` and the output `h'`.  A state of another shape is a `CarryShapeError`.  Parameters
    are those of the `Dense` layers `ii`, `if`, `ig`, `io` (no bias), `hi`, `hf`, `hg` and `ho`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> cell, x = nn.LSTMCell(features=3), jnp.ones((2, 5))
    >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
    >>> (carry, y), variables = jax.eval_shape(cell.init_with_output, jax.random.key(1), carry, x)
    >>> y.shape, variables["params"]["ii"]["kernel"].shape
    ((2, 3), (5, 3))
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
    def __call__(
        self, carry: tuple[Array, Array], inputs: Array
    ) -> tuple[tuple[Array, Array], Array]:
        c, h = self._states(carry, inputs)
        of_input, of_state = dense_pair(self)
        of_state = partial(of_state, bias_init=self.bias_init)

        def total(gate: str) -> Array:
            return of_input(name="i" + gate, use_bias=False)(inputs) + of_state(name="h" + gate)(h)

        return self._step(c, *map(total, GATES))

    @nowrap
    def _states(self, carry: Any, inputs: Array) -> tuple[Array, Array]:
        c, h = carry
        check_state(self, "`c` of the carry", c, inputs)
        check_state(self, "`h` of the carry", h, inputs)
        return c, h

    @nowrap
    def _step(
        self, c: Array, i: Array, f: Array, g: Array, o: Array
    ) -> tuple[tuple[Array, Array], Array]:
        """The new states, from the sums that go into the gates."""
        kept = self.gate_fn(f) * c
        c = kept + self.gate_fn(i) * self.activation_fn(g)
        h = self.gate_fn(o) * self.activation_fn(c)
        return (c, h), h

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> tuple[Array, Array]:
        of_c, of_h = jax.random.split(rng)
        return state_like(self, of_c, input_shape), state_like(self, of_h, input_shape)


class _Gate(LayerBase):
    """The parameters of one `Dense` layer, which are used together with those of others."""

    features: int
    kernel_init: Initializer
    kernel_axes: Names
    param_dtype: Dtype
    bias_init: Initializer | None = None

    @compact
    def __call__(self, width: int) -> tuple[Array, Array | None]:
        init = partitioning.named(self.kernel_init, self.kernel_axes)
        kernel = self.param("kernel", init, (width, self.features), self.param_dtype)
        if self.bias_init is None:
            return kernel, None
        axes = names.like_kernel(None, self.kernel_axes, [-1])
        init = partitioning.named(self.bias_init, axes)
        return kernel, self.param("bias", init, (self.features,), self.param_dtype)


class OptimizedLSTMCell(LSTMCell):
    """`LSTMCell` with one product for the input and one for the state, instead of four each.

    The parameters are the same.  On a mesh the kernels are stacked along a new dim, not put side
    by side, so each stays where its features are.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> cell, x = nn.OptimizedLSTMCell(features=3), jnp.ones((2, 5))
    >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
    >>> (carry, y), variables = jax.eval_shape(cell.init_with_output, jax.random.key(1), carry, x)
    >>> y.shape, sorted(variables["params"])
    ((2, 3), ['hf', 'hg', 'hi', 'ho', 'if', 'ig', 'ii', 'io'])
    """

    @compact
    def __call__(
        self, carry: tuple[Array, Array], inputs: Array
    ) -> tuple[tuple[Array, Array], Array]:
        c, h = self._states(carry, inputs)
        of_state = self._products(
            "h", h, self.recurrent_kernel_init, self.recurrent_kernel_axes, self.bias_init
        )
        of_input = self._products("i", inputs, self.kernel_init, self.kernel_axes, None)
        totals = (a + b for a, b in zip(of_state, of_input, strict=True))
        return self._step(c, *totals)

    @nowrap
    def _products(
        self, of: str, x: Array, kernel_init: Initializer, axes: Names, bias_init: Any
    ) -> list[Array]:
        """What the gates get from `x`, in the order of `GATES`."""
        gates = [
            _Gate(self.features, kernel_init, axes, self.param_dtype, bias_init, name=of + g)
            for g in GATES
        ]
        kernels, biases = zip(*[gate(jnp.shape(x)[-1]) for gate in gates], strict=True)
        x, *found = dtypes.promote_dtype(x, *kernels, *biases, dtype=self.dtype)
        kernels, biases = found[: len(GATES)], found[len(GATES) :]
        if mesh_in_scope() is None:
            return _side_by_side(x, kernels, biases)
        parts = _stacked(x, kernels, biases, weights.stored_names(kernel_init, axes))
        return [names.output(part, self.out_axes, axes[1:]) for part in parts]


def _side_by_side(x: Array, kernels: Sequence[Any], biases: Sequence[Any]) -> list[Array]:
    """`x` times each kernel, as one product with all of them beside one another.

    So does Linen, and so gradients are summed in its order, to the last bit.
    """
    y = jnp.dot(x, jnp.concatenate(kernels, axis=-1))
    if biases[0] is not None:
        y = y + jnp.reshape(jnp.concatenate(biases), (1,) * (y.ndim - 1) + (-1,))
    return jnp.split(y, len(GATES), axis=-1)


def _stacked(
    x: Array, kernels: Sequence[Any], biases: Sequence[Any], stored: Names | None
) -> list[Array]:
    """`x` times each kernel, as one product in which the gates have a dim of their own.

    Beside one another, features that are spread over devices would have to move.
    """
    last = x.ndim - 1
    mapped = tuple(range(last))
    dims = weights.Contraction((*mapped, last), (last, "gate", "f"), (*mapped, "gate", "f"))
    multiply = partial(lax.dot_general, dimension_numbers=(((last,), (0,)), ((), ())))
    kernels = [partitioning.at_use(kernel, stored) for kernel in kernels]
    y = weights.product(multiply, x, jnp.stack(kernels, axis=-2), _of_stack(stored), dims)
    if biases[0] is not None:
        y = y + jnp.reshape(jnp.stack(biases), (1,) * last + y.shape[last:])
    return [y[..., gate, :] for gate in range(len(GATES))]


def _of_stack(stored: Names | None) -> Names | None:
    """The names of a stack of kernels, from those of one."""
    if stored is None:
        return None
    of_all = stored[0], None, stored[1]
    return default_names(*of_all) if names.is_default(stored) else of_all
