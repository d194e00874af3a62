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

    A name `Layer-what` is a further row of `Layer`: columns that compile much treat them together.
    Inputs and outputs may be trees; complex ones are fine.
    """

    name: str
    make: Callable[..., Any]
    """`make(namespace, **options)` builds the layer; options are `dtype`, `param_dtype`."""
    inputs: Callable[[], tuple[Any, ...]]
    """The positional arguments of the call; a dict at their end has arrays by keyword."""
    call: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call that are no arrays."""
    streams: tuple[str, ...] = ()
    """Random streams that the call draws from."""
    formula: Callable[..., Any] | None = None
    """`formula(row, variables, *inputs)`: the output in plain JAX, where Flax has no such layer.

    Where there is none, Flax has the layer, with these arguments: values are equal bit for bit.
    """
    ours: dict[str, Any] = field(default_factory=dict)
    """Further options of our layer, which Flax's has not."""
    typed: tuple[str, ...] = ("dtype", "param_dtype")
    """Which of these the layer takes, where `dtype` is that of all it returns; without `dtype` it
    computes in that of what it is given."""
    batch_dims: tuple[int | None, ...] = (0,)
    """The batch dim of each array of the inputs, `None` where it has none; the last is for all
    that follow."""
    out_batch_dim: int = 0
    """The batch dim of the outputs."""
    in_parts: dict[str, Any] | None = field(default_factory=dict)
    """Further options where each device sees a part of the batch; `None`: the parts give another
    result there, by what the layer means."""
    rewrites: bool = False
    """`init` gives the parameters as the layer uses them, in `dtype`."""
    over_weights: bool = False
    """Statistics of the weights are taken, so their sharded dims are summed over."""
    side_by_side: bool = False
    """Arrays are joined along a dim that is spread over `tensor`, so their parts move."""
    over_batch: bool = False
    """Elements of the batch see one another: a statistic over the batch is the layer's meaning."""
    writes: tuple[str, ...] = WRITTEN
    """Collections that the call may write; what it writes is compared too."""
    no_gradient: tuple[str, ...] = ()
    """Words in the paths of parameters whose gradient may be zero by the layer's meaning."""

    @property
    def like_flax(self) -> bool:
        return self.formula is None

    @property
    def has_dtype(self) -> bool:
        return "dtype" in self.typed

    @property
    def further(self) -> bool:
        """Another row comes first, with other arguments of the same layer."""
        return "-" in self.name

    def build(self, namespace: Any = nn, **options: Any) -> Any:
        return self.make(namespace, **(self.ours if namespace is nn else {}), **options)

    def rngs(self, seed: int = 0) -> dict[str, jax.Array]:
        return {name: quick_key(10 * seed + i) for i, name in enumerate(("params", *self.streams))}

    def drawn(self) -> dict[str, jax.Array]:
        """The keys of a call."""
        return {name: key for name, key in self.rngs(1).items() if name in self.streams}

    def init(self, namespace: Any = nn, inputs: Any = None, **options: Any) -> Any:
        args, arrays = arguments_of(inputs or self.inputs())
        model = self.build(namespace, **options)
        return model.init(self.rngs(), *args, **arrays, **self.call)

    def run(
        self, variables: Any, *inputs: Any, namespace: Any = nn, **options: Any
    ) -> tuple[Any, Any]:
        """The output, and the collections that the layer wrote."""
        args, arrays = arguments_of(inputs)
        model = self.build(namespace, **options)
        keywords = {"rngs": self.drawn(), "mutable": list(self.writes), **arrays, **self.call}
        return model.apply(variables, *args, **keywords)

    def apply(self, variables: Any, *inputs: Any, namespace: Any = nn, **options: Any) -> Any:
        """The output alone."""
        return self.run(variables, *inputs, namespace=namespace, **options)[0]

    def by_batch(self, fn: Callable[[Any, int | None], Any], inputs: Any) -> Any:
        """`fn(array, its batch dim)` for each array of the inputs."""
        leaves, shape = jax.tree.flatten(inputs)
        dims = [*self.batch_dims, *[self.batch_dims[-1]] * len(leaves)][: len(leaves)]
        return jax.tree.unflatten(shape, [fn(x, d) for x, d in zip(leaves, dims, strict=True)])


def arguments_of(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments, and those by keyword, which are a dict at the end."""
    by_keyword = bool(inputs) and isinstance(inputs[-1], dict)
    return (inputs[:-1], inputs[-1]) if by_keyword else (inputs, {})


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
