"""What a row of the matrix is, and the helpers by which rows are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shardflax.nn as nn
from tests.core.harness import quick_key

__all__ = [
    "BATCH",
    "LEARNED",
    "LENGTH",
    "WIDTH",
    "Row",
    "floats",
    "hidden",
    "ids",
    "layers_of",
    "maker",
]

# Sizes that every mesh of the tests divides.
BATCH, LENGTH, WIDTH = 8, 4, 8

WRITTEN = ("cache", "batch_stats")
"""The collections that layers write when they are called."""

LEARNED = ("params", "_overwrite_with_gradient")
"""The collections that gradients are taken to."""


@dataclass(frozen=True, eq=False)
class Row:
    """One layer with one set of arguments: built from either namespace, ours or Flax's.

    A name `Layer-what` is a further row of `Layer`: expensive columns leave it out.  Inputs and
    outputs may be trees; complex ones are fine.
    """

    name: str
    make: Callable[..., Any]
    """`make(namespace, **options)` builds the layer; options are `dtype`, `param_dtype`."""
    inputs: Callable[[], tuple[Any, ...]]
    """The positional arguments of the call."""
    call: dict[str, Any] = field(default_factory=dict)
    """The keyword arguments of the call, `method` too."""
    streams: tuple[str, ...] = ()
    """Random streams that the call draws from."""
    like_flax: bool = True
    """Flax has this layer, with these arguments: values must be equal bit for bit."""
    has_dtype: bool = True
    """The layer takes `dtype` and `param_dtype`, and `dtype` is that of all it returns."""
    halves: tuple[str, ...] = ("bfloat16", "float16", "narrow")
    """The half precisions that this backend computes the layer in; narrow: bfloat16 parameters."""
    divides: bool = True
    """The meshes of the tests divide all parameters, as their default names want it."""
    batched: bool = True
    """The first dim of all inputs is the batch, which outputs have too."""
    over_weights: bool = False
    """Statistics of the weights are taken, so their sharded dims are summed over."""
    over_batch: bool = False
    """Elements of the batch see one another: a statistic over the batch is the layer's meaning."""
    writes: tuple[str, ...] = WRITTEN
    """Collections that the call may write; what it writes is compared too."""
    no_gradient: tuple[str, ...] = ("key", "query")
    """Words in the paths of parameters whose gradient may be zero by the layer's meaning."""
    own_class: bool = False
    """`make` gives a module written in the tests: its fields are not compared with Flax's."""

    def build(self, namespace: Any = nn, **options: Any) -> Any:
        return self.make(namespace, **options)

    def rngs(self, seed: int = 0) -> dict[str, jax.Array]:
        return {name: quick_key(10 * seed + i) for i, name in enumerate(("params", *self.streams))}

    def init(self, namespace: Any = nn, inputs: Any = None, **options: Any) -> Any:
        model = self.build(namespace, **options)
        return model.init(self.rngs(), *(inputs or self.inputs()), **self.call)

    def run(
        self, variables: Any, *inputs: Any, namespace: Any = nn, **options: Any
    ) -> tuple[Any, Any]:
        """The output, and the collections that the layer wrote."""
        model = self.build(namespace, **options)
        rngs = {name: key for name, key in self.rngs(1).items() if name in self.streams}
        mutable = list(self.writes)
        return model.apply(variables, *inputs, rngs=rngs, mutable=mutable, **self.call)

    def apply(self, variables: Any, *inputs: Any, namespace: Any = nn, **options: Any) -> Any:
        """The output alone."""
        return self.run(variables, *inputs, namespace=namespace, **options)[0]


def floats(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers of a fixed seed, float32."""
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def hidden() -> tuple[Any, ...]:
    """`(batch, length, width)`."""
    return (floats(BATCH, LENGTH, WIDTH),)


def ids() -> tuple[Any, ...]:
    """Integers below 16, `(batch, length)`."""
    return (jnp.asarray(np.random.RandomState(0).randint(0, 16, (BATCH, LENGTH))),)


def maker(layer: str, *args: Any, **fixed: Any) -> Callable[..., Any]:
    """Builds the layer of that name from a namespace."""

    def make(namespace: Any, **options: Any) -> Any:
        return getattr(namespace, layer)(*args, **fixed, **options)

    return make


def layers_of(namespace: Any) -> set[str]:
    """The names of all layers of a namespace; bases of layers and second names do not count."""
    found = {n: getattr(namespace, n) for n in namespace.__all__ if not n.endswith("Base")}
    return {
        v.__name__
        for v in found.values()
        if isinstance(v, type) and issubclass(v, namespace.Module) and v is not namespace.Module
    }
