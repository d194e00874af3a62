"""What modules must stand: threads, depth, leak checks, pickles, compiled names, odd classes."""

from __future__ import annotations

import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import cloudpickle
import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as real
from benchmarks.timing import calls_of
from shardflax import errors
from tests.core.harness import OURS as nn
from tests.core.harness import THEIRS, quick_key

KEY = quick_key(0)
T = TypeVar("T")
X = jnp.ones((2, 3))


class Block(nn.Module):
    width: int = 3
    inner: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Lin(self.width)(x)
        return x if self.inner is None else self.inner(x)


class Noop(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x


# --- threads


def test_threads_share_no_state() -> None:
    """Two threads take turns inside of init, apply and interceptors, and see only their own."""
    barrier = threading.Barrier(2, timeout=300)

    def work(width: int) -> Any:
        seen: list[Any] = []

        def record(call: Any, args: Any, kwargs: Any, told: Any) -> Any:
            seen.append(told.module.name)
            barrier.wait()
            return call(*args, **kwargs)

        model = Block(width, Block(width + 1))
        with nn.intercept_methods(record):
            variables = model.init(KEY, X)
            barrier.wait()
            y = model.apply(variables, X)
        return seen, jax.tree.map(jnp.shape, variables), y.shape

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, (3, 5))
    names = ["Lin_0", "inner", "Lin_0"]
    assert first[0] == second[0] == [None, *names, None, *names]
    assert (first[2], second[2]) == ((2, 4), (2, 6))
    assert first[1]["params"]["inner"]["Lin_0"]["kernel"] == (3, 4)
    assert second[1]["params"]["inner"]["Lin_0"]["kernel"] == (5, 6)


def test_threads_take_turns_with_a_bound_module() -> None:
    met = threading.Event()

    class Slow(nn.Module):
        inner: Any

        def setup(self) -> None:
            self.layer = nn.Lin()
            met.set()  # the other thread comes now, and has to wait

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(name="out")(self.layer(self.inner(x))) + nn.Drop("noise")(x)

    model, keys = Slow(nn.Lin()), {"params": KEY, "noise": quick_key(1)}
    bound = model.bind(model.init(keys, X), rngs=keys)
    met.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bound, X)
        met.wait(timeout=300)
        second = pool.submit(lambda: bound.layer(bound(X)))
        assert first.result().shape == second.result().shape == (2, 3)
    again = model.bind(bound.variables, rngs=keys)
    assert (first.result() == again(X)).all() and (second.result() == again.layer(again(X))).all()


def test_override_of_names_holds_in_its_thread() -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> set[str]:
        assert inside.wait(300)
        names = op_names(compiled(Block(), X))
        done.set()
        return names

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(other)
        with nn.override_named_call(False):
            inside.set()
            assert done.wait(300)
            assert op_names(compiled(Block(), X)) == set()
        assert found.result() == {"Block/Lin_0"}


# --- names in compiled programs


def compiled(model: Any, x: Any) -> Any:
    variables = type(model)(**fields(model)).init(KEY, x)
    return jax.jit(lambda v, x: model.apply(v, x)).lower(variables, x).compile().as_text()


def fields(model: Any) -> dict[str, Any]:
    return {"width": model.width, "inner": model.inner}


def op_names(text: Any) -> set[str]:
    """The module paths in the metadata of compiled operations."""
    found = re.findall(r'op_name="jit\([^)]*\)/([^"]*)/dot_general"', text)
    return set(found)


def test_compiled_programs_carry_module_paths() -> None:
    model = Block(3, Block(4, None, name="kept"))
    names = op_names(compiled(model, X))
    assert names == {"Block/Lin_0", "Block/inner/Lin_0"}


def test_paths_are_those_of_linen() -> None:
    def program(space: Any) -> set[str]:
        class Two(space.Module):
            def setup(self) -> None:
                self.first = space.Lin()

            def __call__(self, x: Any) -> Any:
                return self.helper(self.first(x))

            def helper(self, x: Any) -> Any:
                return x @ x.T @ self.first(x)

        model = Two()
        variables = model.init(KEY, X)
        return op_names(jax.jit(model.apply).lower(variables, X).compile().as_text())

    assert program(nn) == program(THEIRS) != set()


def test_named_calls_can_be_switched_off() -> None:
    real.disable_named_call()
    try:
        assert op_names(compiled(Block(), X)) == set()
        with real.override_named_call():
            assert op_names(compiled(Block(), X)) == {"Block/Lin_0"}
            with real.override_named_call(False):
                assert op_names(compiled(Block(), X)) == set()
    finally:
        real.enable_named_call()
    assert op_names(compiled(Block(), X)) == {"Block/Lin_0"}


# --- depth


class Beside(nn.Module):
    count: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.count):
            x = Noop()(x)
        return x


