"""RNG streams against Linen: each key depends on where and how often it is drawn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.core.harness import quick_key, registry, same, same_arrays

KEYS = {"params": quick_key(1), "dropout": quick_key(2), "noise": quick_key(3)}
X = jnp.ones((2, 3))
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same(run)


def draws(nn: Any) -> Any:
    """A module that draws from several streams, twice, and in a submodule."""

    class Sub(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.make_rng("dropout"), self.make_rng("params"), self.make_rng("noise")

    class Draws(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            first = self.make_rng("dropout"), self.make_rng("dropout"), self.make_rng()
            return first, Sub()(x), Sub()(x), self.make_rng("noise")

    return Draws


@program
def plain(nn: Any) -> Any:
    return draws(nn)().init_with_output(KEYS, X), draws(nn)().apply({}, X, rngs=KEYS)


@program
def raw_keys(nn: Any) -> Any:
    return [
        nn.Lin().init_with_output(key, X)
        for key in (jax.random.PRNGKey(0), jax.random.key(3), {"params": jax.random.PRNGKey(2)})
    ]


@program
def fallback_counts_with_params(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return [self.make_rng(s) for s in ("params", "other", "params", "another", "dropout")]

    return M().init_with_output(KEYS["params"], X), M().apply({}, X, rngs={"params": KEYS["noise"]})


@program
def one_key_for_apply(nn: Any) -> Any:
    return nn.Drop("anything").apply({}, X, rngs=KEYS["noise"])


@program
def params_made_between_draws(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            a = self.make_rng("params")
            w = self.param("w", nn.uniform, (2,))
            b = self.make_rng("params")
            return a, w, b, self.param("v", nn.uniform, (2,))

    y, variables = M().init_with_output(KEYS, X)
    return y, variables, M().apply(variables, X, rngs=KEYS)


LIFTS: dict[str, Any] = {
    "jit": lambda nn, t: nn.jit(t),
    "jit_some": lambda nn, t: nn.jit(t, rngs=["dropout", "params"]),
    "remat": lambda nn, t: nn.remat(t),
    "remat_some": lambda nn, t: nn.remat(t, rngs=["params"]),
    "vmap_split": lambda nn, t: nn.vmap(
        t, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True, "noise": True}
    ),
    "vmap_shared": lambda nn, t: nn.vmap(
        t, variable_axes={"params": None}, split_rngs={"params": False, "dropout": True}
    ),
    "vmap_all": lambda nn, t: nn.vmap(t, variable_axes={"params": 0}, split_rngs={True: True}),
    "scan_split": lambda nn, t: scanned(nn, t, split_rngs={"params": True, "dropout": True}),
    "scan_shared": lambda nn, t: scanned(nn, t, split_rngs={"params": False, "dropout": False}),
    "scan_mixed": lambda nn, t: scanned(nn, t, split_rngs={"params": True, "dropout": False}),
    "scan_fallback": lambda nn, t: scanned(nn, t, split_rngs={"params": True}),
}


def scanned(nn: Any, target: Any, **options: Any) -> Any:
    return nn.scan(
        target,
        variable_axes={"params": 0},
        length=3,
        check_constancy_invariants=False,
        **options,
    )


def model_of(nn: Any, lift: Any, form: str, name: str) -> Any:
    """A model that draws before, in and after a lifted block, which is called twice."""
    is_scan = name.startswith("scan")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any = None) -> Any:
            x = nn.Lin()(x)
            before = nn.Drop("dropout")(x)
            a = jax.random.uniform(self.make_rng("dropout"), x.shape)
            b = jax.random.uniform(self.make_rng("params"), x.shape)
            c = jax.random.uniform(self.make_rng("other"), x.shape)
            y = before + a + 2 * b + 3 * c
            return (y, None) if is_scan else y

    class Method(Block):
        __call__ = lift(nn, Block.__call__)

    if form == "class":
        block: Any = lift(nn, Block)
    elif form == "method":
        block = Method
    else:
        inner = Block

        class Function(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any = None) -> Any:
                block = inner(name="inner")
                one = self.make_rng("dropout")
                call = lift(nn, lambda m, *a: m(*a))
                y = call(block, x, *(() if not is_scan else (None,)))
                return y, one, self.make_rng("dropout")

        block = Function

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            first = self.make_rng("dropout")
            layer = block()
            args = (x, None) if is_scan else (x,)
            ys = layer(*args), layer(*args)
            again = block()(*args)
            return first, ys, again, self.make_rng("dropout"), self.make_rng("params")

    return Model()


OTHER_FORMS = ("jit", "remat", "vmap_split", "scan_split")  # the forms share all but the target


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "class") for name in LIFTS]
    + [(name, form) for form in ("method", "function") for name in OTHER_FORMS],
)
def test_draws_around_a_transform(name: str, form: str) -> None:
    def program(nn: Any) -> Any:
        model = model_of(nn, LIFTS[name], form, name)
        streams = {"params", "dropout"}
        keys = {n: k for n, k in KEYS.items() if n in streams}
        if name == "remat_some":
            keys = {"params": KEYS["params"]}
        y, variables = model.init_with_output(keys, X)
        return y, variables, model.apply(variables, X, rngs=keys)

    same_arrays(program)


@pytest.mark.parametrize("outer", ["jit", "remat", "vmap_split", "scan_split"])
@pytest.mark.parametrize("inner", ["jit", "remat", "vmap_split", "scan_split"])
def test_draws_in_nested_transforms(inner: str, outer: str) -> None:
    def program(nn: Any) -> Any:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Drop("dropout")(nn.Lin()(x)) + self.make_rng("dropout")[0] * 0.0

        class AsScan(nn.Module):
            target: Any

            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                return self.target()(nn.Drop("dropout")(x)), None

        def lift(name: str, target: Any) -> Any:
            if name == "scan_split":
                cls = LIFTS[name](nn, AsScan)

                class Run(nn.Module):
                    @nn.compact
                    def __call__(self, x: Any) -> Any:
                        return cls(target)(x, None)[0]

                return Run

            class Mid(nn.Module):
                @nn.compact
                def __call__(self, x: Any) -> Any:
                    return target()(nn.Drop("dropout")(x)) + nn.Drop("noise")(x)

            return LIFTS[name](nn, Mid)

        class Simple(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Drop("dropout")(nn.Lin()(x))

        model = lift(outer, lift(inner, Simple))()
        y, variables = model.init_with_output(KEYS, jnp.ones((2, 4, 3)))
        return y, variables, model.apply(variables, jnp.ones((2, 4, 3)), rngs=KEYS)

    same_arrays(program)


@program
def streams_of_a_scope(nn: Any) -> Any:
    class Inner(nn.Module):
        def __call__(self) -> Any:
            streams = self.scope.rngs
            return {name: streams[name].as_jax_rng() for name in sorted(streams)}

    class M(nn.Module):
        @nn.compact
        def __call__(self) -> Any:
            drawn = self.make_rng("dropout")
            return drawn, Inner()(), nn.remat(Inner)()(), nn.jit(Inner)()(), Inner()()

    return M().apply({}, rngs=KEYS)


@program
def shapes_of_raw_keys(nn: Any) -> Any:
    def outcome(shape: Any, dtype: Any = jnp.uint32) -> Any:
        try:
            return nn.Lin().init(jnp.ones(shape, dtype), jnp.ones((2, 3)))
        except Exception as error:
            return type(error).__name__

    return [outcome(shape) for shape in ((2,), (), (3,), (4,), (2, 2), (0,))], outcome(
        (2,), "int32"
    )
