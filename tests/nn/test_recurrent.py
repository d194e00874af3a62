"""Recurrent layers beyond the matrix: against Flax with all options, traces, meshes, errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax.nn.errors import CarryShapeError, InputRankError, SequenceError
from shardflax.nn.recurrent import SharedParametersWarning
from shardflax.partitioning import init_sharded, make_mesh, preset, use
from tests.core.harness import quick_key
from tests.nn.matrix import close, one_program, same
from tests.nn.row import floats

X = floats(2, 4, 5)
LENGTHS: Any = np.array([2, 4])
CELLS = ["SimpleCell", "GRUCell", "MGUCell", "LSTMCell", "OptimizedLSTMCell"]
normal, uniform = flax.linen.initializers.normal, flax.linen.initializers.uniform

# The default draws orthogonal matrices, which takes long to compile.
DRAWN: dict[str, Any] = {"kernel_init": uniform(1.0), "recurrent_kernel_init": uniform(1.0)}


def both(program: Callable[[Any], Any]) -> Any:
    """A program on both namespaces, compiled as a whole, must give the same; calls for ours."""
    ours, theirs = (jax.jit(lambda n=n: program(n)).lower() for n in (nn, flax.linen))
    compiled = functools.cache(lambda: ours.compile()())
    if not one_program(ours, theirs):
        same(compiled(), theirs.compile()())
    return compiled


@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_other_dtypes_and_with_drawn_carries(kind: str) -> None:
    drawn = {**DRAWN, "carry_init": uniform(1.0)}

    def program(n: Any) -> Any:
        results: list[Any] = []
        for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.float16}):
            cell = getattr(n, kind)(3, **drawn, **options)
            carry = cell.initialize_carry(quick_key(1), X.shape)
            variables = cell.init(quick_key(0), carry, X)
            results += [carry, variables, cell.apply(variables, carry, X)]
        return results

    both(program)


def test_convolutional_memory() -> None:
    images = floats(2, 3, 4, 5, 2)

    def program(n: Any) -> Any:
        cell = n.ConvLSTMCell(3, (3, 2), use_bias=False, carry_init=normal(1.0))
        layer = n.RNN(cell, return_carry=True)
        variables = layer.init(quick_key(0), images)
        return variables, layer.apply(variables, images, init_key=quick_key(3))

    both(program)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"time_major": True}])
def test_options_of_the_call(options: dict[str, Any]) -> None:
    x = jnp.swapaxes(X, 0, 1) if "time_major" in options else X
    carry = (floats(2, 3, seed=1), floats(2, 3, seed=2))
    calls: list[dict[str, Any]] = [
        {},
        {"seq_lengths": LENGTHS},
        {"seq_lengths": np.array([9, 3]), "keep_order": True, "return_carry": True},
        {"initial_carry": carry, "return_carry": True},
    ]

    def program(n: Any) -> Any:
        layer = n.RNN(n.LSTMCell(3, **DRAWN))
        variables = layer.init(quick_key(0), X)
        return variables, [layer.apply(variables, x, **options, **call) for call in calls]

    both(program)


def test_no_batch_several_batch_dims_and_both_directions() -> None:
    def program(n: Any) -> Any:
        pair = n.Bidirectional(n.RNN(n.GRUCell(3)), n.RNN(n.SimpleCell(3)), merge_fn=jnp.subtract)
        variables = pair.init(quick_key(0), X)
        carries = floats(2, 3), floats(2, 3, seed=1)
        return [
            variables,
            pair.apply(variables, X[0]),
            pair.apply(variables, X[None], seq_lengths=LENGTHS[None]),
            pair.apply(variables, X, initial_carry=carries, init_key=quick_key(1)),
        ]

    both(program)


def test_both_directions_with_time_first_and_carries() -> None:
    def program(n: Any) -> Any:
        rnns = n.RNN(n.GRUCell(3, **DRAWN)), n.RNN(n.LSTMCell(3, **DRAWN), unroll=2)
        pair = n.Bidirectional(*rnns, time_major=True, return_carry=True)
        variables = pair.init(quick_key(0), X)
        x = jnp.swapaxes(X, 0, 1)
        return variables, [
            pair.apply(variables, x),
            pair.apply(variables, x, seq_lengths=LENGTHS),
            pair.apply(variables, X, time_major=False, return_carry=False),
        ]

    both(program)


def base_of(n: Any) -> Any:
    """The base of cells with a state of three features, zero at first."""

    class Base(n.RNNCellBase):
        @n.nowrap
        def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
            return jnp.zeros((*input_shape[:-1], 3))

        @property
        def num_feature_axes(self) -> int:
            return 1

    return Base


def test_fields_that_are_those_of_scan() -> None:
    """Variables carried from step to step, and variables and keys of each step."""

    def program(n: Any, rate: float = 0.0, split: bool = True) -> Any:
        class Noisy(base_of(n)):
            @n.compact
            def __call__(self, carry: Any, x: Any) -> Any:
                steps = self.variable("steps", "count", lambda: jnp.zeros(()))
                log = self.variable("log", "x", lambda: jnp.zeros(x.shape))
                x = n.Dropout(rate, deterministic=False)(jnp.ones_like(x) + steps.value)
                steps.value, log.value = steps.value + 1, x
                return carry + x[..., :3], x

        layer = n.RNN(
            Noisy(),
            variable_carry="steps",
            variable_axes={"log": 0},
            split_rngs={"params": False, "dropout": split},
        )
        state = {"steps": {"cell": {"count": jnp.ones(())}}}
        rngs = {"dropout": quick_key(1)}
        return layer.apply(state, X, rngs=rngs, mutable=["steps", "log"])

    y, wrote = both(program)()
    assert wrote["steps"]["cell"]["count"] == 5
    same(wrote["log"]["cell"]["x"], jnp.swapaxes(y, 0, 1))
    masks = [jax.jit(lambda s=s: program(nn, 0.5, s)[0] > 0)() for s in (False, True)]
    equal = [bool((mask == mask[:, :1]).all()) for mask in masks]
    assert equal == [True, False], "one key for all steps, or one for each"


def test_carries_of_several_batch_dims() -> None:
    """Linen's have another shape than the batch here."""
    layer = nn.RNN(nn.GRUCell(3), return_carry=True)

    @jax.jit
    def both() -> Any:
        variables = layer.init(quick_key(0), X)
        one, _ = layer.apply(variables, X, seq_lengths=LENGTHS)
        several, _ = layer.apply(variables, X[:, None], seq_lengths=LENGTHS[:, None])
        return several[:, 0], one

    same(*both())


