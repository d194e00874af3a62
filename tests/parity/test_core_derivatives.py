"""Lifted vjp, jvp, grad, value_and_grad and custom_vjp against Linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.core.harness import both, quick_key, registry, same_arrays

KEY = quick_key(7)
X = jnp.arange(1.0, 7.0).reshape(2, 3)
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same_arrays(run)


def scale(nn: Any) -> Any:
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x: Any, y: Any) -> Any:
            return self.param("scale", nn.uniform, ()) * x * y

    return Scale


# --- vjp


@program
def vjp_of_the_seeds(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any, y: Any) -> Any:
            z, bwd = nn.vjp(lambda mdl, x, y: mdl(x, y), scale(nn)(), x, y)
            return z, bwd(jnp.ones(z.shape))

    return both(Foo(), X, X + 1)


@program
def vjp_with_state_keys_and_aux(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            class Inner(nn.Module):
                @nn.compact
                def __call__(self, x: Any) -> Any:
                    y = nn.Count()(nn.Sow()(nn.Drop()(nn.Lin()(x))))
                    return y, {"aux": y.sum()}

            z, bwd, aux = nn.vjp(lambda m, x: m(x), Inner(), x, has_aux=True)
            return z, bwd(z), aux, nn.Drop()(x)

    return both(Foo(), X)


@program
def vjp_of_chosen_variables(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            lin = nn.Lin()
            lin(x)
            self.variable("state", "s", lambda: jnp.ones(3))
            z, bwd = nn.vjp(
                lambda m, x: lin(x) * m.get_variable("state", "s"),
                self,
                x,
                vjp_variables=["params", "state"],
            )
            y, only_x = nn.vjp(lambda m, x: m(x), lin, x, vjp_variables=False)
            return bwd(jnp.ones(z.shape)), only_x(jnp.ones(y.shape))

    return both(Foo(), X)


@program
def vjp_of_self(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            z, bwd = nn.vjp(lambda m, x: nn.Lin()(x), self, x)
            return z, bwd(z), nn.Lin()(x)

    return both(Foo(), X)


@program
def vjp_of_several_scopes(nn: Any) -> Any:
    """A module that uses another one from outside: the gradients to both are given."""

    class Pair(nn.Module):
        other: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(2)(self.other(x))

    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            pair = Pair(nn.Lin())
            z, bwd = nn.vjp(lambda m, x: m(x), pair, x, multi_scope=True)
            y, one = nn.vjp(lambda m, x: m(x), nn.Lin(), x, multi_scope=True)
            return z, bwd(z), one(y)

    return both(Foo(), X)


# --- grad, value_and_grad


def squared(nn: Any) -> Any:
    class Squared(nn.Module):
        @nn.compact
        def __call__(self, x: Any, y: Any = 1.0) -> Any:
            return (nn.Lin()(x) * y).sum() ** 2

    return Squared


@program
def grads_of_inputs(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            m = squared(nn)()
            call = lambda m, *xs: m(*xs)  # noqa: E731
            with_aux = lambda m, *xs: (m(*xs), 3.0)  # noqa: E731
            y = X[:1] * 2
            return [
                nn.grad(call, m, x),
                nn.grad(call, m, x, y),
                nn.grad(with_aux, m, x, has_aux=True),
                nn.value_and_grad(call, m, x),
                nn.value_and_grad(call, m, x, y),
                nn.value_and_grad(with_aux, m, x, y, has_aux=True),
            ]

    return both(Foo(), X)


# --- jvp


@program
def jvp_of_the_seeds(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            lin = nn.Lin()
            tangents = jax.tree.map(jnp.ones_like, lin.variables.get("params", {}))
            return nn.jvp(
                lambda m, x: m(x),
                lin,
                (x,),
                (jnp.zeros_like(x),),
                variable_tangents={"params": tangents},
            )

    return both(Foo(), X)


@program
def jvp_of_inputs_alone(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            lin = nn.Sequence([nn.Lin(), nn.Count(), nn.Drop()]) if hasattr(nn, "S") else nn.Count()
            return nn.jvp(lambda m, x: m(x), lin, (x,), (jnp.ones_like(x),), variable_tangents={})

    return both(Foo(), X)


# --- custom_vjp


@program
def custom_vjp_of_the_seeds(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def f(mdl: Any, x: Any) -> Any:
                return mdl(x)

            def fwd(mdl: Any, x: Any) -> Any:
                return nn.vjp(f, mdl, x)

            def bwd(vjp_fn: Any, y_t: Any) -> Any:
                params_t, *inputs_t = vjp_fn(y_t)
                return (jax.tree.map(jnp.sign, params_t), *inputs_t)

            return nn.custom_vjp(f, forward_fn=fwd, backward_fn=bwd)(nn.Lin(1), x).sum()

    model = Foo()
    variables = model.init(KEY, X)
    return variables, jax.value_and_grad(model.apply, argnums=(0, 1))(variables, X)


@program
def custom_vjp_with_nondiff_arguments(nn: Any) -> Any:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def f(mdl: Any, k: Any, x: Any) -> Any:
                return mdl(x) * k

            def fwd(mdl: Any, k: Any, x: Any) -> Any:
                y, pull = nn.vjp(lambda m, x: m(x) * k, mdl, x)
                return y, pull

            def bwd(k: Any, pull: Any, y_t: Any) -> Any:
                params_t, x_t = pull(y_t)
                return params_t, x_t * 100 + k

            run = nn.custom_vjp(f, forward_fn=fwd, backward_fn=bwd, nondiff_argnums=(1,))
            return run(nn.Lin(1), 3, x).sum()

    model = Foo()
    variables = model.init(KEY, X)
    return variables, jax.value_and_grad(model.apply, argnums=(0, 1))(variables, X)


@program
def custom_vjp_with_state_and_keys(nn: Any) -> Any:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Count()(nn.Drop()(nn.Lin()(x)))

    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def f(mdl: Any, x: Any) -> Any:
                return mdl(x)

            def fwd(mdl: Any, x: Any) -> Any:
                return nn.vjp(f, mdl, x)

            def bwd(pull: Any, y_t: Any) -> Any:
                params_t, *inputs_t = pull(y_t)
                return (jax.tree.map(lambda g: g * 2, params_t), *inputs_t)

            y = nn.custom_vjp(f, forward_fn=fwd, backward_fn=bwd)(Inner(), x)
            return y.sum(), nn.Drop()(x)

    model = Foo()
    variables = model.init({"params": KEY, "dropout": quick_key(1)}, X)

    def loss(params: Any, state: Any) -> Any:
        (y, z), new = model.apply(
            {"params": params, "state": state},
            X,
            rngs={"dropout": quick_key(2)},
            mutable=["state"],
        )
        return y, (z, new)

    return variables, jax.value_and_grad(loss, has_aux=True)(
        variables["params"], jax.tree.map(jnp.asarray, variables["state"])
    )