class Nested(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Nested(self.depth - 1)(x) if self.depth else x


class NestedByName(nn.Module):
    depth: int

    @nn.compact
    def run(self, x: Any) -> Any:
        return NestedByName(self.depth - 1).run(x) if self.depth else x

    def __call__(self, x: Any) -> Any:
        return self.run(x)


class Listed(nn.Module):
    count: int

    def setup(self) -> None:
        self.layers = [Noop() for _ in range(self.count)]

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("cls", [Beside, Nested, NestedByName, Listed])
def test_a_thousand_submodules_stay_linear(cls: Any) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        cls(10).apply({}, 1.0)
        # Python 3.12.1 itself ends at 498 instances that call one another: see docs/design.md.
        limited = cls is Nested and sys.version_info >= (3, 12)
        sizes = (120, 240, 480) if limited else (250, 500, 1000)
        counts = [calls_of(lambda n=n: cls(n).apply({}, 1.0)) for n in sizes]
    finally:
        sys.setrecursionlimit(limit)
    assert (counts[2] - counts[1]) <= 2.1 * (counts[1] - counts[0])


# --- leaks


@pytest.mark.parametrize("lazy", [False, True])
def test_nothing_leaks(lazy: bool) -> None:
    class Model(nn.Module):
        shared: Any

        def setup(self) -> None:
            self.table = {"a": nn.Lin(), "b": [self.shared]}

        def __call__(self, x: Any) -> Any:
            x = self.perturb("x", self.table["b"][0](self.table["a"](x)))
            self.sow("intermediates", "x", x)
            return jax.vmap(self.table["a"])(x)

    model = Model(nn.Count())
    with jax.checking_leaks():
        if lazy:
            variables = model.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
        else:
            variables = jax.jit(model.init)(KEY, X)
        run = jax.jit(lambda v: model.apply(v, X, mutable=True))
        run(variables)
        jax.make_jaxpr(jax.grad(lambda v: model.apply(v, X, mutable=True)[0].sum()))(
            {"params": variables["params"], "state": jax.tree.map(jnp.float32, variables["state"])}
        )


# --- pickles


def test_unbound_modules_are_pickled() -> None:
    model = real.Sequential([real.Dense(3, name="a"), real.Dense(2)])
    again = pickle.loads(pickle.dumps(model))
    assert again == model
    variables = model.init(KEY, X)
    assert (again.apply(variables, X) == model.apply(variables, X)).all()


def test_classes_of_a_function_are_pickled_by_cloudpickle() -> None:
    class Local(real.Module):
        width: int = 3

        def setup(self) -> None:
            self.layer = real.Dense(self.width)

        @property
        def twice(self) -> int:
            return 2 * self.width

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    again = cloudpickle.loads(cloudpickle.dumps(Local(2)))
    assert again.twice == 4
    variables = again.init(KEY, X)
    assert (again.apply(variables, X) == Local(2).apply(variables, X)).all()


# --- what Linen has no answer to


def test_name_scopes_lie_in_their_own_module() -> None:
    class Auto(nn.Module):
        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            return nn.Lin(4)(x)

        def __call__(self, x: Any) -> Any:
            return self.up(x)

    class Again(Auto):
        @nn.compact_name_scope
        def up(self, x: Any) -> Any:
            return nn.Lin(3)(super().up(x))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Again()(Auto()(x)) + nn.jit(Again)(name="jitted")(x)

    params = Model().init(KEY, X)["params"]
    assert sorted(params) == ["Again_0", "Auto_0", "jitted"]
    assert sorted(params["Again_0"]["up"]) == ["Lin_0", "Lin_1"]
    assert jax.tree.map(jnp.shape, params["jitted"]["up"]["Lin_1"])["kernel"] == (3, 4)


def test_shared_scopes_cross_lifts() -> None:
    class Adapter(nn.Module):
        base: Any

        def setup(self) -> None:
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.base(self.base(x)) + nn.Lin()(x)

    plain = Adapter(Block()).init_with_output
    with pytest.raises(errors.NameInUseError, match="'Lin_0'"):
        plain(KEY, X)  # both number their submodules from 0

    class Named(Adapter):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.base(self.base(x)) + nn.Lin(name="own")(x)

    model, lifted = Named(Block()), nn.remat(Named)(Block())
    variables = model.init(KEY, X)
    assert sorted(variables["params"]) == ["Lin_0", "own"]
    assert (lifted.apply(variables, X) == model.apply(variables, X)).all()
    assert jax.tree.structure(lifted.init(KEY, X)) == jax.tree.structure(variables)


def test_containers_cross_lifts() -> None:
    class Use(nn.Module):
        parts: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.parts["a"][0](x) + self.parts["n"]

    parts = {"a": [nn.Lin()], "n": 2}
    variables = Use(parts).init(KEY, X)
    y = Use(parts).apply(variables, X)
    for lift in (nn.jit, nn.remat):
        assert (lift(Use)(parts).apply(variables, X) == y).all()
        assert jax.tree.structure(lift(Use)(parts).init(KEY, X)) == jax.tree.structure(variables)


def test_a_generic_module_with_its_types_is_lifted() -> None:
    """Linen takes the alias for a function, and fails."""

    class Around(nn.Module, Generic[T]):
        inner: T

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.inner(x)  # type: ignore[operator]

    made = nn.remat(Around[int])(nn.Lin())
    assert type(made).__name__ == "CheckpointAround"
    assert sorted(jax.eval_shape(made.init, KEY, X)["params"]) == ["inner"]


def test_lazy_init_says_what_depends_on_a_value() -> None:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x * self.param("kernel", lambda _: x)

    with pytest.raises(errors.LazyInitError, match="params/kernel"):
        Foo().lazy_init(KEY, jax.ShapeDtypeStruct((8, 4), jnp.float32))


def test_two_compact_methods_of_which_one_is_inherited() -> None:
    with pytest.raises(errors.MultipleMethodsCompactError, match="__call__, other"):

        class More(Noop):  # pyright: ignore[reportUnusedClass]
            @nn.compact
            def other(self, x: Any) -> Any:
                return x


def test_errors_of_perturb_say_what_is_there() -> None:
    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.perturb("hidden", x)

    with pytest.raises(errors.PerturbationNotFoundError, match="did you mean 'hiden'"):
        Foo().apply({"perturbations": {"hiden": X}}, X)


def test_equal_modules_of_different_runs_are_different() -> None:
    one, two = nn.Lin(2).bind({}), nn.Lin(2).bind({})
    assert one != two and one == one and one.unbind()[0] == two.unbind()[0]
    with pytest.raises(errors.HashBoundModuleError, match="unbind"):
        hash(one)