def test_one_rnn_for_both_directions_is_said() -> None:
    rnn = nn.RNN(nn.GRUCell(3))
    with pytest.warns(SharedParametersWarning, match="Bidirectional .* the same parameters"):
        shapes = jax.eval_shape(nn.Bidirectional(rnn, rnn).init, quick_key(0), X)
    assert [*shapes["params"]] == ["forward_rnn"]


def test_cells_shared_and_written_by_users() -> None:
    def program(n: Any) -> Any:
        class Own(base_of(n)):
            @n.compact
            def __call__(self, carry: Any, x: Any) -> Any:
                kernel = self.param("kernel", normal(1.0), (5, 3))
                seen = self.variable("seen", "x", jnp.zeros, x.shape)
                carry = n.Dense(3)(carry) + x @ kernel + self.param("bias", normal(1.0), (3,))
                return carry, carry + seen.value[..., :3]

        class Model(n.Module):
            @n.compact
            def __call__(self, x: Any) -> Any:
                cell = n.LSTMCell(3)
                twice = n.RNN(cell)(x), n.RNN(cell, reverse=True)(x)
                own = n.RNN(Own(), variable_broadcast=["params", "seen"], unroll=2)
                return twice, own(x)

        variables = Model().init(quick_key(0), X)
        return variables, Model().apply(variables, X)

    both(program)


