"""Lifted map_variables, remat_scan, fold_rngs, add_metadata_axis and named_call against Linen.

Linen's `remat_scan` traces each body twice and has no option against it, so keys that are drawn
inside differ (docs/design.md, the one exception): its programs draw none.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.core.harness import both, quick_key, registry, same, same_arrays

KEY = quick_key(7)
X = jnp.arange(1.0, 7.0).reshape(2, 3)
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same_arrays(run)


# --- map_variables


def tripled(tree: Any) -> Any:
    return jax.tree.map(lambda x: 3 * x, tree)


def plus_one(tree: Any) -> Any:
    return jax.tree.map(lambda x: x + 1, tree)


@program
def map_variables_of_the_seeds(nn: Any) -> Any:
    class CausalLin(nn.Module):
        features: int

        def apply_mask(self, variables: Any) -> Any:
            if self.is_initializing():
                return variables
            return jax.tree.map(jnp.triu, variables)

        def setup(self) -> None:
            mapped = nn.map_variables(
                nn.Lin, "params", self.apply_mask, init=self.is_initializing()
            )
            self.lin = mapped(features=self.features, use_bias=False)

        def __call__(self, x: Any) -> Any:
            return self.lin(x)

    return both(CausalLin(5), X)


@program
def map_variables_init(nn: Any) -> Any:
    """The layer is initialised, and mapped afterwards."""

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            mapped = nn.map_variables(
                nn.Lin, "params", tripled, plus_one, init=self.is_initializing()
            )
            return nn.Lin()(mapped()(x))

    return both(M(), X)


@program
def map_variables_mutable(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            mapped = nn.map_variables(nn.Count, "state", tripled, plus_one, mutable=True)
            return mapped()(x)

    state = {"Map_variablesCount_0": {"count": jnp.array(3), "total": X}}
    return M().apply({"state": state}, X, mutable=["state"])


@program
def map_variables_init_and_mutable(nn: Any) -> Any:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Count()(nn.Drop()(nn.Lin()(x)))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            mapped = nn.map_variables(
                Inner,
                ["state", "params"],
                tripled,
                plus_one,
                init=self.is_initializing(),
                mutable=True,
            )
            return mapped()(x), nn.Drop()(x)

    return both(M(), X)


@program
def map_variables_of_a_function(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            lin = nn.Lin()
            y = lin(x)
            return y, nn.map_variables(lambda m, x: m(x), "params", tripled)(lin, x)

    return both(M(), X)


@program
def map_variables_changes_the_tree(nn: Any) -> Any:
    """The tree inside may have other leaves than the one outside."""

    def join(tree: Any) -> Any:
        return {"params": {k: v["w"] for k, v in tree.get("params", {}).items()}}

    def split(tree: Any) -> Any:
        return {"params": {k: {"w": v} for k, v in tree.get("params", {}).items()}}

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.map_variables(nn.Lin, "params", join, split, init=self.is_initializing())()(x)

    return both(M(), X)


@program
def map_variables_methods(nn: Any) -> Any:
    class Two(nn.Module):
        def setup(self) -> None:
            self.lin = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.lin(x)

        def plain(self, x: Any) -> Any:
            return self.lin(x)

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            two = nn.map_variables(
                Two, "params", tripled, init=self.is_initializing(), methods=["__call__"]
            )()
            return two(x), two.plain(x)

    return both(M(), X)


# --- remat_scan


@program
def remat_scan_one_level(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.remat_scan(nn.Lin, lengths=(3,))()(x)

    shapes = jax.eval_shape(M().init, KEY, X)
    variables = jax.tree.map(lambda s: jnp.linspace(0, 1, s.size).reshape(s.shape), shapes)
    return variables, jax.grad(lambda v: M().apply(v, X).sum())(variables)


@program
def remat_scan_two_levels(nn: Any) -> Any:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Sow()(nn.Lin()(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.remat_scan(Block, lengths=(2, 3))(name="deep")(x)

    shapes = jax.eval_shape(M().init, KEY, X)
    variables = jax.tree.map(lambda s: jnp.linspace(0, 1, s.size).reshape(s.shape), shapes)
    return variables, M().apply(variables, X, mutable=["intermediates"])


@program
def remat_scan_of_a_function(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def body(mdl: Any, x: Any) -> Any:
                return nn.Lin(name="lin")(x)

            return nn.remat_scan(body, lengths=(2, 2))(self, x)

    shapes = jax.eval_shape(M().init, KEY, X)
    variables = jax.tree.map(lambda s: jnp.linspace(0, 1, s.size).reshape(s.shape), shapes)
    return variables, M().apply(variables, X)


# --- fold_rngs


@program
def fold_rngs(nn: Any) -> Any:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Drop()(nn.Drop()(nn.Lin()(x)))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            inner = nn.fold_rngs(Inner)(name="inner")
            y = inner(nn.Drop()(x))
            return y, inner(y), nn.Drop()(x)

    return both(M(), X)


@program
def fold_rngs_of_some(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def draw(mdl: Any, x: Any) -> Any:
                found = mdl.has_rng("dropout"), mdl.has_rng("params")
                key = mdl.make_rng("dropout")
                return x + nn.uniform(key, x.shape), found

            y, some = nn.fold_rngs(draw, rngs="dropout")(self, x)
            z, all_of_them = nn.fold_rngs(draw)(self, x)
            return y, z, [*map(float, some), *map(float, all_of_them)]

    return both(M(), X)


# --- named_call


@program
def named_call(nn: Any) -> Any:
    class M(nn.Module):
        @nn.named_call
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    return both(M(), X)


# --- add_metadata_axis


@pytest.mark.parametrize("axis", [0, 1])
def test_add_metadata_axis(axis: int) -> None:
    def run(nn: Any) -> Any:
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                init = nn.with_partitioning(nn.uniform, ("a", "b"))
                return x @ self.param("w", init, (3, 4))

        wrapped = nn.add_metadata_axis(
            Inner, variable_axes={"params": axis}, metadata_params={nn.PARTITION_NAME: "layers"}
        )

        class M(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return wrapped()(x)

        variables = M().init(KEY, X)
        return variables, M().apply(variables, X)

    same(run)
