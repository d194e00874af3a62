"""The oracle: one model source, run on Linen and on ours.

A *program* is a function of a namespace `nn`; what it returns is compared bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import flax.core
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import random as jex_random
from jax.extend.core import jaxpr_as_fun

from shardflax import core, partitioning
from shardflax.core import run
from tests.core.expressions import Expressions

__all__ = [
    "OURS",
    "THEIRS",
    "both",
    "layers",
    "quick_key",
    "registry",
    "same",
    "same_arrays",
    "same_error",
]

Program = Callable[[Any], Any]


# --- keys of a generator that compiles in no time; the programs are about which keys are drawn


def _mix(x: Any, data: Any) -> Any:
    x = (x ^ data) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 15)) * jnp.uint32(0x85EBCA77)
    return x ^ (x >> 13)


def _numbered(key: Any, shape: Any, salt: int) -> Any:
    return _mix(key, jnp.arange(salt, salt + math.prod(shape), dtype=jnp.uint32))


def _bits(key: Any, width: int, shape: Any) -> Any:
    bits = _numbered(key, shape, 7777).reshape(shape).astype(f"uint{width}")
    return bits << 32 | bits if width == 64 else bits


_QUICK = jex_random.define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: _mix(jnp.uint32(1), jnp.asarray(seed).astype(jnp.uint32)).reshape(1),
    split=lambda key, shape: _numbered(key, shape, 77).reshape(*shape, 1),
    random_bits=_bits,
    fold_in=lambda key, data: _mix(key, jnp.asarray(data).astype(jnp.uint32)),
    name="quick",
)


def quick_key(seed: int) -> jax.Array:
    """A key whose numbers are poor and whose operations compile quickly."""
    return jax.random.key(seed, impl=_QUICK)


def namespace(base: Any, lift: Any) -> SimpleNamespace:
    """`base` with the few small layers that the programs use, written once for both."""
    nn = SimpleNamespace(**{n: getattr(base, n) for n in dir(base) if not n.startswith("__")})
    for name, layer in {"In": lift.In, "Out": lift.Out, **layers(nn)}.items():
        setattr(nn, name, layer)
    return nn


def layers(nn: Any) -> dict[str, Any]:
    """A few layers of our own, so that the core is tested without those of `nn`."""

    def uniform(key: Any, shape: Any) -> Any:
        return jax.random.uniform(key, shape)

    def zeros(key: Any, shape: Any) -> Any:
        return jnp.zeros(shape)

    class Lin(nn.Module):
        features: int = 3
        kernel_init: Any = uniform
        use_bias: bool = True

        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
            return y + self.param("bias", zeros, (self.features,)) if self.use_bias else y

    class Drop(nn.Module):
        stream: str = "dropout"

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x + uniform(self.make_rng(self.stream), x.shape)

    class Count(nn.Module):
        """Counts its calls, and keeps a running sum of its inputs."""

        @nn.compact
        def __call__(self, x: Any) -> Any:
            count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
            total = self.variable("state", "total", jnp.zeros, x.shape)
            if not self.is_initializing():
                count.value += 1
                total.value += x
            return x + total.value

    class Sow(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            self.sow("intermediates", "x", x)
            return x * 2

    found = (Lin, Drop, Count, Sow)
    return {"uniform": uniform, "zeros": zeros, **{c.__name__: c for c in found}}


THEIRS = namespace(linen, flax.core.lift)
OURS = namespace(
    SimpleNamespace(
        **{n: getattr(partitioning, n) for n in partitioning.__all__},
        **{n: getattr(core, n) for n in core.__all__ if n not in run.__all__},
        **{n: getattr(run, n) for n in run.__all__},
    ),
    core,
)


def plain(tree: Any) -> Any:
    """`tree` in types that both libraries share."""
    if hasattr(tree, "replace_boxed"):
        return ("box", getattr(tree, "names", None), plain(tree.value))
    if isinstance(tree, Mapping):
        return {k: plain(v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(*map(plain, tree)) if hasattr(tree, "_fields") else [*map(plain, tree)]
    if isinstance(tree, jax.Array) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(tree)
    return tree


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal, with the same shapes, dtypes and structure; `where` leads there in messages."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and sorted(ours) == sorted(theirs), (where, ours, theirs)
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple) and len(ours) == len(theirs), (where, ours, theirs)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    elif hasattr(theirs, "dtype"):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), where
        if not isinstance(theirs, jax.ShapeDtypeStruct):
            np.testing.assert_array_equal(ours, theirs, err_msg=where)
    else:
        assert ours == theirs, where


def same(program: Program) -> Any:
    """Runs a program on both, asserts that it gives the same, and returns ours."""
    theirs = program(THEIRS)
    ours = program(OURS)
    assert_equal(plain(ours), plain(theirs))
    return ours


def same_arrays(program: Program, ours: Any = OURS, theirs: Any = THEIRS) -> None:
    """`same` for a program that returns arrays alone.

    Where both do the same operations on the same operands nothing is compiled.  Where they do
    not, they run one operation at a time: of a program that is compiled as a whole the last bit is
    up to XLA, and changes with what the process compiled before.
    """
    traced = [
        jax.make_jaxpr(lambda nn=nn: plain(program(nn)), return_shape=True)()
        for nn in (ours, theirs)
    ]
    (our, our_shapes), (their, their_shapes) = traced
    assert_equal(our_shapes, their_shapes)
    expressions = Expressions()
    if expressions.of(our) != expressions.of(their):
        values = (jaxpr_as_fun(closed)() for closed in (our, their))
        assert_equal(*(jax.tree.unflatten(jax.tree.structure(our_shapes), v) for v in values))


def both(model: Any, *args: Any, mutable: Any = ("state", "intermediates")) -> Any:
    """init, and apply with its state."""
    y, variables = model.init_with_output({"params": quick_key(7), "dropout": quick_key(8)}, *args)
    rngs = {"dropout": quick_key(9)}
    return y, variables, model.apply(variables, *args, rngs=rngs, mutable=list(mutable))


def same_error(program: Program, name: str) -> str:
    """Asserts that both raise an error of the class `name`; returns our message."""
    with pytest.raises(Exception) as theirs:
        program(THEIRS)
    assert type(theirs.value).__name__ == name, repr(theirs.value)
    with pytest.raises(Exception) as ours:
        program(OURS)
    assert type(ours.value).__name__ == name, ours.value
    return str(ours.value)


def registry() -> tuple[Callable[[Program], Program], list[Any]]:
    """A decorator that collects programs, and the list for `pytest.mark.parametrize`."""
    programs: list[Any] = []

    def register(program: Program) -> Program:
        programs.append(pytest.param(program, id=program.__name__))
        return program

    return register, programs
