"""Modules that share what they have: one scope for two of them."""

from __future__ import annotations

from shardflax.core.module import Module
from shardflax.core.module_errors import CallShareScopeOnUnboundModuleError

__all__ = ["share_scope"]


def share_scope(module: Module, other: Module, /) -> None:
    """Lets two modules have one scope: their variables are siblings, under one path.

    To be called in `setup`.  If `other` lies below `module`, it moves up; otherwise `module` moves
    to the place of `other`.  A name still stands for one thing.

    Raises `CallShareScopeOnUnboundModuleError` if one of them is not bound.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class WithScale(nn.Module):
    ...     base: nn.Module
    ...
    ...     def setup(self):
    ...         nn.share_scope(self, self.base)
    ...
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return self.base(x) * self.param("scale", nn.initializers.ones, (2,))
    >>> params = WithScale(nn.Dense(2)).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    >>> sorted(params)
    ['bias', 'kernel', 'scale']
    """
    for found in (module, other):
        if found.scope is None:
            raise CallShareScopeOnUnboundModuleError(type(found).__name__)
    here, there = module._bound(), other._bound()  # pyright: ignore[reportPrivateUsage]
    below = there.store is here.store and there.below[: len(here.below)] == here.below
    moving, place = (other, here) if below else (module, there)
    moving._move(place.beside())  # pyright: ignore[reportPrivateUsage]
