"""What tells programs apart, or not, without running them: see `expressions.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.core.expressions import Expressions

Program = Callable[[], Any]
X = jnp.arange(6.0).reshape(3, 2)


def equal(a: Program, b: Program) -> bool:
    """True if what two programs return are the same expressions."""
    expressions = Expressions()
    first, second = (expressions.of(jax.make_jaxpr(fn)()) for fn in (a, b))
    return first == second


def scanned(reverse: bool = False, carried: bool = False) -> Any:
    """Products of rows; what does not change is given to the steps, or carried."""
    two = jnp.sin(X[0])

    def given(c: Any, x: Any) -> Any:
        return c * two + x, c

    def handed(c: Any, x: Any) -> Any:
        return (c[0] * c[1] + x, c[1]), c[0]

    if carried:
        (c, _), ys = lax.scan(handed, (X[0], two), X, reverse=reverse)
        return c, ys
    return lax.scan(given, X[0], X, reverse=reverse)


def looped(step: float, swapped: bool = False, bound: float = 9.0) -> Any:
    """Sums until they are large; with the values of the loop in one order or the other."""
    a, b = (1, 0) if swapped else (0, 1)

    def pair(x: Any, y: Any) -> Any:
        return (y, x) if swapped else (x, y)

    def more(c: Any) -> Any:
        return pair(c[a] + step, c[b] * c[a])

    out = lax.while_loop(lambda c: c[a] < bound, more, pair(jnp.sin(1.0), jnp.cos(1.0)))
    return out[a], out[b]


def chosen(first: float, second: float, jit: bool = False) -> Any:
    branches = [lambda x: x * first, lambda x: x - second]
    return lax.cond(X.sum() > 3, *(map(jax.jit, branches) if jit else branches), X)


def drawn(seed: int) -> Any:
    return jax.random.bits(jax.random.clone(jax.random.key(seed)))


SAME: list[tuple[Program, Program]] = [
    (lambda: jnp.sin(X) + 1, lambda: jax.jit(lambda x: jax.jit(jnp.sin)(x) + 1)(X)),
    (lambda: X - jnp.zeros(X.shape), lambda: X),
    (lambda: scanned(), lambda: scanned(carried=True)),
    (lambda: looped(1.0), lambda: looped(1.0, swapped=True)),
    (lambda: chosen(2.0, 3.0), lambda: chosen(2.0, 3.0, jit=True)),
    (
        lambda: jax.grad(lambda x: jax.checkpoint(jnp.sin)(x).sum())(X),
        lambda: jax.grad(lambda x: jnp.sin(x).sum())(X),
    ),
    (
        lambda: drawn(1),
        lambda: drawn(1),
    ),
]
DIFFERENT: list[tuple[Program, Program]] = [
    (lambda: jnp.sin(X), lambda: jnp.cos(X)),
    (lambda: X.sum(0), lambda: X.sum(1)),
    (lambda: X - 1, lambda: 1 - X),
    (lambda: X + 1, lambda: X + 2),
    (lambda: X - jnp.zeros((4, 3, 2)), lambda: X),
    (lambda: X - jnp.ones(X.shape), lambda: X),
    (lambda: scanned(), lambda: scanned(reverse=True)),
    (lambda: looped(1.0), lambda: looped(2.0)),
    (lambda: looped(1.0), lambda: looped(1.0, bound=8.0)),
    (lambda: looped(1.0), lambda: looped(1.0)[::-1]),
    (lambda: chosen(2.0, 3.0), lambda: chosen(3.0, 2.0)),
    (lambda: drawn(1), lambda: drawn(2)),
    (lambda: X.astype(int), lambda: X.astype(bool).astype(int)),
]  # fmt: skip


@pytest.mark.parametrize("pair", SAME)
def test_the_same_operations_on_the_same_operands(pair: tuple[Program, Program]) -> None:
    assert equal(*pair)


@pytest.mark.parametrize("pair", DIFFERENT)
def test_others(pair: tuple[Program, Program]) -> None:
    assert not equal(*pair)
