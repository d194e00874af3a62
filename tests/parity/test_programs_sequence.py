"""Larger programs over sequences, the same source in both namespaces, equal bit for bit.

An LSTM encoder-decoder with teacher forcing, and an encoder-decoder Transformer with a cache.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

import shardflax.nn
from tests.core.harness import quick_key, same_arrays

VOCABULARY, WIDTH = 11, 8
SOURCE = jnp.asarray(np.random.RandomState(0).randint(1, VOCABULARY, (2, 5)))
TARGET = jnp.asarray(np.random.RandomState(1).randint(1, VOCABULARY, (2, 4)))


def same(program: Any) -> None:
    """Runs a program of `nn` alone in both namespaces."""
    same_arrays(program, shardflax.nn, flax.linen)


def shifted(tokens: Any) -> Any:
    """What a decoder is fed when it is taught: the tokens before those that it must say."""
    return jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]


def cross_entropy(logits: Any, tokens: Any) -> Any:
    scores = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(scores, tokens[..., None], axis=-1))


# --- an LSTM that reads a sequence and writes another


def seq2seq(nn: Any) -> SimpleNamespace:
    class Decoder(nn.RNNCellBase):
        """One step: the token before, and the logits of the next."""

        embed: Any

        def setup(self) -> None:
            self.memory = nn.OptimizedLSTMCell(WIDTH)
            self.drop = nn.Dropout(0.0, deterministic=True)
            self.out = nn.Dense(VOCABULARY)

        def __call__(self, carry: Any, token: Any) -> Any:
            carry, y = self.memory(carry, self.embed(token[..., 0]))
            return carry, self.out(self.drop(y))

        @property
        def num_feature_axes(self) -> int:
            return 1

    class Seq2Seq(nn.Module):
        def setup(self) -> None:
            self.embed = nn.Embed(VOCABULARY, WIDTH)
            self.encoder = nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.LSTMCell(4)))
            self.decoder = nn.RNN(Decoder(self.embed), return_carry=True)

        def encode(self, source: Any) -> Any:
            carries, _ = self.encoder(self.embed(source), return_carry=True)
            return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), *carries)

        def decode(self, carry: Any, tokens: Any) -> Any:
            return self.decoder(tokens[..., None], initial_carry=carry)

        def __call__(self, source: Any, target: Any) -> Any:
            return self.decode(self.encode(source), shifted(target))[1]

    return SimpleNamespace(model=Seq2Seq())


def test_lstm_with_teacher_forcing() -> None:
    def program(nn: Any) -> Any:
        model = seq2seq(nn).model
        variables = model.init(quick_key(0), SOURCE, TARGET)

        def loss(variables: Any) -> Any:
            logits = model.apply(variables, SOURCE, TARGET)
            return cross_entropy(logits, TARGET), logits

        return variables, *jax.grad(loss, has_aux=True)(variables)

    same(program)


def test_lstm_that_says_the_next_token() -> None:
    """Greedy decoding, with the carry handed from call to call."""

    def program(nn: Any) -> Any:
        model = seq2seq(nn).model
        variables = model.init(quick_key(0), SOURCE, TARGET)
        carry = model.apply(variables, SOURCE, method="encode")
        token, said = jnp.zeros((2, 1), jnp.int32), []
        for _ in range(3):
            carry, logits = model.apply(variables, carry, token, method="decode")
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            said.append(logits)
        return carry, said

    same(program)


# --- a Transformer that reads a sequence and writes another


def transformer(nn: Any, decode: bool = False, rate: float = 0.0) -> Any:
    class Block(nn.Module):
        """Attention to itself, with `memory` attention to that, and a feed-forward layer."""

        decode: bool = False

        @nn.compact
        def __call__(self, x: Any, mask: Any, memory: Any = None, memory_mask: Any = None) -> Any:
            drop = nn.Dropout(rate, deterministic=rate == 0.0)
            attend = nn.MultiHeadDotProductAttention(
                2, decode=self.decode, dropout_rate=rate, deterministic=rate == 0.0
            )
            x = x + drop(attend(nn.LayerNorm()(x), mask=mask))
            if memory is not None:
                across = nn.MultiHeadDotProductAttention(2, name="across", normalize_qk=True)
                x = x + across(nn.LayerNorm()(x), memory, mask=memory_mask)
            y = nn.Dense(16)(nn.LayerNorm()(x))
            return x + drop(nn.Dense(WIDTH)(nn.gelu(y)))

    class Positions(nn.Module):
        """Adds learned positions; when decoding, it counts the calls."""

        decode: bool = False

        @nn.compact
        def __call__(self, x: Any) -> Any:
            table = self.param("table", nn.initializers.normal(0.1), (8, WIDTH))
            here = jnp.arange(x.shape[1])
            if self.decode:
                known = self.has_variable("cache", "index")
                index = self.variable("cache", "index", lambda: jnp.zeros((), jnp.uint32))
                if known:
                    here = here + index.value
                    index.value = index.value + x.shape[1]
            return x + jnp.take(table, here, axis=0)

    class Transformer(nn.Module):
        decoding: bool = False

        def setup(self) -> None:
            self.embed = nn.Embed(VOCABULARY, WIDTH)
            self.source_positions = Positions()
            self.target_positions = Positions(self.decoding)
            self.encoder = [Block()]
            self.decoder = [Block(self.decoding)]
            self.norm = nn.LayerNorm()

        def encode(self, source: Any) -> Any:
            mask = nn.make_attention_mask(source > 0, source > 0)
            x = self.source_positions(self.embed(source))
            for block in self.encoder:
                x = block(x, mask)
            return x

        def say(self, memory: Any, source: Any, tokens: Any) -> Any:
            mask = None if self.decoding else nn.make_causal_mask(tokens)
            across = nn.make_attention_mask(jnp.ones_like(tokens), source > 0)
            x = self.target_positions(self.embed(tokens))
            for block in self.decoder:
                x = block(x, mask, memory, across)
            return self.embed.attend(self.norm(x))

        def __call__(self, source: Any, target: Any) -> Any:
            return self.say(self.encode(source), source, shifted(target))

    return Transformer(decode)


PADDED = SOURCE.at[1, 3:].set(0)


def test_transformer_and_its_gradients() -> None:
    def program(nn: Any) -> Any:
        model = transformer(nn)
        variables = model.init(quick_key(0), PADDED, TARGET)

        def loss(variables: Any) -> Any:
            logits = model.apply(variables, PADDED, TARGET)
            return cross_entropy(logits, TARGET), logits

        return variables, *jax.grad(loss, has_aux=True)(variables)

    same(program)


def test_transformer_with_dropout() -> None:
    def program(nn: Any) -> Any:
        variables = transformer(nn).init(quick_key(0), PADDED, TARGET)
        rngs = {"dropout": quick_key(1)}
        return transformer(nn, rate=0.3).apply(variables, PADDED, TARGET, rngs=rngs)

    same(program)


def test_transformer_that_says_one_token_after_the_other() -> None:
    """The cache after each step, and logits close to those of all at once.

    Linen's logits are equal too, but not the same operations: it does not ask if the cache is full.
    """
    logits: list[Any] = []

    def program(nn: Any) -> Any:
        model = transformer(nn, decode=True)
        variables = model.init(quick_key(0), PADDED, TARGET)
        params, cache = {"params": variables["params"]}, {"cache": variables["cache"]}
        memory = model.apply({**params, **cache}, PADDED, method="encode")
        fed, caches = shifted(TARGET), []
        logits.clear()
        for t in range(TARGET.shape[1]):
            args = memory, PADDED, fed[:, t : t + 1]
            given = {**params, **cache}
            said, cache = model.apply(given, *args, method="say", mutable=["cache"])
            logits.append(said)
            caches.append(cache)
        return variables, caches, transformer(nn).apply(params, PADDED, TARGET)

    same(program)
    whole, decoded = jax.jit(lambda: (program(shardflax.nn)[-1], jnp.concatenate(logits, 1)))()
    np.testing.assert_allclose(decoded, whole, rtol=1e-4, atol=1e-5)
