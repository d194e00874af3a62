"""How often bodies are traced, what jit keeps, and that nothing leaks or grows."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.timing import calls_of
from tests.core.harness import OURS as nn
from tests.core.harness import quick_key

KEY = quick_key(0)
X = jnp.ones((2, 3))
TRACED: Counter[str] = Counter()


class Step(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        TRACED["step"] += 1
        return jnp.sin(nn.Lin()(x)), None


def nested_scan(depth: int, lift: Any = lambda target: target) -> Any:
    """`Step` in `depth` scans."""
    target: Any = lift(Step)
    for _ in range(depth):
        inner = scan_of(target)

        class Mid(nn.Module):
            layers: Any = inner

            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                return self.layers(name="layers")(x, None)[0], None

        target = Mid
    return target


def scan_of(target: Any) -> Any:
    return nn.scan(
        target,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
        metadata_params={"partition_name": "layers"},
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_scanned_body_is_traced_once(depth: int) -> None:
    model = nested_scan(depth)()
    TRACED.clear()
    variables = jax.eval_shape(model.init, KEY, X, None)
    assert TRACED["step"] == 1
    jax.eval_shape(model.apply, variables, X, None)
    assert TRACED["step"] == 2
    jax.eval_shape(jax.grad(lambda v: model.apply(v, X, None)[0].sum()), variables)
    assert TRACED["step"] == 3


def test_rematerialisation_traces_once() -> None:
    model = nested_scan(2, nn.remat)()
    variables = jax.eval_shape(model.init, KEY, X, None)
    TRACED.clear()
    jax.eval_shape(jax.grad(lambda v: model.apply(v, X, None)[0].sum()), variables)
    assert TRACED["step"] == 1


# --- jit: its cache keeps what tracing did on the Python side


class Busy(nn.Module):
    """Sows, counts and draws; its trace is counted."""

    tag: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        TRACED["busy"] += 1
        y = nn.Count()(nn.Sow()(nn.Lin()(x)))
        return y + jax.random.uniform(self.make_rng("dropout"), x.shape)


Jitted = nn.jit(Busy)


def test_a_cache_hit_does_not_trace_and_keeps_state() -> None:
    rngs = {"dropout": quick_key(1)}
    variables = Jitted().init({"params": KEY, **rngs}, X)
    TRACED.clear()
    runs = [Jitted().apply(variables, X, rngs=rngs, mutable=["state", "intermediates"])]
    runs += [Jitted().apply(variables, X, rngs=rngs, mutable=["state", "intermediates"])]
    assert TRACED["busy"] == 1
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert runs[1][1]["intermediates"]["Sow_0"]["x"][0].shape == (2, 3)
    assert runs[1][1]["state"]["Count_0"]["count"] == 1


def test_a_cache_hit_keeps_counts() -> None:
    """The second call of one module draws other numbers, compiled or not."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = Jitted()
            return layer(x) - layer(x), self.make_rng("dropout")

    rngs = {"dropout": quick_key(1)}
    variables = Twice().init({"params": KEY, **rngs}, X)
    first, second = (Twice().apply(variables, X, rngs=rngs, mutable=["state"]) for _ in range(2))
    TRACED.clear()
    jax.tree.map(np.testing.assert_array_equal, first[0][0], second[0][0])
    assert jnp.any(first[0][0] != 0)
    Twice().apply(variables, X, rngs=rngs, mutable=["state"])
    assert TRACED["busy"] == 0


def test_instances_in_other_places_share_a_compilation_only_if_equal() -> None:
    class Holder(nn.Module):
        tags: tuple[Any, ...]

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for tag in self.tags:
                x = Tagged(tag, parent=None).apply({}, x)
            return x

    class Plain(nn.Module):
        tag: Any

        def __call__(self, x: Any) -> Any:
            TRACED["plain"] += 1
            return x * self.tag

    Tagged = nn.jit(Plain)
    TRACED.clear()
    assert hash(-1) == hash(-2)
    y = Holder((-1, -2, -1, 3, True, 1, 1.0)).apply({}, X)
    np.testing.assert_array_equal(y, X * -1 * -2 * -1 * 3)
    assert TRACED["plain"] == 6  # one and True and 1.0 are equal, and yet not the same


