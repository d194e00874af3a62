"""The matrix on meshes: every row gives the same there, laid out as its names say.

Axes are auto, explicit (every array's type says its layout) or manual (inside `jax.shard_map`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

import jax
import pytest

from shardflax import partitioning
from shardflax.partitioning import AxisRules, Collective, Layout, collectives, make_mesh, use
from shardflax.partitioning.spec_check import spec_axes
from tests.nn.matrix import (
    MESHES,
    Place,
    chosen,
    close,
    everything,
    facts,
    golden,
    place,
    rows,
    typed,
)
from tests.nn.row import Row

PLACES = [*[(rules, "auto") for rules in MESHES], ("fsdp_tp", "explicit")]
places = pytest.mark.parametrize("at", PLACES, ids="-".join)


@functools.cache
def states(rules: str, axis_types: str, further: bool = False) -> tuple[Any, Layout]:
    """The variables of all layers, initialised on a mesh by one program; and their layout."""
    on, layers = place(rules, axis_types), chosen(one=not further, further=further)

    def init() -> Any:
        return {row.name: row.init() for row in layers}

    return partitioning.init_sharded(init, mesh=on.mesh, rules=on.rules)


def arguments(row: Row, on: Place, state: Any) -> tuple[Any, Any]:
    inputs = facts(row).inputs
    return state, jax.device_put(inputs, on.spread(row, inputs))


@rows(one=True)
@places
def test_parameters_lie_as_their_names_say(row: Row, at: tuple[str, str]) -> None:
    """Initialised there, they have the numbers of one device, cut as the layout says."""
    state, layout = states(*at)
    close(jax.device_get(state[row.name]), facts(row).variables, tolerance=1e-6)
    lie_as_planned(row, layout, place(*at), state[row.name])


def lie_as_planned(row: Row, layout: Layout, on: Place, variables: Any) -> None:
    """Variables of a row are laid out as their names say."""
    for path, x in jax.tree.leaves_with_path(variables):
        leaf = layout.leaf("/".join([row.name, *(str(k.key) for k in path)]))
        assert x.sharding.is_equivalent_to(jax.NamedSharding(on.mesh, leaf.spec), x.ndim), path


@rows(one=True)
@pytest.mark.parametrize("at", [("fsdp_tp", "auto"), ("fsdp_tp", "explicit")], ids="-".join)
def test_a_mesh_gives_the_same(row: Row, at: tuple[str, str]) -> None:
    """Outputs, what is written, and gradients; and outputs lie as they do on explicit axes."""
    on, known = place(*at), facts(row)
    given = arguments(row, on, states(*at)[0][row.name])
    with use(on.mesh, on.rules):
        found = everything(row, *given)
    close(found, (known.y, known.wrote, known.grads))
    as_on_explicit_axes(row, found[0])


@rows(further=True)
def test_further_rows_on_a_mesh(row: Row) -> None:
    """The same at one place, with what is written, a cache say; forward, as gradients are traced
    where `described` asks for their types."""
    at = ("fsdp_tp", "auto")
    (state, layout), on, known = states(*at, further=True), place(*at), facts(row)
    close(jax.device_get(state[row.name]), known.variables, tolerance=1e-6)
    lie_as_planned(row, layout, on, state[row.name])
    given = arguments(row, on, state[row.name])
    with use(on.mesh, on.rules):
        compiled = jax.jit(Row.run, static_argnums=0).lower(row, given[0], *given[1]).compile()
    y, wrote = compiled(given[0], *given[1])
    close((y, wrote), (known.y, known.wrote))
    lie_as_planned(row, layout, on, wrote)
    as_on_explicit_axes(row, y)
    called_for = Allowed.by(row, layout, on)
    assert [c for c in collectives(compiled, on.mesh) if c not in called_for] == []


def as_on_explicit_axes(row: Row, y: Any) -> None:
    """Outputs lie as they do on explicit axes, of which the golden file knows."""
    mesh = place("fsdp_tp", "explicit").mesh
    spread = jax.tree.map(lambda x: on_mesh(mesh, x), y)
    assert jax.tree.leaves(spread) == golden()[row.name]["outputs"]


def on_mesh(mesh: jax.sharding.Mesh, x: jax.Array) -> str:
    """The type that `x` would have on an explicit mesh."""
    spec = x.sharding.spec  # pyright: ignore[reportAttributeAccessIssue]
    sharding = jax.NamedSharding(mesh, jax.P(*spec, *[None] * (x.ndim - len(spec))))
    return typed(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))


@rows(one=True)
@pytest.mark.parametrize("rules", ["dp", "fsdp", "tp_sp"])
def test_nothing_is_sent_that_the_layout_does_not_call_for(row: Row, rules: str) -> None:
    """Same numbers under any preset, by no collectives but those that its layout needs."""
    on, known = place(rules), facts(row)
    state, layout = states(rules, "auto")
    given = arguments(row, on, state[row.name])
    with use(on.mesh, on.rules):
        compiled = jax.jit(forward, static_argnums=0).lower(row, *given).compile()
    close(compiled(*given), known.y)
    called_for = Allowed.by(row, layout, on)
    found = collectives(compiled, on.mesh)
    assert [c for c in found if c not in called_for] == []


def forward(row: Row, variables: Any, inputs: Any) -> Any:
    return row.apply(variables, *inputs)


@dataclass(frozen=True)
class Allowed:
    """The collectives that the layout of a row's parameters implies.

    Weights over `fsdp` are gathered, and nothing else is.  Sums over a dim that lies over `tensor`
    are reduced, and activations that are whole along the length before or after are gathered or
    scattered: weights over `tensor` never are.  Over the batch's axes statistics are summed, where
    the layer's meaning is one; so are those of weights over theirs.
    """

    row: Row
    held: set[str]
    weights: set[tuple[int, ...]]
    statistics: tuple[str, ...]

    @classmethod
    def by(cls, row: Row, layout: Layout, on: Place) -> Allowed:
        leaves = [leaf for leaf in layout.leaves if leaf.path[0] == row.name]
        held = {a for leaf in leaves for entry in leaf.spec for a in spec_axes(entry)}
        cut = dict(on.mesh.shape)
        weights = {sizes for leaf in leaves if leaf.spec for sizes in whole_over_fsdp(leaf, cut)}
        over = partitioning.batch_axes(on.mesh, on.rules) if row.over_batch else ()
        return cls(row, held, weights, over)

    def __contains__(self, found: Collective) -> bool:
        sizes = sorted(n for n in found.shape if n > 1)
        # Several weights may be gathered at once, stacked along a dim of its own.
        of_one = [sizes[:d] + sizes[d + 1 :] for d in range(len(sizes))]
        weight = tuple(sizes) in self.weights
        stacked = any(tuple(each) in self.weights for each in of_one)
        if self.row.over_weights and set(found.axes) <= self.held:
            return True
        match found.kind, *found.axes:
            case "all-gather", "fsdp":
                return "fsdp" in self.held and (weight or stacked)
            case "all-gather", "tensor":
                return "tensor" in self.held and not weight
            case "all-reduce" | "reduce-scatter", "tensor":
                return "tensor" in self.held
            case _, "tensor":
                return self.row.side_by_side
            case "all-reduce", *axes:
                return tuple(axes) == self.statistics
        return False


def whole_over_fsdp(leaf: Any, cut: dict[str, int]) -> Iterator[tuple[int, ...]]:
    """The sizes of a weight, without those that are 1: all of it, and what lies over `tensor`."""
    for axes in ((), ("tensor",)):
        parts = [
            n // prod(cut[a] for a in spec_axes(entry) if a in axes)
            for n, entry in zip_longest(leaf.shape, leaf.spec)
        ]
        yield tuple(sorted(n for n in parts if n > 1))


PARTS = [row for row in chosen(one=True) if row.in_parts is not None]


@pytest.mark.parametrize("row", PARTS, ids=[r.name for r in PARTS])
def test_inside_shard_map(row: Row) -> None:
    """Where the batch's axis is manual and the others are auto, each part gives its part."""
    on, known = place("tp_sp"), facts(row)
    state, inputs = arguments(row, on, states("tp_sp", "auto")[0][row.name])
    specs, out = in_parts(row, inputs)
    mapped = jax.shard_map(
        lambda state, inputs: row.apply(state, *inputs, **(row.in_parts or {})),
        mesh=on.mesh,
        in_specs=(jax.P(), specs),
        out_specs=out,
        axis_names={"data"},
    )
    with use(on.mesh, on.rules):
        close(jax.jit(mapped)(state, inputs), known.y)


