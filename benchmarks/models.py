"""The models of the benchmarks: one source for two namespaces, ours and Flax's."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax

__all__ = ["SIZES", "Sizes", "linen_models"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a stack of transformer blocks and of its input."""

    blocks: int = 24
    width: int = 64
    heads: int = 4
    mlp: int = 256
    batch: int = 2
    length: int = 16

    @property
    def depth(self) -> int:
        return self.width // self.heads


SIZES = Sizes()


def linen_models(nn: Any) -> SimpleNamespace:
    """The models of the benchmarks, written against the namespace `nn`."""

    class Block(nn.Module):
        sizes: Sizes

        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=self.sizes.heads)(h)
            h = nn.LayerNorm()(x)
            h = nn.gelu(nn.Dense(self.sizes.mlp)(h))
            return x + nn.Dense(self.sizes.width)(h)

    class Unrolled(nn.Module):
        sizes: Sizes

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(self.sizes.blocks):
                x = Block(self.sizes)(x)
            return x

    class Step(nn.Module):
        sizes: Sizes

        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return Block(self.sizes)(x), None

    class Scanned(nn.Module):
        sizes: Sizes

        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(
                Step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.sizes.blocks,
            )
            return scan(self.sizes)(x, None)[0]

    class Child(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x

    class Children(nn.Module):
        count: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(self.count):
                x = Child()(x)
            return x

    return SimpleNamespace(
        Block=Block, Unrolled=Unrolled, Scanned=Scanned, Child=Child, Children=Children
    )


def count_body_traces(nn: Any, depth: int) -> tuple[int, int]:
    """How often `init` and `apply` run the Python body inside of `depth` nested scans."""
    traces = [0]

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            traces[0] += 1
            return nn.Dense(4)(x), None

    def nest(body: Any, name: str) -> Any:
        scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)

        class Level(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                return scanned(name=name)(x, None)

        return Level

    model = Body
    for level in range(depth):
        model = nest(model, f"level_{level}")
    x = jax.numpy.ones((2, 4))
    variables = model().init(jax.random.key(0), x, None)
    at_init, traces[0] = traces[0], 0
    model().apply(variables, x, None)
    return at_init, traces[0]
