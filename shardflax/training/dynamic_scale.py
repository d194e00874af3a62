"""Loss scaling: gradients in float16 that neither vanish nor overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shardflax import struct

__all__ = ["DynamicScale", "DynamicScaleResult"]

_LARGEST, _SMALLEST = np.finfo(np.float32).max, np.finfo(np.float32).tiny


class DynamicScaleResult(NamedTuple):
    """What `DynamicScale.value_and_grad` finds; `finite` is a bool without dims.

    >>> DynamicScaleResult(DynamicScale(), True, aux=2.0, grad=1.0).finite
    True
    """

    dynamic_scale: DynamicScale
    finite: Any
    aux: Any
    grad: Any


class DynamicScale(struct.PyTreeNode):
    """The factor by which a loss is multiplied before it is differentiated, and gradients divided.

    Whenever a gradient is not finite, the factor is multiplied by `backoff_factor`, down to
    `minimum_scale` (None: without end); after `growth_interval` gradients in a row that are
    finite, by `growth_factor`.  `fin_steps` counts them.  An update with gradients that are not
    finite is the caller's to leave out.

    Source: Micikevicius et al., "Mixed Precision Training" (2018), section 3.2.

    >>> scale, finite, loss, grad = DynamicScale(scale=8.0).value_and_grad(lambda x: x * x)(3.0)
    >>> bool(finite), float(loss), float(grad), float(scale.scale)
    (True, 9.0, 6.0, 8.0)
    """

    growth_factor: float = struct.field(pytree_node=False, default=2.0)
    backoff_factor: float = struct.field(pytree_node=False, default=0.5)
    growth_interval: int = struct.field(pytree_node=False, default=2000)
    fin_steps: int | jax.Array = 0
    scale: float | jax.Array = 65536.0
    minimum_scale: float | None = struct.field(pytree_node=False, default=_SMALLEST)

    def value_and_grad(
        self,
        fun: Callable[..., Any],
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        axis_name: str | None = None,
    ) -> Callable[..., DynamicScaleResult]:
        """`jax.value_and_grad` of `fun` by way of the scaled loss, as a `DynamicScaleResult`.

        Its `aux` is the loss, or with `has_aux` the loss and what else `fun` returns.  Under
        `jax.pmap`, `jax.vmap` and `jax.shard_map`, gradients are averaged over `axis_name`.

        >>> found = DynamicScale().value_and_grad(lambda x: x / 0)(1.0)
        >>> bool(found.finite), float(found.dynamic_scale.scale)
        (False, 32768.0)
        """

        def scaled(*args: Any) -> Any:
            if has_aux:
                loss, aux = fun(*args)
                return self.scale * loss, aux
            return self.scale * fun(*args)

        of_scaled = jax.value_and_grad(scaled, argnums, has_aux)

        def value_and_grad(*args: Any) -> DynamicScaleResult:
            found, grad = of_scaled(*args)
            aux = (found[0] / self.scale, found[1]) if has_aux else found / self.scale
            scale = jnp.asarray(self.scale, jnp.float32)
            grad = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32) / scale, grad)
            if axis_name is not None:
                grad = lax.pmean(grad, axis_name)
            finite = _finite(grad)
            return DynamicScaleResult(self._next(finite), finite, aux, grad)

        return value_and_grad

    def _next(self, finite: jax.Array) -> DynamicScale:
        """The state after gradients of which it is known whether they are finite."""
        full = jnp.equal(self.fin_steps, self.growth_interval)
        larger = jnp.minimum(self.scale * self.growth_factor, _LARGEST)
        smaller = self.scale * self.backoff_factor
        if self.minimum_scale is not None:
            smaller = jnp.maximum(smaller, self.minimum_scale)
        scale = jnp.where(finite, jnp.where(full, larger, self.scale), smaller)
        steps = jnp.where(finite & ~full, self.fin_steps + 1, 0)
        return self.replace(fin_steps=steps, scale=scale)


def _finite(grad: Any) -> jax.Array:
    """True if all elements of all leaves are."""
    found = jnp.asarray(True)
    for leaf in jax.tree.leaves(grad):
        found &= jnp.all(lax.is_finite(leaf))
    return found