def in_parts(row: Row, inputs: Any) -> tuple[Any, Any]:
    """The specs of inputs and outputs that are cut along the batch."""
    if row.streams:
        return jax.tree.map(lambda _: jax.P(), inputs), jax.P()  # each part draws the same numbers

    def spec(dim: int | None) -> jax.P:
        return jax.P() if dim is None else jax.P(*[None] * dim, "data")

    return row.by_batch(lambda _, dim: spec(dim), inputs), spec(row.out_batch_dim)


PARAMETERS_ONLY = AxisRules(
    {"embed": None, "vocab_embed": None, "mlp": None, "norm": None, "head_dim": None}
    | {"heads": None, "kv_heads": None, "vocab": None, "batch": "data", "length": "tensor"}
)


@rows()
def test_guesses_about_outputs_never_fail(row: Row) -> None:
    """No rule for some names, sizes that do not divide: such outputs are left to the compiler."""

    def cut(x: Any, dim: int | None) -> Any:
        return x if dim is None else jax.lax.slice_in_dim(x, 0, 3, axis=dim)

    odd = row.by_batch(cut, facts(row).inputs)
    variables = jax.eval_shape(lambda: row.init(inputs=odd))
    with use(make_mesh("data=2,tensor=4"), PARAMETERS_ONLY):
        jax.eval_shape(row.apply, variables, *odd)