def test_the_body_is_traced_once() -> None:
    traces: list[int] = []

    class Counting(nn.GRUCell):
        @nn.compact
        def __call__(self, carry: Any, inputs: Any) -> Any:
            traces.append(1)
            return super().__call__(carry, inputs)

    layer = nn.RNN(Counting(3))
    variables = jax.eval_shape(layer.init, quick_key(0), X)
    assert len(traces) == 1
    jax.eval_shape(jax.grad(lambda v: layer.apply(v, X).sum()), variables)
    assert len(traces) == 2


@pytest.mark.parametrize("kind", ["LSTMCell", "OptimizedLSTMCell"])
def test_on_a_mesh(kind: str) -> None:
    """Batch and features are spread through the loop, the same numbers come out."""
    layer, x = nn.RNN(getattr(nn, kind)(8), return_carry=True), floats(8, 3, 8)
    plain = jax.jit(layer.init)(quick_key(0), x)
    expected = jax.jit(layer.apply)(plain, x)
    mesh, rules = make_mesh("data=2,fsdp=2,tensor=2"), preset("fsdp_tp")
    state, _ = init_sharded(lambda: layer.init(quick_key(0), x), mesh=mesh, rules=rules)
    with use(mesh, rules):
        carry, y = jax.jit(layer.apply)(state, x)
    close((carry, y), expected)
    assert carry[1].sharding.spec == jax.P(("data", "fsdp"), "tensor")


def test_flipped_sequences() -> None:
    for major in (False, True):
        x = jnp.swapaxes(X, 0, 1) if major else X
        for lengths in (None, LENGTHS):
            args = x, lengths, 1, major
            np.testing.assert_array_equal(
                nn.recurrent.flip_sequences(*args),
                flax.linen.recurrent.flip_sequences(*args),
            )
    steps, lengths = jnp.arange(200)[None], jnp.array([150], jnp.uint8)  # their sum is 350
    flipped = nn.recurrent.flip_sequences(steps, lengths, 1, False)
    assert flipped[0, [0, 149, 150]].tolist() == [149, 0, 199]


BAD: list[tuple[Callable[[], Any], type, str]] = [
    (lambda: nn.RNN(nn.GRUCell(3)).init(quick_key(0), X[0, 0]), InputRankError, r"GRUCell has"),
    (
        lambda: nn.RNN(nn.GRUCell(3)).init(quick_key(0), X, seq_lengths=np.ones(3, int)),
        SequenceError,
        r"`seq_lengths` has shape \(3,\), the batch dims of the inputs are \(2,\)",
    ),
    (
        lambda: nn.RNN(nn.GRUCell(3)).init(quick_key(0), X, seq_lengths=np.ones(2)),
        SequenceError,
        "must be integers, found float",
    ),
    (
        lambda: nn.GRUCell(3).init(quick_key(0), jnp.ones((2, 4)), X[:, 0]),
        CarryShapeError,
        r"the carry has shape \(2, 4\), expected \(2, 3\) for inputs of shape \(2, 5\)",
    ),
    (
        lambda: nn.LSTMCell(3).init(quick_key(0), (jnp.ones(3), jnp.ones((4, 3))), X[:, 0]),
        CarryShapeError,
        r"`h` of the carry has shape \(4, 3\)",
    ),
    (
        lambda: nn.SimpleCell(3).init(quick_key(0), jnp.ones(3), jnp.float32(1)),
        InputRankError,
        "at least 1 dim",
    ),
    (
        lambda: nn.ConvLSTMCell(3, (2, 2)).init(quick_key(0), (X, X), X[0]),
        InputRankError,
        "2 spatial dims",
    ),
]


@pytest.mark.parametrize(("fails", "error", "message"), BAD)
def test_errors(fails: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        jax.eval_shape(fails)
