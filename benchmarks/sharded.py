"""A sharded train step twice: with the library's names and rules, and by hand.

Both train the same small decoder (embedding, scanned transformer blocks, norm, output projection)
with AdamW on a mesh of eight devices, `data=2,fsdp=2,tensor=2`.  What XLA compiles for the two
is compared in `compiled.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shardflax.nn as nn
from benchmarks import raw
from benchmarks.models import Sizes
from shardflax import partitioning
from shardflax.training.train_state import TrainState

__all__ = [
    "AXES",
    "SHARDED",
    "VOCAB",
    "by_hand",
    "lowered_by_hand",
    "lowered_with_names",
    "make_mesh",
    "step_by_hand",
    "tokens",
    "with_names",
]

AXES = "data=2,fsdp=2,tensor=2"
SHARDED = Sizes(blocks=3, width=64, heads=4, mlp=256, batch=8, length=32)
VOCAB = 512


def make_mesh() -> Mesh:
    return partitioning.make_mesh(AXES)


def tokens(mesh: Mesh) -> jax.Array:
    """A batch of token ids, spread over the axes of the batch."""
    ids = jnp.arange(SHARDED.batch * SHARDED.length) % VOCAB
    return jax.device_put(ids.reshape(SHARDED.batch, SHARDED.length), _spread(mesh))


def _spread(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(("data", "fsdp")))


def _lying(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _tokens(mesh: Mesh) -> jax.ShapeDtypeStruct:
    ids = jax.ShapeDtypeStruct((SHARDED.batch, SHARDED.length), jnp.int32)
    return _lying(ids, _spread(mesh))


def loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Cross-entropy of each next token, the mean over the batch."""
    scores = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))


def optimizer() -> optax.GradientTransformation:
    return optax.adamw(1e-3)


# --- with names and rules


class Block(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.sizes.heads)(h)
        h = nn.gelu(nn.Dense(self.sizes.mlp)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.sizes.width, kernel_axes=("mlp", "embed"))(h), None


class Decoder(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        x = nn.Embed(VOCAB, self.sizes.width)(ids)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.sizes.blocks,
            metadata_params={"partition_name": "layers"},
        )
        x, _ = blocks(self.sizes, name="blocks")(x, None)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(VOCAB, kernel_axes=("embed", "vocab"), name="logits")(x)


RULES = partitioning.preset("fsdp_tp")
MODEL = Decoder(SHARDED)


def _init(key: jax.Array) -> TrainState:
    ids = jnp.zeros((SHARDED.batch, SHARDED.length), jnp.int32)
    return TrainState.create(
        apply_fn=MODEL.apply, params=MODEL.init(key, ids)["params"], tx=optimizer()
    )


def with_names(mesh: Mesh) -> tuple[Callable[..., Any], Any]:
    """The jitted step `(state, ids) -> (state, loss)` and a state to start from."""
    state, layout = partitioning.init_sharded(_init, jax.random.key(0), mesh=mesh, rules=RULES)
    return _step_with_names(mesh, layout), state


def lowered_with_names(mesh: Mesh) -> Any:
    """The same step, lowered for a mesh whose devices need not be there."""
    layout = _layout(mesh)
    return _step_with_names(mesh, layout).lower(layout.abstract, _tokens(mesh))


def _layout(mesh: Mesh) -> partitioning.Layout:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return partitioning.abstract_layout(_init, key, mesh=mesh, rules=RULES)


def _step_with_names(mesh: Mesh, layout: partitioning.Layout) -> Any:
    def step(state: TrainState, ids: jax.Array) -> tuple[TrainState, jax.Array]:
        def objective(params: Any) -> jax.Array:
            with partitioning.use(mesh, RULES):
                return loss(MODEL.apply({"params": params}, ids), ids)

        value, grads = jax.value_and_grad(objective)(state.params)
        return state.apply_gradients(grads=grads), value

    return jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, None))


# --- by hand

RESIDUAL = P(("data", "fsdp"), "tensor", None)
HEADS = P(("data", "fsdp"), None, "tensor", None)
HIDDEN = P(("data", "fsdp"), None, "tensor")

_NORM = {"scale": P(), "bias": P()}
_IN = {"kernel": P("fsdp", "tensor", None), "bias": P("tensor", None)}
_BLOCK = {
    "LayerNorm_0": _NORM,
    "LayerNorm_1": _NORM,
    "MultiHeadDotProductAttention_0": {
        "query": _IN,
        "key": _IN,
        "value": _IN,
        "out": {"kernel": P("tensor", None, "fsdp"), "bias": P("fsdp")},
    },
    "Dense_0": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
    "Dense_1": {"kernel": P("tensor", "fsdp"), "bias": P("fsdp")},
}
PARAMS = {
    "Embed_0": {"embedding": P("tensor", "fsdp")},
    "blocks": jax.tree.map(lambda spec: P(None, *spec), _BLOCK),
    "norm": _NORM,
    "logits": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
}


