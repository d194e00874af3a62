"""Products in eight bits: Flax's numbers, and a state that survives stacks, meshes and training."""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from typing import Any

import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardflax.nn as nn
from shardflax.nn.errors import NNError
from shardflax.partitioning import init_sharded, make_mesh, preset, use
from shardflax.training import TrainState
from tests.core.harness import quick_key
from tests.nn.matrix import close, same
from tests.nn.row import floats

X = 3 * floats(2, 4, 8)
STATE = "_overwrite_with_gradient"
OPS = ["Fp8DotGeneralOp", "Fp8DirectDotGeneralOp", "NANOOFp8DotGeneralOp"]


@contextlib.contextmanager
def deprecated_in_flax() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=DeprecationWarning)
        yield


def both(program: Any) -> Any:
    """Runs a program on both namespaces, compiled as a whole; the results must be equal."""
    with deprecated_in_flax():
        theirs = jax.jit(lambda: program(flax.linen))()
    ours = jax.jit(lambda: program(nn))()
    same(ours, theirs)
    return ours


def steps(layer: Any, variables: Any, x: Any, count: int = 2) -> list[Any]:
    """Outputs and gradients of some steps, each with the state that the one before left."""
    results: list[Any] = []
    for step in range(count):

        def loss(variables: Any, x: Any) -> Any:
            y = layer.apply(variables, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        grads, y = jax.grad(loss, (0, 1), has_aux=True)(variables, (step + 1) * x)
        results.append((grads, y))
        variables = {**variables, STATE: grads[0][STATE]}
    return results


@pytest.mark.parametrize("op", OPS)
def test_layers(op: str) -> None:
    def program(n: Any) -> Any:
        made = [
            n.Dense(3, dot_general_cls=getattr(n, op)),
            n.DenseGeneral((3, 2), (-1, 1), batch_dims=(0,), dot_general_cls=getattr(n, op)),
        ]
        found = [(layer, layer.init(quick_key(0), X)) for layer in made]
        return [(variables, steps(layer, variables, X)) for layer, variables in found]

    both(program)


@pytest.mark.parametrize("op", OPS)
def test_half_precision(op: str) -> None:
    def program(n: Any) -> Any:
        layer = n.Dense(3, dot_general_cls=getattr(n, op), dtype=jnp.bfloat16)
        variables = layer.init(quick_key(0), X)
        return variables, steps(layer, variables, X)

    both(program)


EQUATIONS = ["bld,dm->blm", "bld,dm->mbl", "bld,dm->bml", "bld,bdm->lbm", "bld,dlm->bm"]
EQUATIONS += ["bld,dm->bm", "...d,dm->...m"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation: str) -> None:
    sizes = {"b": 2, "l": 4, "d": 8, "m": 3}
    kernel = floats(*[sizes[c] for c in equation.partition(",")[2].partition("->")[0]])

    def program(n: Any) -> Any:
        op = n.Fp8Einsum(amax_history_length=3)
        variables = op.init(quick_key(0), equation, X, kernel)

        def loss(variables: Any, *xs: Any) -> Any:
            y = op.apply(variables, equation, *xs, preferred_element_type=jnp.bfloat16)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return variables, jax.grad(loss, (0, 1, 2), has_aux=True)(variables, X, kernel)

    both(program)


def test_attention_in_eight_bits() -> None:
    """Projections and both products of attention, each with a state of its own."""

    def program(n: Any) -> Any:
        op, einsum = partial(n.Fp8DirectDotGeneralOp, 4), partial(n.Fp8Einsum, 4)
        layer = n.MultiHeadDotProductAttention(
            2,
            qkv_dot_general_cls=op,
            out_dot_general_cls=op,
            qk_attn_weights_einsum_cls=einsum,
            attn_weights_value_einsum_cls=einsum,
        )
        variables = layer.init(quick_key(0), X)
        return variables, steps(layer, variables, X, 1)

    variables, _ = both(program)
    assert {"Fp8Einsum_0", "Fp8Einsum_1", "query", "out"} <= variables[STATE].keys()


BAD = {
    "bld,dm": "must be like 'ab,bc->ac'",
    "bld->bl": "must be like 'ab,bc->ac'",
    "bd,dm->bm": r"lhs have shape .*, expected that of 'bd'",
    "bbd,dm->bm": "a label stands twice",
    "bld,dm->blx": "in the output alone",
}


@pytest.mark.parametrize("equation", BAD)
def test_equations_that_are_none(equation: str) -> None:
    with pytest.raises(NNError, match=BAD[equation]):
        nn.Fp8Einsum().init(quick_key(0), equation, X, floats(8, 3))


def test_operands_of_two_dtypes_become_that_of_the_second() -> None:
    def program(n: Any) -> Any:
        op, dims = n.Fp8DirectDotGeneralOp(), (((2,), (0,)), ((), ()))
        narrow = X.astype(jnp.bfloat16), floats(8, 3)
        return op.init_with_output(quick_key(0), *narrow, dims)

    assert both(program)[0].dtype == jnp.float32


def layer_of(n: Any) -> Any:
    class Block(n.Module):
        @n.compact
        def __call__(self, x: Any, _: Any = None) -> Any:
            op = n.Fp8DirectDotGeneralOp
            return x + jnp.sin(n.Dense(8, dot_general_cls=op, name="dense")(x)), None

    return Block


def stack_of(n: Any) -> Any:
    class Stack(n.Module):
        @n.compact
        def __call__(self, x: Any) -> Any:
            layers = n.scan(
                n.remat(layer_of(n)),
                variable_axes={"params": 0, STATE: 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={"partition_name": "layers"},
                check_constancy_invariants=False,
            )
            return layers(name="layers")(x, None)[0]

    return Stack()


def test_every_layer_of_a_stack_has_its_own_state() -> None:
    """Against Flax, and against the same layers one after the other."""

    def program(n: Any) -> Any:
        stack = stack_of(n)
        variables = stack.init(quick_key(0), X)
        return variables["params"], steps(stack, variables, X)

    params, results = both(program)
    found = results[0][0][0][STATE]["layers"]["dense"]["Fp8DirectDotGeneralOp_0"]
    assert found["kernel_scale"].shape == (3, 1)

    @jax.jit
    def one_by_one(stacked: Any) -> list[Any]:
        sizes, x = [], X
        for i in range(3):
            params = jax.tree.map(lambda p, i=i: p[i], stacked)
            sizes.append(jnp.abs(x).max())
            layer = layer_of(nn)()
            fresh = {STATE: layer.init(quick_key(0), x)[STATE]}
            x = layer.apply({"params": params, **fresh}, x)[0]
        return sizes

    sizes = one_by_one(params["layers"])
    np.testing.assert_allclose(found["input_amax_history"][:, 0], sizes, rtol=1e-6)


def test_every_step_of_a_loop_has_its_own_state() -> None:
    class Cell(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            y = carry + Fp8Dense(8)(x)
            return y, y

        @nn.nowrap
        def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
            return jnp.zeros(input_shape)

        @property
        def num_feature_axes(self) -> int:
            return 1

    Fp8Dense = partial(nn.Dense, dot_general_cls=partial(nn.Fp8DotGeneralOp, 4))
    rnn = nn.RNN(Cell(), variable_axes={STATE: 0})

    @jax.jit
    def grads() -> Any:
        return jax.grad(lambda v: rnn.apply(v, X).sum())(rnn.init(quick_key(0), X))

    found = grads()[STATE]["cell"]["Dense_0"]["Fp8DotGeneralOp_0"]
    largest = np.abs(X).max((0, 2))
    np.testing.assert_array_equal(found["input_amax_history"][:, 0], largest)
    assert found["kernel_scale"].shape == (4, 1)


def test_on_a_mesh() -> None:
    """The state is whole on every device, and so are the sizes it is made from."""
    stack, x = stack_of(nn), floats(8, 4, 8)
    plain = jax.jit(stack.init)(quick_key(0), x)
    expected = jax.jit(lambda v: steps(stack, v, x, 1))(plain)
    mesh, rules = make_mesh("data=2,fsdp=2,tensor=2"), preset("fsdp_tp")
    state, layout = init_sharded(lambda: stack.init(quick_key(0), x), mesh=mesh, rules=rules)
    scale = f"{STATE}/layers/dense/Fp8DirectDotGeneralOp_0/kernel_scale"
    assert layout.leaf(scale).names == ("layers", None)
    with use(mesh, rules):
        found = jax.jit(lambda v: steps(stack, v, x, 1))(state)
    close(found, expected, tolerance=2e-2)
    history = found[0][0][0][STATE]["layers"]["dense"]["Fp8DirectDotGeneralOp_0"]
    for name in ("input_amax_history", "kernel_amax_history"):
        wanted = expected[0][0][0][STATE]["layers"]["dense"]["Fp8DirectDotGeneralOp_0"][name]
        close(history[name], wanted, tolerance=2e-2)
        assert history[name].sharding.is_fully_replicated


def test_a_train_state_overwrites_it() -> None:
    def program(n: Any, state_of: Any) -> Any:
        layer = n.Dense(3, dot_general_cls=n.Fp8DirectDotGeneralOp)
        variables = layer.init(quick_key(0), X)
        state = state_of.create(apply_fn=None, params=variables, tx=optax.adam(0.1))
        for _ in range(2):
            grads = jax.grad(lambda v: jnp.sin(layer.apply(v, X)).sum())(state.params)
            state = state.apply_gradients(grads=grads)
        return state.params, jax.tree.leaves(state.opt_state), state.step

    ours = jax.jit(lambda: program(nn, TrainState))()
    theirs = jax.jit(lambda: program(flax.linen, flax.training.train_state.TrainState))()
    same(ours, theirs)
    assert ours[0][STATE]["Fp8DirectDotGeneralOp_0"]["input_scale"] != 1.0
