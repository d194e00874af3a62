"""Larger programs with lifts, from one source in both namespaces: equal bit for bit."""

from __future__ import annotations

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardflax.nn
from tests.core.harness import quick_key, same_arrays

TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 11, (2, 6)))


def same(program: Any) -> None:
    """Runs a program of `nn` alone in both namespaces."""
    same_arrays(program, shardflax.nn, flax.linen)


def decoder(nn: Any, policy: Any) -> Any:
    """A decoder whose layers are scanned and rematerialised, with dropout and sown activations."""

    class Block(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x: Any, mask: Any) -> Any:
            h = nn.LayerNorm(name="before_attention")(x)
            h = nn.MultiHeadDotProductAttention(2, deterministic=not self.train)(h, mask=mask)
            x = x + nn.Dropout(0.3, deterministic=not self.train)(h)
            h = nn.Dense(16, name="up")(nn.RMSNorm()(x))
            x = x + nn.Dense(x.shape[-1], name="down")(nn.gelu(h))
            self.sow("intermediates", "norm", jnp.linalg.norm(x))
            return x, x.mean()

    class Decoder(nn.Module):
        train: bool = True

        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            embed = nn.Embed(11, 8)
            layers = nn.scan(
                nn.remat(Block, prevent_cse=False, policy=policy),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
                check_constancy_invariants=False,
            )
            x, means = layers(self.train, name="layers")(embed(tokens), nn.make_causal_mask(tokens))
            return embed.attend(nn.LayerNorm()(x)), means

    return Decoder


def test_a_scanned_and_rematerialised_decoder() -> None:
    def program(nn: Any) -> Any:
        model = decoder(nn, jax.checkpoint_policies.dots_with_no_batch_dims_saveable)()
        keys = {"params": quick_key(0), "dropout": quick_key(1)}
        variables = model.init(keys, TOKENS)
        tx = optax.adam(1e-2)

        def loss(params: Any, key: Any) -> Any:
            options = {"rngs": {"dropout": key}, "mutable": ["intermediates"]}
            (logits, means), sown = model.apply({"params": params}, TOKENS, **options)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS)
            return losses.mean(), (means, sown)

        params, opt_state, seen = variables["params"], tx.init(variables["params"]), []
        for i in range(2):
            found, grads = jax.value_and_grad(loss, has_aux=True)(params, quick_key(2 + i))
            updates, opt_state = tx.update(grads, opt_state)
            params = optax.apply_updates(params, updates)
            seen.append(found)
        return variables, params, seen

    same(program)


def experts(nn: Any) -> Any:
    """A shared trunk; experts chosen at run time, some of which use the trunk again."""

    class Expert(nn.Module):
        trunk: Any
        features: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            count = self.variable("state", "calls", lambda: jnp.zeros((), jnp.int32))
            count.value += 1
            return nn.Dense(self.features)(nn.relu(self.trunk(x)))

    class Mixture(nn.Module):
        def setup(self) -> None:
            self.trunk = nn.Dense(8)
            self.experts = [Expert(self.trunk, 4), Expert(self.trunk, 4)]
            self.gate = nn.Dense(1)

        def __call__(self, x: Any, index: Any) -> Any:
            if self.is_initializing():
                for expert in self.experts:
                    expert(x)

            def expert(i: int) -> Any:
                return lambda m, x: m.experts[i](x)

            y = nn.switch(index, [expert(0), expert(1)], self, x)
            open_gate = self.gate(x).mean() > 0
            z = nn.cond(open_gate, lambda m, y: m.trunk(m.trunk(y)), lambda m, y: y * 2, self, x)
            return y.sum(), z

    return Mixture()


def test_conditions_and_shared_modules() -> None:
    def program(nn: Any) -> Any:
        x = jnp.linspace(-1, 1, 16).reshape(2, 8)
        model = experts(nn)
        variables = model.init(quick_key(0), x, 0)

        def loss(params: Any, index: Any) -> Any:
            given = {"params": params, "state": variables["state"]}
            (y, z), state = model.apply(given, x, index, mutable=["state"])
            return y + (z**2).sum(), state

        grad = jax.value_and_grad(loss, has_aux=True)
        return variables, [grad(variables["params"], i) for i in range(2)]

    same(program)


def test_an_ensemble_in_a_loop() -> None:
    """vmap over models, each of which runs a while_loop with state, under a lifted jit."""

    def program(nn: Any) -> Any:
        class Newton(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                steps = self.variable("state", "steps", lambda: jnp.zeros((), jnp.int32))
                step = nn.Dense(3)
                x = step(x)

                def body(mdl: Any, c: Any) -> Any:
                    mdl.put_variable("state", "steps", mdl.get_variable("state", "steps") + 1)
                    return jnp.tanh(step(c)) / 2

                steps.value += 0
                if self.is_initializing():
                    return x
                norm = lambda mdl, c: (c**2).sum() > 0.1  # noqa: E731
                return nn.while_loop(norm, body, self, x, carry_variables="state")

        over = {"variable_axes": {"params": 0, "state": 0}, "split_rngs": {"params": True}}
        model = nn.jit(nn.vmap(Newton, in_axes=None, axis_size=3, **over))()
        x = jnp.ones(3)
        variables = model.init(quick_key(0), x)
        return variables, model.apply(variables, x, mutable=["state"])

    same(program)
