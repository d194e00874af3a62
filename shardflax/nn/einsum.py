"""`Einsum`: a linear map written as an einsum equation."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp

from shardflax import partitioning
from shardflax.core import compact
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import dtypes, initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn.errors import EinsumError, InputRankError, InputShapeError, where
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Dtype, Initializer, Names, Precision
from shardflax.partitioning import default_names

__all__ = ["Einsum"]


@dataclass(frozen=True)
class _Equation:
    """The labels of an equation `inputs,kernel->output`, the ellipsis spelled out."""

    inputs: str
    kernel: str
    output: str

    @property
    def shared(self) -> list[int]:
        """The kernel's dims that the output has too, in the order of the output."""
        return [self.kernel.index(c) for c in self.output if c in self.kernel]

    def check(self, place: Any, inputs: Sequence[int], kernel: Sequence[int]) -> None:
        """Raises unless both operands have the same size where they have the same label."""
        for dim, (label, found) in enumerate(zip(self.inputs, inputs, strict=True)):
            expected = kernel[self.kernel.index(label)] if label in self.kernel else found
            if 1 not in (found, expected) and found != expected:
                why = f"{label!r} of the kernel in the equation"
                raise InputShapeError(
                    place, "inputs", dim=dim, expected=expected, found=found, why=why
                )

    def broadcast(self, kernel_shape: Sequence[int]) -> list[int]:
        """The shape in which a bias over the shared dims is added to the output."""
        return [kernel_shape[self.kernel.index(c)] if c in self.kernel else 1 for c in self.output]

    def kernel_names(self) -> Names:
        """Default names: dims that are summed over are inputs, those shared by all three batch."""
        ins = [c for c in self.kernel if c in self.inputs and c not in self.output]
        outs = [c for c in self.kernel if c not in self.inputs]
        batch = [c for c in self.kernel if c in self.inputs and c in self.output]
        given = names.kernel_names(len(ins), len(outs), len(batch))
        by_label = dict(zip([*batch, *ins, *outs], given, strict=True))
        return default_names(*[by_label[c] for c in self.kernel])


@lru_cache(maxsize=256)
def _parse(place: str, equation: str, shape: tuple[int, ...], kernel_ndim: int) -> _Equation:
    """The labels of `equation`, for inputs of this shape and a kernel of this rank."""
    text = equation.replace(" ", "")
    if text.count("->") != 1:
        raise EinsumError(
            place, f"the equation {equation!r} must say its output, once, after '->'."
        )
    left, output = text.split("->")
    if left.count(",") != 1:
        raise EinsumError(place, f"{equation!r} must have two operands: 'inputs,kernel->output'.")
    inputs, kernel = left.split(",")
    if any("." in term.replace("...", "", 1) for term in (inputs, kernel, output)):
        raise EinsumError(place, f"{equation!r} has dots that are not one '...' of an operand.")
    of_inputs, of_kernel = _by_ellipsis(inputs, len(shape)), _by_ellipsis(kernel, kernel_ndim)
    if of_inputs is None:
        raise InputRankError(place, "inputs", f"those of {inputs!r}", shape)
    if of_kernel is None:
        dims = len(kernel.replace("...", ""))
        raise EinsumError(
            place, f"{equation!r} wants a kernel of {dims} dims, shape has {kernel_ndim}."
        )
    # Dims of the ellipsis are counted from its end, as those of arrays that broadcast.
    free = [c for c in string.ascii_letters if c not in text][: max(of_inputs, of_kernel)]
    spelled = _Equation(
        inputs.replace("...", "".join(free[len(free) - of_inputs :])),
        kernel.replace("...", "".join(free[len(free) - of_kernel :])),
        output.replace("...", "".join(free)),
    )
    for label in spelled.output:
        if label not in spelled.inputs + spelled.kernel or spelled.output.count(label) > 1:
            raise EinsumError(
                place, f"{equation!r}: {label!r} of the output is in no operand, or stands twice."
            )
    return spelled


def _by_ellipsis(term: str, ndim: int) -> int | None:
    """How many of the dims of an operand its ellipsis stands for; None if the rank is wrong."""
    extra = ndim - len(term.replace("...", ""))
    return None if extra < 0 or (extra and "..." not in term) else extra


class Einsum(LayerBase):
    """A linear map `jnp.einsum(einsum_str, inputs, kernel) + bias` with a kernel of `shape`.

    The bias has the kernel's dims that the output has too.  The equation is given to the layer or
    to the call, exactly once, in the explicit form with `->`; anything else is an `EinsumError`.

    `kernel_axes=None` names the kernel by what its dims do, as `DenseGeneral` does.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.Einsum((4, 2, 3), "...d,dhk->...hk")
    >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((5, 4)))
    >>> y.shape, variables["params"]["bias"].shape
    ((5, 2, 3), (2, 3))
    """

    shape: Sequence[int]
    einsum_str: str | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Precision = None
    kernel_init: Initializer = initializers.lecun_normal()
    bias_init: Initializer = initializers.zeros
    promote_dtype: Any = dtypes.promote_dtype
    preferred_element_type: Dtype | None = None
    kernel_axes: Names | None = field(default=None, kw_only=True)
    bias_axes: Names | None = field(default=None, kw_only=True)
    out_axes: Names | None = field(default=names.FOLLOW, kw_only=True)

    @compact
    def __call__(self, inputs: Array, einsum_str: str | None = None) -> Array:
        for size in self.shape:
            check_sizes(self, shape=size)
        text = self._equation(einsum_str)
        equation = _parse(where(self), text, jnp.shape(inputs), len(self.shape))
        equation.check(self, jnp.shape(inputs), self.shape)
        axes = equation.kernel_names() if self.kernel_axes is None else self.kernel_axes
        init = partitioning.named(self.kernel_init, axes)
        kernel = self.param("kernel", init, tuple(self.shape), self.param_dtype)
        bias = self._bias(equation, axes) if self.use_bias else None
        x, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        multiply = partial(
            jnp.einsum,
            text,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        stored = weights.stored_names(self.kernel_init, axes)
        out = self._contraction(equation, axes)
        y = weights.product(multiply, x, kernel, stored, out)
        if bias is not None:
            y = y + jnp.reshape(bias, equation.broadcast(kernel.shape))
        return names.output(y, out.names, out.features)

    def _equation(self, einsum_str: str | None) -> str:
        given = [text for text in (self.einsum_str, einsum_str) if text is not None]
        if len(given) != 1:
            problem = "nowhere" if not given else "to the layer and to the call"
            raise EinsumError(where(self), f"`einsum_str` was passed {problem}; pass it once.")
        return given[0]

    def _bias(self, equation: _Equation, kernel_axes: Names) -> Array:
        axes = self.bias_axes
        if axes is None:
            axes = names.like_kernel(None, kernel_axes, equation.shared)
        shape = tuple(self.shape[d] for d in equation.shared)
        init = partitioning.named(self.bias_init, axes)
        bias = self.param("bias", init, shape, self.param_dtype)
        return weights.bias_at_use(bias, self.bias_init, axes)

    def _contraction(self, equation: _Equation, axes: Names) -> weights.Contraction:
        """Default output names only where the output ends in the kernel's own dims."""
        last = [equation.kernel.index(c) for c in equation.output if c not in equation.inputs]
        tail = equation.output[len(equation.output) - len(last) :]
        follows = not any(c in equation.inputs for c in tail)
        out_axes = self.out_axes if follows or not names.is_default(self.out_axes) else None
        return weights.Contraction(
            equation.inputs, equation.kernel, equation.output, out_axes, [axes[d] for d in last]
        )
