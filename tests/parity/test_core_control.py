"""Lifted cond, switch and while_loop against Linen."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from shardflax.core.boundary import Lift
from shardflax.core.cross import cross
from shardflax.core.rng import fold
from shardflax.core.transform_errors import BranchVariablesError
from tests.core.harness import OURS, THEIRS, both, quick_key, registry, same_arrays, same_error

KEY = quick_key(7)
X = jnp.arange(6.0).reshape(2, 3)
program, PROGRAMS = registry()


@pytest.mark.parametrize("run", PROGRAMS)
def test_same_as_linen(run: Any) -> None:
    same_arrays(run)


# --- cond


def counting(nn: Any) -> Any:
    """The example of the seeds: each branch counts, and both share a layer."""

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x: Any, pred: Any) -> Any:
            self.variable("state", "true", lambda: jnp.zeros((), jnp.int32))
            self.variable("state", "false", lambda: jnp.zeros((), jnp.int32))

            def true_fn(mdl: Any, x: Any) -> Any:
                mdl.variable("state", "true").value += 1
                return nn.Lin(2, name="lin")(x)

            def false_fn(mdl: Any, x: Any) -> Any:
                mdl.variable("state", "false").value += 1
                return -nn.Lin(2, name="lin")(x)

            return nn.cond(pred, true_fn, false_fn, self, x)

    return Counting()


@program
def cond_true(nn: Any) -> Any:
    return both(counting(nn), X, True)


@program
def cond_false(nn: Any) -> Any:
    return both(counting(nn), X, jnp.array(False))


@program
def cond_draws_keys(nn: Any) -> Any:
    """How a branch counts keys, and how the other and what follows go on from there."""

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, pred: Any) -> Any:
            before = nn.Drop()(x)

            def one(mdl: Any, x: Any) -> Any:
                return x + nn.uniform(mdl.make_rng("dropout"), x.shape)

            def other(mdl: Any, x: Any) -> Any:
                mdl.make_rng("dropout")
                return x + nn.uniform(mdl.make_rng("dropout"), x.shape)

            y = nn.cond(pred, one, other, self, x)
            z = nn.cond(~pred, one, other, self, x)
            return before, y, z, nn.uniform(self.make_rng("dropout"), x.shape), nn.Drop()(x)

    return both(M(), X, jnp.array(True)), both(M(), X, jnp.array(False))


@program
def cond_of_submodules(nn: Any) -> Any:
    """Several modules cross at once, and their parameters are shared with what is outside."""

    class M(nn.Module):
        def setup(self) -> None:
            self.a, self.b = nn.Lin(3), nn.Lin(3)

        def __call__(self, x: Any, pred: Any) -> Any:
            y = self.b(self.a(x))
            one = lambda m, x: m.a(x)  # noqa: E731
            other = lambda m, x: m.b(x)  # noqa: E731
            return nn.cond(pred, one, other, self, y) + self.a(y)

    return both(M(), X, True), both(M(), X, False)


@program
def cond_without_variables(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def has(mdl: Any, x: Any) -> Any:
                return x + float(mdl.has_variable("state", "n")) + float(mdl.has_rng("dropout"))

            self.variable("state", "n", lambda: 1.0)
            kept = nn.cond(True, has, has, self, x)
            return kept, nn.cond(True, has, has, self, x, variables="params", rngs=False)

    return both(M(), X)


@program
def cond_structured(nn: Any) -> Any:
    """Operands and results are trees; sow in both branches."""

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, pred: Any) -> Any:
            lin = nn.Lin(3)

            def one(mdl: Any, t: Any, s: Any) -> Any:
                mdl.sow("intermediates", "h", t["a"])
                return {"y": lin(t["a"]), "z": (s,)}

            def other(mdl: Any, t: Any, s: Any) -> Any:
                mdl.sow("intermediates", "h", t["b"])
                return {"y": t["b"], "z": (s * 2,)}

            if self.is_initializing():
                lin(x)
            return nn.cond(pred, one, other, self, {"a": x, "b": x + 1}, 3.0)

    return both(M(), X, False)


@program
def cond_names_submodules(nn: Any) -> Any:
    """Automatic names start alike in each branch, so the branches share."""

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def twice(mdl: Any, x: Any) -> Any:
                return nn.Lin(3)(nn.Lin()(x))

            nn.Lin()(x)
            return nn.Lin(4)(nn.cond(True, twice, lambda m, x: -twice(m, x), self, x))

    return both(M(), X)


# --- switch


@program
def switch_counts(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any, index: Any) -> Any:
            def branch(name: str, sign: float) -> Any:
                def fn(mdl: Any, x: Any) -> Any:
                    mdl.variable("state", name).value += 1
                    return sign * nn.Lin(2, name="lin")(x)

                return fn

            for name in "abc":
                self.variable("state", name, lambda: jnp.zeros((), jnp.int32))
            return nn.switch(index, [branch("a", 1), branch("b", -1), branch("c", 2)], self, x)

    return [both(M(), X, i) for i in range(3)]


@program
def switch_heads(nn: Any) -> Any:
    """Different parameters a branch: all of them run at init."""

    class M(nn.Module):
        def setup(self) -> None:
            self.heads = [nn.Lin(4), nn.Lin(4, use_bias=False), nn.Lin(4)]

        @nn.compact
        def __call__(self, x: Any, index: Any) -> Any:
            def head(i: int) -> Any:
                return lambda mdl, x: mdl.heads[i](x)

            branches = [head(i) for i in range(3)]
            if self.is_mutable_collection("params"):
                for branch in branches:
                    branch(self, x)
            return nn.switch(index, branches, self, x)

    return both(M(), X, 0), both(M(), X, jnp.array(2))


# --- while_loop


@program
def while_of_the_seeds(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def cond_fn(mdl: Any, c: Any) -> Any:
                return mdl.get_variable("state", "acc") < 10

            def body_fn(mdl: Any, c: Any) -> Any:
                acc = mdl.variable("state", "acc", lambda: jnp.array(0))
                acc.value += 1
                return nn.Lin(c.shape[-1])(c) / 4

            if self.is_mutable_collection("params"):
                return body_fn(self, x)
            return nn.while_loop(cond_fn, body_fn, self, x, carry_variables="state")

    return both(M(), X)


@program
def while_draws_keys(nn: Any) -> Any:
    """Keys in the body and in the condition, split over iterations or not."""

    class M(nn.Module):
        split: bool

        @nn.compact
        def __call__(self, x: Any) -> Any:
            def cond_fn(mdl: Any, c: Any) -> Any:
                key = mdl.make_rng("dropout")
                return (c[0] < 3) & (nn.uniform(key, ()) < 2)

            def body_fn(mdl: Any, c: Any) -> Any:
                i, y = c
                return i + 1, y + nn.uniform(mdl.make_rng("dropout"), y.shape)

            nn.Drop()(x)
            out = nn.while_loop(cond_fn, body_fn, self, (0, x), split_rngs={"dropout": self.split})
            return out, nn.uniform(self.make_rng("dropout"), ())

    return both(M(True), X), both(M(False), X)


@program
def while_reads_broadcast_variables(nn: Any) -> Any:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            lin = nn.Lin(3)
            y = lin(x)
            return nn.while_loop(
                lambda m, c: c[0] < 2, lambda m, c: (c[0] + 1, m(c[1]) / 4), lin, (0, y)
            )

    return both(M(), X)


# --- errors


def test_a_write_of_broadcast_variables_in_a_loop_is_refused() -> None:
    def run(nn: Any) -> Any:
        class M(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                self.variable("state", "n", lambda: 0)

                def body(mdl: Any, c: Any) -> Any:
                    mdl.put_variable("state", "n", 1)
                    return c + 1

                return nn.while_loop(lambda m, c: c < 3, body, self, 0)

        return M().apply({"state": {"n": 0}}, X, mutable=["state"])

    same_error(run, "ModifyScopeVariableError")


def test_branches_that_write_different_variables_are_told_apart() -> None:
    def run(nn: Any) -> Any:
        class Gate(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.cond(True, lambda m, x: nn.Lin(3)(x), lambda m, x: x, self, x)

        return Gate().init(KEY, X)

    with pytest.raises(TypeError):
        run(THEIRS)
    with pytest.raises(BranchVariablesError) as error:
        run(OURS)
    text = str(error.value)
    assert "branch 0 writes params/Lin_0/bias: float32[3], params/Lin_0/kernel" in text
    assert "branch 1 writes nothing" in text


def test_results_of_other_shapes_are_jax_s_error() -> None:
    class Gate(OURS.Module):
        def __call__(self, x: Any) -> Any:
            return OURS.cond(True, lambda m, x: x, lambda m, x: x.sum(), self, x)

    with pytest.raises(TypeError) as error:
        Gate().apply({}, X)
    assert not isinstance(error.value, BranchVariablesError)


@pytest.mark.parametrize("traces", [1, 3])
def test_numbers_do_not_depend_on_how_often_jax_traces(traces: int) -> None:
    """The second function counts keys on from the first, however often that was traced."""

    def run(pure: Any, state: Any) -> Any:
        for _ in range(traces):
            first, _ = pure.branch(0)(state)
        second, groups = pure.branch(1, turn=1)(state)
        pure.branch(0)(state)
        return (first, second), groups

    class Draws(OURS.Module):
        def __call__(self) -> Any:
            draw = lambda m: m.make_rng("dropout")  # noqa: E731
            found = cross(Lift(run), [draw, draw], (self,))
            return [*found, self.make_rng("dropout")]

    keys = Draws().apply({}, rngs={"dropout": KEY})
    assert keys == [fold(KEY, (i,)) for i in (1, 2, 3)]
