"""Lifted jit, vmap, scan and remat against Linen: classes, methods, functions, nesting."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.core.harness import both, quick_key, registry, same_arrays

KEY = quick_key(7)
X = jnp.arange(6.0).reshape(2, 3)
XS = jnp.arange(24.0).reshape(4, 2, 3)
program, PROGRAMS = registry()
FIXED = {"check_constancy_invariants": False}


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same_arrays(run)


def given(model: Any, *args: Any) -> Any:
    """Shapes at init, and apply with variables that no key has touched.

    For scans whose default check makes Linen draw its initial numbers after tracing twice.
    """
    shapes = jax.eval_shape(model.init, KEY, *args)
    variables = jax.tree.map(
        lambda s: jnp.linspace(0, 1, s.size).reshape(s.shape).astype(s.dtype), shapes
    )
    return variables, model.apply(variables, *args, mutable=["state"])


def block(nn: Any) -> Any:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any = None) -> Any:
            y = nn.Sow()(nn.Lin()(x))
            return nn.Count()(y), y.sum()

    return Block


# --- names


@program
def auto_names(nn: Any) -> Any:
    class Mid(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any = None) -> Any:
            return nn.Lin()(x), None

    over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x, _ = nn.remat(Mid)()(x)
            x, _ = nn.checkpoint(Mid)()(x)
            x, _ = nn.jit(Mid)()(x)
            x, _ = nn.vmap(Mid, **over)()(x)
            x, _ = nn.scan(Mid, length=2, **over, **FIXED)()(x, None)
            x, _ = nn.remat(nn.jit(Mid))()(x)
            x, _ = nn.scan(nn.remat(Mid), length=2, **over, **FIXED)()(x, None)
            return Mid()(x)[0]

    return both(M(), X)


# --- scan


def stack(nn: Any, **options: Any) -> Any:
    given = {
        "variable_axes": {"params": 0, "state": 0, "intermediates": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": 3,
        **FIXED,
    }
    return nn.scan(block(nn), **{**given, **options})


@program
def scan_plain(nn: Any) -> Any:
    return both(stack(nn)(), X, None)


@program
def scan_axis_one(nn: Any) -> Any:
    axes = {"params": 1, "intermediates": 1, "state": 0}
    return both(stack(nn, variable_axes=axes)(), X, None)


@program
def scan_in_and_out_only(nn: Any) -> Any:
    return both(
        stack(nn, variable_axes={"params": 0, "state": 0, "intermediates": nn.Out(0)})(), X, None
    )


@program
def scan_broadcast_mutable(nn: Any) -> Any:
    """A broadcast collection made in the body is computed once."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, c: Any, x: Any) -> Any:
            table = self.variable("consts", "table", lambda: jnp.arange(3.0))
            w = self.param("w", nn.uniform, (3,))
            return c + table.value * w, c * x

    model = nn.scan(Body, variable_broadcast=["params", "consts"], split_rngs={"params": False})
    return given(model(), X, XS)


@program
def scan_carry_made_before(nn: Any) -> Any:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, c: Any, x: Any) -> Any:
            n = self.variable("counter", "n", jnp.zeros, ())
            n.value += 1
            return c + n.value, n.value

    model = nn.scan(Body, variable_carry="counter", **FIXED)()
    variables = {"counter": {"n": jnp.ones(())}}
    return model.apply(variables, X, XS, mutable=["counter"])


@program
def scan_carry_in_submodule(nn: Any) -> Any:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, c: Any, x: Any) -> Any:
            return nn.Count()(c), x.sum()

    model = nn.scan(Body, variable_carry="state", **FIXED)()
    state = {"state": {"Count_0": {"count": jnp.int32(3), "total": X}}}
    return model.apply(state, X, XS, mutable=["state"])


@program
def scan_axes_of_arguments(nn: Any) -> Any:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, c: Any, x: Any, table: Any, fixed: Any) -> Any:
            y = nn.Lin()(c) + x + table["a"] + table["b"] * fixed
            return y, (y.sum(), y)

    model = nn.scan(
        Body,
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=(0, {"a": 1, "b": nn.broadcast}, nn.broadcast),
        out_axes=(0, 1),
    )
    table = {"a": jnp.ones((2, 4, 3)), "b": jnp.ones((2, 3))}
    return given(model(), X, XS, table, 2.0)


