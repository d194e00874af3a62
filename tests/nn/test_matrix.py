"""The matrix on one device: every property of a layer is one test over all rows."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax import partitioning
from shardflax.core.boxes import is_box
from tests.nn.matrix import (
    as_dtype,
    close,
    described,
    facts,
    golden,
    gradients,
    loss_of,
    lowered,
    one_program,
    program,
    rows,
    same,
    split,
)
from tests.nn.row import Row, arguments_of, layers_of
from tests.nn.rows import ROWS

WITHOUT_FLAX = [row for row in ROWS if not row.like_flax]


def test_every_layer_has_a_row() -> None:
    """One of its name, which all columns have; further rows are `Layer-what`."""
    assert layers_of(nn) == {row.name for row in ROWS if not row.further}
    assert {row.name.split("-")[0] for row in ROWS} == layers_of(nn)


def test_names_of_rows_tell_them_apart() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


# What Flax warns of is a part of its namespace: the layers are compared all the same.
quietly = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


@rows(flax=True)
@quietly
def test_parity_with_flax(row: Row) -> None:
    """Tree, values, what is written, and gradients."""
    theirs = program(row, flax.linen).lower()
    if not one_program(lowered(row), theirs):
        same(facts(row), theirs.compile()())


@pytest.mark.parametrize("row", WITHOUT_FLAX, ids=[r.name for r in WITHOUT_FLAX])
def test_parity_with_a_formula(row: Row) -> None:
    """Values and gradients of the layers that Flax has not."""
    known = facts(row)

    def run(variables: Any, *inputs: Any) -> Any:
        return row.formula(row, variables, *inputs), None  # pyright: ignore[reportOptionalCall]

    grads, (y, _) = jax.jit(functools.partial(gradients, run))(known.variables, known.inputs)
    close((known.y, known.grads), (y, grads), tolerance=1e-4)


HALVES = {
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16},
    "narrow": {"param_dtype": jnp.bfloat16},
}
GIVEN = {
    "bfloat16": {"param_dtype": jnp.bfloat16},
    "float16": {"param_dtype": jnp.float16},
}


def typed(row: Row, options: Any, namespace: Any = nn) -> Any:
    """Variables and outputs where the layer is told dtypes, or is given all in `param_dtype`.

    The state of products in eight bits stays as it is, in float32.
    """
    inputs, given = row.inputs(), options.get("param_dtype")
    if given is not None:
        inputs = as_dtype(inputs, given)
    options = {name: dtype for name, dtype in options.items() if name in row.typed}
    variables = row.init(namespace, inputs, **options)
    if given is not None and not row.typed:
        variables = {
            col: tree if col == "_overwrite_with_gradient" else as_dtype(tree, given)
            for col, tree in variables.items()
        }
    passed, inputs = jax.lax.optimization_barrier((variables, inputs))
    return variables, row.run(passed, *inputs, namespace=namespace, **options)


def typed_programs(row: Row, namespace: Any = nn) -> Any:
    """What is `typed` where the computation, or what goes into it, is half precision.

    And where the latter, the output for the same numbers in single precision.
    """
    ways = HALVES if row.has_dtype else GIVEN

    def one(name: str) -> Any:
        variables, given = typed(row, ways[name], namespace)
        if row.has_dtype:
            return variables, given, None
        wide = as_dtype((variables, row.inputs()), jnp.float32)
        return variables, given, row.apply(wide[0], *wide[1], namespace=namespace)

    # Of further rows the others are traced: `test_half_precision`.
    names = list(ways)[:1] if row.further else list(ways)
    return jax.jit(lambda: {name: one(name) for name in names}).lower()


halves = functools.cache(typed_programs)
"""Ours, traced once; and compiled once:"""
in_half_precision = functools.cache(lambda row: halves(row).compile()())


@rows(flax=True)
@quietly
def test_half_precision_is_flax_s(row: Row) -> None:
    theirs = typed_programs(row, flax.linen)
    if not one_program(halves(row), theirs):
        same(in_half_precision(row), theirs.compile()())


@rows()
def test_half_precision(row: Row) -> None:
    """Outputs are in `dtype`, parameters stay as they are, and the numbers are about the same."""
    computed, ways = in_half_precision(row), HALVES if row.has_dtype else GIVEN
    for dtype in ("bfloat16", "float16"):
        found = computed.get(dtype) or jax.eval_shape(lambda d=dtype: typed(row, ways[d]))
        variables, (y, _), *_ = found
        assert {x.dtype.name for x in jax.tree.leaves(y)} == {dtype}
        kept = {"float32"} if row.has_dtype else {dtype}
        params = {x.dtype.name for x in jax.tree.leaves(variables.get("params", {}))}
        assert params <= (kept | {dtype} if row.rewrites else kept)
        if dtype not in computed:
            continue
        expected = facts(row).y if row.has_dtype else found[2]
        close(as_dtype(y, jnp.float32), expected, tolerance=0.1)


@rows()
@quietly
def test_double_precision(row: Row) -> None:
    """Everything is float64 where the layer is told so, and nothing is rounded on the way."""
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    ours, theirs = (functools.partial(typed, row, options, n) for n in (nn, flax.linen))
    with jax.enable_x64(True):
        if row.further or not row.like_flax:
            variables, (y, _) = jax.eval_shape(ours)
        else:
            ours, theirs = (jax.jit(f).lower() for f in (ours, theirs))
            variables, (y, _) = ours.out_info
            if not one_program(ours, theirs):
                same(ours.compile()(), theirs.compile()())
    assert {x.dtype.name for x in jax.tree.leaves(variables.get("params", {}))} <= {"float64"}
    assert {x.dtype.name for x in jax.tree.leaves(y)} == {"float64"}


@rows()
def test_shapes_are_known_without_numbers(row: Row) -> None:
    abstract = jax.eval_shape(row.init)
    known = jax.tree.map(lambda x: (x.shape, x.dtype), facts(row).variables)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == known


@rows()
def test_nothing_promotes_by_accident(row: Row) -> None:
    """It would be an error where a row is traced, forward and backward: see `lowered`."""
    lowered(row)


@rows(one=True)
@pytest.mark.usefixtures("checking_leaks")
def test_no_tracer_leaks(row: Row) -> None:
    jax.make_jaxpr(program(row))()


@rows()
def test_gradients_are_finite_and_reach_all_parameters(row: Row) -> None:
    for path, g in jax.tree.leaves_with_path(facts(row).grads):
        assert np.isfinite(g).all(), path
        assert np.any(g != 0) or any(word in str(path) for word in row.no_gradient), path


@rows(one=True)
def test_transforms_agree(row: Row) -> None:
    """`jit`, `vmap`, `scan`, `remat` and `grad`, as one program."""
    known = facts(row)
    learned, rest = split(known.variables)

    @jax.checkpoint
    def rematted(learned: Any) -> Any:
        return loss_of(row.apply({**rest, **learned}, *known.inputs))

    @jax.jit
    def all_of_them(variables: Any, inputs: Any) -> Any:
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
        mapped = jax.vmap(row.apply, in_axes=(None, *[0] * len(inputs)))(variables, *twice)
        _, scanned = jax.lax.scan(lambda _, x: (None, row.apply(variables, *x)), None, twice)
        return mapped, scanned, jax.grad(rematted)(learned)

    y = jax.tree.map(lambda x: jnp.stack([x, x]), known.y)
    close(all_of_them(known.variables, known.inputs), (y, y, known.grads[0]))


class Lifted(nn.Module):
    """A layer under a lifted transform, called twice or as it is."""

    layer: Any
    row: Row
    lift: Any

    def __call__(self, *inputs: Any) -> Any:
        def call(layer: Any, *inputs: Any) -> Any:
            args, arrays = arguments_of(inputs)
            return layer(*args, **arrays, **self.row.call)

        return self.lift(call)(self.layer, *inputs)


def stacked(call: Any) -> Any:
    """A copy of the layer for each of two inputs."""
    return nn.vmap(
        call,
        variable_axes={True: 0},
        split_rngs={True: True},
        metadata_params={"partition_name": "layers"},
    )


def in_turn(call: Any) -> Any:
    """The same, one after the other."""
    step = nn.scan(
        lambda layer, carry, *inputs: (carry, call(layer, *inputs)),
        variable_axes={True: 0},
        split_rngs={True: True},
        metadata_params={"partition_name": "layers"},
    )
    return lambda layer, *inputs: step(layer, (), *inputs)[1]


class Seen(NamedTuple):
    """What is known of an array without its numbers."""

    shape: tuple[int, ...]
    names: Any = None

    def twice(self, name: str) -> Seen:
        """Of two such arrays, stacked along a dim of that name."""
        return Seen((2, *self.shape), None if self.names is None else (name, *self.names))


def seen(row: Row, lift: Any, inputs: Any) -> tuple[Any, Any]:
    """The variables and outputs of a lifted layer."""
    model = Lifted(row.build(), row, lift)
    with partitioning.use(None, partitioning.preset("fsdp_tp")):
        found = jax.eval_shape(lambda: model.init_with_output(row.rngs(), *inputs))

    def one(x: Any) -> Seen:
        return Seen(x.value.shape, tuple(x.names)) if is_box(x) else Seen(x.shape)

    y, variables = jax.tree.map(one, found, is_leaf=is_box)
    return variables, y


@rows()
def test_lifted_transforms(row: Row) -> None:
    """`nn.remat` and `nn.jit` change nothing; `nn.vmap` and `nn.scan` stack every variable, and
    its names."""
    inputs = row.inputs()
    variables, y = seen(row, lambda call: call, inputs)
    assert seen(row, lambda call: nn.remat(nn.jit(call)), inputs) == (variables, y)

    def of_two(tree: Any, name: str) -> Any:
        is_seen = lambda x: isinstance(x, Seen)  # noqa: E731
        return jax.tree.map(lambda x: x.twice(name), tree, is_leaf=is_seen)

    twice = jax.tree.map(lambda x: jnp.asarray(np.stack([x, x])), inputs)
    for lift in (stacked, in_turn):
        of_variables, of_y = seen(row, lift, twice)
        assert of_variables == of_two(variables, "layers")
        assert of_y == of_two(y, "")


def test_golden_trees() -> None:
    """Paths are checkpoint keys, names and types of outputs are layouts: none changes unnoticed.

    `python -m tests.nn.golden` writes the file anew.
    """
    assert {row.name: described(row) for row in ROWS} == golden()


@rows()
def test_plain_rules_see_no_boxes(row: Row) -> None:
    """Default names are off where a program follows Linen's contract, or has no rules."""
    with partitioning.logical_axis_rules([("batch", "data"), ("embed", "data")]):
        boxed = jax.eval_shape(row.init)
    assert not any(map(is_box, jax.tree.leaves(boxed, is_leaf=is_box)))