def test_arrays_in_fields_count_by_identity() -> None:
    class Scale(nn.Module):
        by: Any

        def __call__(self, x: Any) -> Any:
            return x * self.by

    two, three = jnp.full(3, 2.0), jnp.full(3, 3.0)
    model = nn.jit(Scale)
    assert model(two).apply({}, X)[0, 0] == 2 and model(three).apply({}, X)[0, 0] == 3
    assert model({"a": two}["a"]).apply({}, X)[0, 0] == 2


def test_static_arguments_count_the_module_as_the_first() -> None:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, n: Any, *, flag: Any = False) -> Any:
            TRACED["static"] += 1
            assert isinstance(n, int) and isinstance(flag, bool)
            return x * n if flag else x

    model = nn.jit(M, static_argnums=2, static_argnames="flag")
    TRACED.clear()
    results = [model().apply({}, X, n, flag=f) for n in (2, 3) for f in (True, False, True)]
    assert [float(r[0, 0]) for r in results] == [2, 1, 2, 3, 1, 3]
    assert TRACED["static"] == 4


def test_donated_arguments() -> None:
    class M(nn.Module):
        def __call__(self, x: Any, y: Any) -> Any:
            return x + y

    x, y = jnp.ones((4, 4)), jnp.ones((4, 4))
    nn.jit(M, donate_argnums=(1,))().apply({}, x, y)
    assert x.is_deleted() and not y.is_deleted()


# --- leaks, threads, depth


@pytest.mark.parametrize("kind", ["jit", "remat", "vmap", "scan"])
@pytest.mark.usefixtures("checking_leaks")
def test_no_tracer_leaks(kind: str) -> None:
    over = {"variable_axes": {"params": 0, "intermediates": 0}, "split_rngs": {"params": True}}

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return nn.Sow()(nn.Lin()(x)), x.sum()

    options = {
        "jit": {},
        "remat": {},
        "vmap": {**over, "in_axes": (0, None)},
        "scan": {**over, "length": 2},
    }
    lifted = getattr(nn, kind)(Block, **options[kind])

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = lifted()
            return nn.Lin()(layer(x, None)[0])

    model = Model()
    variables = jax.jit(model.init)(KEY, X)
    loss = lambda v: model.apply(v, X, mutable=["intermediates"])[0].sum()  # noqa: E731
    assert jax.tree.structure(jax.jit(jax.grad(loss))(variables)) == jax.tree.structure(variables)


def test_threads_do_not_share_modules() -> None:
    meeting = threading.Barrier(2, timeout=300)
    made: dict[str, Any] = {}

    class Slow(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            meeting.wait()
            x = nn.Lin()(x)
            meeting.wait()
            return nn.Lin()(x)

    def work(name: str) -> None:
        with nn.intercept_methods(lambda call, args, kwargs, _: call(*args, **kwargs)):
            made[name] = Slow().init(KEY, X)

    threads = [threading.Thread(target=work, args=(n,)) for n in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jax.tree.map(np.testing.assert_array_equal, made["a"], made["b"])
    assert sorted(made["a"]["params"]) == ["Lin_0", "Lin_1"]


class Noop(nn.Module):
    def __call__(self, x: Any) -> Any:
        return x


class Many(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.n):
            x = Noop()(x)
        return x


def test_many_submodules_are_linear() -> None:
    small, large = (calls_of(lambda n=n: Many(n).apply({}, 0)) for n in (100, 1000))
    assert large < 10.5 * small


def test_deep_nesting_is_linear() -> None:
    class Deep(nn.Module):
        n: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            w = self.variable("state", "w", lambda: 0)
            return Deep(self.n - 1)(x) + w.value if self.n else x

    def cost(n: int) -> int:
        return calls_of(lambda: Deep(n).apply({}, 0, mutable=True))

    cost(2)
    assert cost(100) < 11 * cost(10)