@program
def scan_broadcast_output(nn: Any) -> Any:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, c: Any, x: Any) -> Any:
            w = self.param("w", nn.uniform, (3,))
            return c + w, {"all": c, "once": w * 2}

    model = nn.scan(
        Body,
        variable_broadcast="params",
        split_rngs={"params": False},
        out_axes={"all": 0, "once": nn.broadcast},
    )
    return given(model(), X, XS)


@pytest.mark.parametrize("lift", ["remat", "jit"])
def test_broadcast_variables_made_in_a_call(lift: str) -> None:
    """What is made once is found also where a call computes it together with what changes."""

    def program(nn: Any) -> Any:
        class Body(nn.Module):
            @nn.compact
            def __call__(self, c: Any, x: Any) -> Any:
                return nn.Lin()(c) + x, c.sum()

        model = nn.scan(
            getattr(nn, lift)(Body), variable_broadcast="params", split_rngs={"params": False}
        )
        return given(model(), X, XS)

    same_arrays(program)


@program
def scan_reverse_unroll(nn: Any) -> Any:
    return [
        both(stack(nn, length=4, reverse=r, unroll=u)(), X, None)
        for r, u in ((True, 1), (False, 2))
    ]


@program
def scan_negative_axis(nn: Any) -> Any:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, c: Any, x: Any) -> Any:
            return nn.Lin()(c) + x, c

    model = nn.scan(
        Body,
        variable_axes={"params": -1},
        split_rngs={"params": True},
        in_axes=-1,
        out_axes=-1,
        **FIXED,
    )
    return both(model(), X, jnp.moveaxis(XS, 0, -1))


