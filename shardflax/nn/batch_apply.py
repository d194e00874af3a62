"""A function over several leading dims as if they were one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.nn.errors import InputRankError, InputShapeError

__all__ = ["BatchApply"]


@dataclass(frozen=True)
class BatchApply:
    """Calls `f`, a module or a function, with the first `num_dims` dims of its arguments merged.

    All arrays among the arguments, positional and by keyword, that have as many dims are reshaped;
    others go in as they are.  Arrays whose leading dims merge to one size, but are of different
    sizes, are an `InputShapeError`: their elements would meet at random.  All arrays that come out
    get the dims back: their first dim must be the merged one (else an `InputShapeError`).  No array
    of so many dims is an `InputRankError`.

    >>> import jax.numpy as jnp
    >>> row_sums = BatchApply(lambda x: x.sum(axis=1))
    >>> row_sums(jnp.ones((2, 3, 4))).shape
    (2, 3)
    """

    f: Callable[..., Any]
    num_dims: int = 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        merged = [x for x in jax.tree.leaves((args, kwargs)) if jnp.ndim(x) >= self.num_dims]
        if not merged:
            ranks = [jnp.shape(x) for x in jax.tree.leaves((args, kwargs))]
            wanted = f"at least one of {self.num_dims} dims or more (num_dims)"
            raise InputRankError("BatchApply", "inputs", wanted, max(ranks, key=len, default=()))
        leading = jnp.shape(merged[0])[: self.num_dims]
        for x in merged[1:]:
            self._check(leading, jnp.shape(x)[: self.num_dims])
        args, kwargs = jax.tree.map(self._merge, (args, kwargs))
        return jax.tree.map(lambda y: self._split(y, leading), self.f(*args, **kwargs))

    def _check(self, first: tuple[int, ...], other: tuple[int, ...]) -> None:
        if first == other or prod(first) != prod(other):
            return
        dim = next(d for d, (a, b) in enumerate(zip(first, other, strict=True)) if a != b)
        raise InputShapeError(
            "BatchApply",
            "an array",
            dim=dim,
            expected=first[dim],
            found=other[dim],
            why=f"leading dims {first} and {other} would be merged to one size",
        )

    def _merge(self, x: Any) -> Any:
        if jnp.ndim(x) < self.num_dims:
            return x
        shape = jnp.shape(x)
        return jnp.reshape(x, (prod(shape[: self.num_dims]), *shape[self.num_dims :]))

    def _split(self, y: Any, leading: tuple[int, ...]) -> Any:
        found = jnp.shape(y)[0] if jnp.ndim(y) else 1
        if not jnp.ndim(y) or found != prod(leading):
            raise InputShapeError(
                "BatchApply",
                "an output of `f`",
                dim=0,
                expected=prod(leading),
                found=found,
                why=f"the merged dims {leading} of the input",
            )
        return jnp.reshape(y, (*leading, *jnp.shape(y)[1:]))
