"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shardflax.core import Module, compact
from shardflax.nn.errors import ContainerError, where

__all__ = ["Sequential"]


class Sequential(Module):
    """Calls `layers` (modules or functions) one after the other.

    A tuple becomes the positional arguments of the next layer, a dict its keyword arguments.  No
    layers, or something else than a sequence, is a `ContainerError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    >>> y, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 3)))
    >>> y.shape, sorted(variables["params"])
    ((1, 2), ['layers_0', 'layers_2'])
    """

    layers: Sequence[Callable[..., Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence):
            found = type(self.layers).__name__
            raise ContainerError("Sequential", f"`layers` must be a sequence, found {found}.")
        super().__post_init__()

    @compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layers:
            raise ContainerError(where(self), "`layers` is empty.")
        out = self.layers[0](*args, **kwargs)
        for layer in self.layers[1:]:
            if isinstance(out, tuple):
                out = layer(*out)
            elif isinstance(out, dict):
                out = layer(**out)
            else:
                out = layer(out)
        return out