@program
def scan_nested(nn: Any) -> Any:
    axes = {"params": 0, "state": 0, "intermediates": 0}
    inner = stack(nn, length=2)

    class Mid(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            x = nn.Drop()(x)
            return inner()(nn.Lin()(x), None)

    model = nn.scan(Mid, axes, split_rngs={"params": True, "dropout": False}, length=3, **FIXED)
    return both(model(), X, None)


@program
def scan_method_decorator(nn: Any) -> Any:
    class M(nn.Module):
        features: int = 3

        @functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
        @nn.compact
        def __call__(self, c: Any, x: Any) -> Any:
            c = nn.Lin(self.features)(c) + x
            return c, c

    return given(M(), X, XS)


@program
def scan_function_of_module(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, xs: Any) -> Any:
            layer = nn.Lin()
            count = self.variable("state", "n", jnp.zeros, ())

            def simple(m: Any, c: Any, x: Any) -> Any:
                return m(c) + x, c.sum()

            over = nn.scan(simple, variable_broadcast="params", split_rngs={"params": False})
            count.value += 1
            return over(layer, xs[0], xs)

    return given(M(), XS)


@program
def scan_function_of_self(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, xs: Any) -> Any:
            def body(self: Any, c: Any, x: Any) -> Any:
                return nn.Lin()(c) + x, nn.Lin()(c)

            run = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
            before = nn.Lin()(xs[0])
            carry, ys = run(self, before, xs)
            return carry, ys, nn.Lin()(carry)

    return given(M(), XS)


@program
def several_modules_and_a_variable(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = nn.Lin()
            self.v = self.variable("state", "v", jnp.zeros, (2, 3))

        def __call__(self, x: Any) -> Any:
            def body(a: Any, b: Any, v: Any, x: Any) -> Any:
                v.value = v.value + 1
                return a(x) + b(x) + v.value

            run = nn.remat(body)
            return run(self.a, self.b, self.v, x), self.v.value, run(self.b, self.a, self.v, x)

    return both(M(), X)


@program
def a_module_its_child_and_its_variable(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = nn.Lin()
            self.v = self.variable("state", "v", jnp.zeros, (2, 3))

        def __call__(self, x: Any) -> Any:
            def body(m: Any, layers: Any, v: Any, x: Any) -> Any:
                v.value = v.value + 1
                return m.a(layers["b"](x)) + v.value

            return nn.jit(body)(self, {"b": self.b}, self.v, x), self.v.value

    return both(M(), X)


# --- vmap


@program
def vmap_plain(nn: Any) -> Any:
    model = nn.vmap(
        block(nn),
        variable_axes={"params": 0, "state": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=0,
    )
    return both(model(), XS)


@program
def vmap_ensemble(nn: Any) -> Any:
    model = nn.vmap(
        nn.Lin,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        in_axes=None,
        out_axes=-1,
        axis_size=5,
    )
    return both(model(), X)


@program
def vmap_shared(nn: Any) -> Any:
    model = nn.vmap(nn.Lin, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=1)
    return both(model(), XS)


@program
def vmap_methods(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.enc = nn.Lin()
            self.dec = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.decode(self.encode(x))

        def encode(self, x: Any) -> Any:
            return self.enc(x)

        def decode(self, x: Any) -> Any:
            return self.dec(x)

    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.vmap(M, methods=["__call__", "encode", "decode"], **options)()
    one = nn.vmap(M, methods=["encode"], **options)()
    variables = model.init(KEY, XS)
    return (
        variables,
        model.apply(variables, XS, method="encode"),
        one.init(KEY, XS, method="encode"),
    )


@program
def vmap_axes_trees(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, table: Any, *, scale: Any = 1.0) -> Any:
            y = nn.Lin()(x) * scale
            return y + table["a"], {"sum": y.sum() + table["b"]}

    model = nn.vmap(
        M,
        variable_axes={"params": None, "state": 0},
        split_rngs={"params": False},
        in_axes=(0, {"a": None, "b": 0}),
        out_axes=(1, {"sum": 0}),
    )
    return both(model(), XS, {"a": jnp.ones(3), "b": jnp.arange(4.0)})


@program
def vmap_axis_name(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x) - jax.lax.pmean(x, "batch")

    model = nn.vmap(
        M, variable_axes={"params": None}, split_rngs={"params": False}, axis_name="batch"
    )
    return both(model(), XS)


@program
def vmap_of_field_modules(nn: Any) -> Any:
    class M(nn.Module):
        layer: Any
        more: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.more[0](self.layer(x)) + nn.Lin()(x)

    model = nn.vmap(M, variable_axes={"params": 0}, split_rngs={"params": True})
    return both(model(nn.Lin(), (nn.Lin(), 3)), XS)


@program
def vmap_with_shared_outer_module(nn: Any) -> Any:
    class Inner(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.layer(nn.Lin()(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            shared = nn.Lin(name="shared")
            shared(x[0])
            wide = nn.vmap(Inner, variable_axes={"params": None}, split_rngs={"params": False})
            return wide(shared)(x)

    return both(M(), XS)


@program
def vmap_function(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Lin()
            wide = nn.vmap(
                lambda m, x: m(x), variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return wide(layer, x)

    return both(M(), XS)


# --- jit and remat


@pytest.mark.parametrize("lift", ["jit", "remat"])
@pytest.mark.parametrize("form", ["class", "method", "function", "self"])
def test_jit_and_remat(lift: str, form: str) -> None:
    def program(nn: Any) -> Any:
        transform = getattr(nn, lift)
        Block = block(nn)

        class Method(nn.Module):
            @transform
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Count()(nn.Sow()(nn.Lin()(x))), x.sum()

        class Function(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return transform(lambda m, x: m(x))(Block(), x)

        class Self(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                def body(self: Any, x: Any) -> Any:
                    return Block()(nn.Drop()(x))[0] + nn.Lin()(x)

                x = nn.Lin()(x)
                y = transform(body)(self, x)
                z = transform(body)(self, y)
                return y, z, nn.Lin()(x)

        made = {"class": transform(Block), "method": Method, "function": Function, "self": Self}

        class M(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                layer = made[form]()
                first, _ = layer(x)[:2]
                return layer(first), made[form]()(first)

        return both(M(), X)

    same_arrays(program)


@program
def jit_partly_mutable(nn: Any) -> Any:
    model = nn.jit(block(nn))()
    variables = model.init(KEY, X)
    return [
        model.apply(variables, X, mutable=m) for m in (["state"], ["state", "intermediates"], True)
    ]


@program
def jit_static_arguments(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, deep: Any, *, extra: Any = False) -> Any:
            y = nn.Lin()(x)
            y = nn.Lin()(y) if deep else y
            return y + 1 if extra else y

    by_number = nn.jit(M, static_argnums=(2,), static_argnames="extra")
    remat = nn.remat(M, static_argnums=(2,))
    return (
        [by_number().init_with_output(KEY, X, d, extra=e) for d in (True, False) for e in (1, 0)],
        [remat().init_with_output(KEY, X, d) for d in (True, False)],
    )


@program
def grads_through_remat_and_scan(nn: Any) -> Any:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return jnp.sin(nn.Lin()(x)), None

    model = nn.scan(
        nn.remat(Block, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        **FIXED,
    )()
    variables = model.init(KEY, X, None)
    return jax.grad(lambda v: model.apply(v, X, None)[0].sum())(variables)


@program
def inherited_methods_and_super(nn: Any) -> Any:
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    class Lifted(Base):
        @nn.remat
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return super().__call__(nn.Lin()(x))

    class OfLifted(nn.remat(Base)):  # type: ignore[misc]
        pass

    return both(Lifted(), X), both(OfLifted(), X), both(nn.jit(Lifted)(), X)


@program
def setup_modules_in_lifted_method(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = [nn.Lin(), nn.Lin()]

        @nn.jit
        def __call__(self, x: Any) -> Any:
            return self.helper(self.a(x))

        @nn.remat
        def helper(self, x: Any) -> Any:
            return self.b[1](x) + self.a(x)

    return both(M(), X)


@program
def lifted_method_after_setup_access(nn: Any) -> Any:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = nn.Lin()

        def __call__(self, x: Any) -> Any:
            y = self.a(x)
            return self.inner(y) + self.b(y)

        @nn.remat
        def inner(self, x: Any) -> Any:
            return self.b(self.a(x))

    return both(M(), X)


@program
def lifted_module_with_bound_field(nn: Any) -> Any:
    class Inner(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.layer(nn.Lin()(x))

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            shared = nn.Lin(name="shared")
            a = nn.remat(Inner)(shared)(x)
            b = nn.jit(Inner)(shared)(x)
            return a + b + shared(x)

    return both(M(), X)


@program
def empty_collections(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x * 2

    return [
        (lift(M)().init_with_output(KEY, X), lift(M)().apply({}, X, mutable=True))
        for lift in (nn.jit, nn.remat, nn.vmap)
    ]


# --- methods, each with options of its own


@program
def options_for_each_method(nn: Any) -> Any:
    class Pair(nn.Module):
        def setup(self) -> None:
            self.lin = nn.Lin()

        def __call__(self, x: Any) -> Any:
            return self.lin(x)

        def scaled(self, x: Any, y: Any) -> Any:
            return self.lin(x) * y

    over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    mapped = nn.vmap(Pair, methods={"__call__": over, "scaled": {**over, "in_axes": (0, None)}})
    variables = mapped().init(KEY, XS)
    return variables, mapped().apply(variables, XS, X, method="scaled")


# --- options that are about layouts and programs


@program
def scan_data_transform(nn: Any) -> Any:
    """What `data_transform` makes of the groups is what the body sees."""

    def doubled(variables: Any, rngs: Any) -> Any:
        return jax.tree.map(lambda x: 2 * x, variables), rngs

    model = stack(nn, variable_carry=(), data_transform=doubled, _split_transpose=True)()
    params = {"Lin_0": {"kernel": jnp.ones((3, 3, 3)) / 6, "bias": jnp.arange(9.0).reshape(3, 3)}}
    state = {"Count_0": {"count": jnp.zeros(3, jnp.int32), "total": jnp.ones((3, 2, 3))}}
    return model.apply({"params": params, "state": state}, X, None, mutable=["state"])


@program
def vmap_over_a_mesh_axis(nn: Any) -> Any:
    """`spmd_axis_name` puts the mapped dim on that axis, also in constraints inside."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.Lin()(x)
            spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
            y = jax.lax.with_sharding_constraint(y, spec)
            return jax.lax.psum(y, "i")

    over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_name": "i"}
    model = nn.vmap(Block, spmd_axis_name="data", **over)()
    variables = model.init(KEY, XS)
    return variables, model.apply(variables, XS)