@dataclass(frozen=True)
class _Hand:
    """What one writes by hand around the products: where their operands and results lie."""

    mesh: Mesh
    residual: P

    def put(self, x: jax.Array, spec: P) -> jax.Array:
        spec = self.residual if spec == RESIDUAL else spec
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def dense(self, p: Any, x: jax.Array, stored: P, n_in: int = 1) -> jax.Array:
        """A product whose kernel is gathered over `fsdp` for it, in the backward pass again."""
        used = P(*(None if axis == "fsdp" else axis for axis in stored))

        def product(multiply: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
            def gathered(x: jax.Array, kernel: jax.Array) -> jax.Array:
                return multiply(x, self.put(self.put(kernel, stored), used))

            return jax.checkpoint(gathered, prevent_cse=(False, True))(x, kernel)  # pyright: ignore[reportArgumentType]

        return raw.dense(p, x, n_in, product)


def _attention(p: Any, x: jax.Array, hand: _Hand) -> jax.Array:
    heads, put = _IN["kernel"], hand.put
    query, key, value = (
        put(hand.dense(p[name], x, heads), HEADS) for name in ("query", "key", "value")
    )
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", query, key))
    y = jnp.einsum("...hqk,...khd->...qhd", weights, value)
    out = _BLOCK["MultiHeadDotProductAttention_0"]["out"]["kernel"]
    return put(hand.dense(p["out"], y, out, n_in=2), RESIDUAL)


def _forward(params: Any, ids: jax.Array, hand: _Hand) -> jax.Array:
    put = hand.put

    def block(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        h = put(raw.layer_norm(p["LayerNorm_0"], x), RESIDUAL)
        x = x + _attention(p["MultiHeadDotProductAttention_0"], h, hand)
        h = put(raw.layer_norm(p["LayerNorm_1"], x), RESIDUAL)
        h = jax.nn.gelu(put(hand.dense(p["Dense_0"], h, P("fsdp", "tensor")), HIDDEN))
        return x + put(hand.dense(p["Dense_1"], h, P("tensor", "fsdp")), RESIDUAL), None

    table = put(put(params["Embed_0"]["embedding"], P("tensor", "fsdp")), P("tensor"))
    x = put(put(jnp.take(table, ids, axis=0), P(("data", "fsdp"))), RESIDUAL)
    x = lax.scan(block, x, params["blocks"])[0]
    x = put(raw.layer_norm(params["norm"], x), RESIDUAL)
    return put(hand.dense(params["logits"], x, P("fsdp", "tensor")), HIDDEN)


def by_hand(mesh: Mesh, params: Any) -> tuple[Callable[..., Any], Any]:
    """The same step with explicit shardings, and its state from a copy of the same parameters."""
    start = jax.jit(_start_by_hand, out_shardings=_state_shardings(mesh))
    return step_by_hand(mesh), start(params)


def lowered_by_hand(mesh: Mesh, residual: P = RESIDUAL) -> Any:
    """The same step, lowered for a mesh whose devices need not be there."""
    state = jax.eval_shape(_start_by_hand, _layout(mesh).abstract.params)
    state = jax.tree.map(_lying, state, _state_shardings(mesh))
    return step_by_hand(mesh, residual).lower(state, _tokens(mesh))


def _start_by_hand(params: Any) -> Any:
    return jnp.int32(0), params, optimizer().init(params)


def step_by_hand(mesh: Mesh, residual: P = RESIDUAL) -> Any:
    """The jitted step; `residual` is the layout of the residual stream."""
    tx, hand = optimizer(), _Hand(mesh, residual)

    def step(state: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
        count, params, opt_state = state
        value, grads = jax.value_and_grad(lambda p: loss(_forward(p, ids, hand), ids))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (count + 1, optax.apply_updates(params, updates), opt_state), value

    return jax.jit(step, donate_argnums=0, out_shardings=(_state_shardings(mesh), None))


def _state_shardings(mesh: Mesh) -> Any:
    """Of the step count, the parameters, and AdamW's state."""
    adam = optax.ScaleByAdamState(count=P(), mu=PARAMS, nu=PARAMS)  # pyright: ignore[reportArgumentType]
    specs = P(), PARAMS, (adam, optax.EmptyState(), optax.EmptyState())
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
