"""Train states of a 12-layer decoder: all presets, meshes of one, two and three axes, both types.

Each combination is laid out; of those that are the same layout (on axes of other names), the first
is executed.  What it sends is held to a contract: kinds, axes, and how often.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from shardflax.partitioning import (
    PRESETS,
    Layout,
    assert_collectives,
    batch_axes,
    batch_sharding,
    collectives,
    explain,
    init_sharded,
    use,
)
from shardflax.partitioning.compare import costs_on
from shardflax.partitioning.spec_check import spec_axes
from tests.core.harness import quick_key
from tests.multidevice.states import (
    ACTIVATIONS,
    AXES,
    BATCH,
    CONFIG,
    SIZES,
    STEP,
    TOKENS,
    Case,
    abstract_state,
    alike,
    alone,
    init,
    numbered,
    stored_alike,
)

LAYERS = CONFIG.num_layers

# What each layout sends, and nothing else.  A CPU has no reduce-scatter, and sums in its place.
# Gathers of weights and sums of gradients are counted from the layout; "6L" is six times a layer,
# for activations.  A mesh of three axes, of which the rules know two, has one that idles, and
# XLA's partitioner passes parts along it: `tp_sp`, `tp_embed`, and on auto axes `zero1`.
SENT = {
    "dp 8": "all-reduce data",
    "zero1 8": "all-reduce data, all-gather data 1L",
    "fsdp 8": "all-gather fsdp, all-reduce fsdp",
    "tp_sp 8": "all-gather tensor 8L, all-reduce tensor 6L",
    "tp_embed 8": "all-gather tensor 10L, all-reduce tensor 10L",
    "cp 8": "all-gather context 1L, all-reduce context 1L",
    "pp 8": "all-gather stage, all-reduce stage",
    "dp 4x2": "all-reduce data",
    "zero1 4x2": "all-reduce data, all-gather data 1L",
    "fsdp 4x2": "all-gather fsdp, all-reduce fsdp, all-reduce data+fsdp",
    "fsdp2d 4x2": "all-gather fsdp, all-gather fsdp2, all-gather fsdp+fsdp2, "
    "all-reduce fsdp, all-reduce fsdp2, all-reduce fsdp+fsdp2",
    "tp_sp 4x2": "all-gather tensor 9L, all-reduce tensor 6L, all-reduce data",
    "tp_embed 4x2": "all-gather tensor 13L, all-reduce tensor 10L, all-reduce data",
    "fsdp_tp 4x2": "all-gather fsdp, all-gather tensor 6L, all-reduce fsdp, all-reduce tensor 5L",
    "cp 4x2": "all-gather context 1L, all-reduce context 2L, all-reduce data",
    "ep_as_dp 4x2": "all-reduce data+expert",
    "pp 4x2": "all-gather data, all-gather stage, all-gather data+stage, all-reduce data, "
    "all-reduce data+stage",
    "dp 2x2x2": "all-reduce data",
    "zero1 2x2x2": "all-reduce data, all-gather data 1L, collective-permute data+fsdp 8L?",
    "fsdp 2x2x2": "all-gather fsdp, all-reduce fsdp, all-reduce data+fsdp",
    "fsdp2d 2x2x2": "all-gather fsdp, all-gather fsdp2, all-gather fsdp+fsdp2, all-reduce fsdp, "
    "all-reduce fsdp2, all-reduce fsdp+fsdp2, all-reduce data+fsdp+fsdp2",
    "tp_sp 2x2x2": "all-gather fsdp 4L, all-gather tensor?, all-reduce data, all-reduce fsdp 1L, "
    "all-reduce tensor 6L, collective-permute fsdp+tensor 14L",
    "tp_embed 2x2x2": "all-gather fsdp 9L, all-gather tensor 2L, all-reduce data, "
    "all-reduce fsdp 1L, all-reduce tensor 8L, collective-permute fsdp+tensor 15L",
    "fsdp_tp 2x2x2": "all-gather fsdp, all-gather tensor 6L, all-reduce fsdp, "
    "all-reduce tensor 5L, all-reduce data+fsdp",
    "cp 2x2x2": "all-gather context 2L, all-reduce context 2L, all-reduce data",
    "ep_as_dp 2x2x2": "all-reduce data+expert",
    "pp 2x2x2": "all-gather data, all-gather stage, all-gather data+stage, all-reduce data, "
    "all-reduce data+stage",
    "decode 2x2x2": "all-gather tensor 6L, all-reduce tensor 5L, all-reduce data+expert",
}
FEW = 8  # once in a step: logits, sums of metrics and norms

GROUPS = {str(cases[0]): cases for cases in alike()}


@pytest.mark.parametrize(
    ("cases", "types"),
    [
        pytest.param(
            cases,
            types,
            # The fast group has all on auto axes, and all meshes of three axes.
            marks=[pytest.mark.slow] if types == "explicit" and len(cases[0].sizes) < 3 else [],
            id=f"{'='.join(case.name for case in cases)} {first.split()[1]} {types}",
        )
        for types in ("auto", "explicit")
        for first, cases in GROUPS.items()
    ],
)
def test_placed_as_explained_and_the_same_loss(cases: tuple[Case, ...], types: str) -> None:
    first, *others = cases
    mesh, rules, layout = first.mesh(types), first.rules, first.layout(types)
    for other in others:
        check_same_layout(layout, other.layout(types))
    made, losses = alone()
    state = jax.device_put(made, layout.shardings)
    with use(mesh, rules):
        sharding = batch_sharding(mesh, rules, ("batch", "length"), TOKENS.shape)
        batch = jax.device_put(BATCH, sharding)
        step = jax.jit(STEP, out_shardings=(layout.shardings, None))
        compiled = step.lower(state, batch).compile()
        for expected in losses:
            state, metrics = compiled(state, batch)
            np.testing.assert_allclose(metrics["loss"], expected, 2e-6)
    check_placed(state, layout)
    check_sent(first, layout, compiled)


@pytest.mark.parametrize("case", stored_alike(), ids=str)
def test_made_where_explained_with_the_same_numbers(case: Case) -> None:
    """Each way in which a state lies; how it is used afterwards is all the same to an init."""
    state, layout = init_sharded(init, quick_key(0), mesh=case.mesh(), rules=case.rules)
    check_same_layout(layout, case.layout())
    check_placed(state, layout)
    jax.tree.map(np.testing.assert_array_equal, state, alone()[0])


def check_placed(state: Any, layout: Layout) -> None:
    """Every array lies as its layout and its explanation say."""
    explained = explain(layout, layout.mesh, layout.rules).leaves
    for array, leaf, row in zip(jax.tree.leaves(state), layout.leaves, explained, strict=True):
        assert array.sharding.spec == leaf.spec, leaf.where
        assert tuple(spec_axes(part) for part in leaf.spec) == row.spec[: len(leaf.spec)]
        local = array.addressable_shards[0].data
        assert local.shape == tuple(dim.local for dim in row.dims), leaf.where
        assert local.nbytes == leaf.bytes_per_device == row.bytes_per_device
    assert sum(row.bytes_per_device for row in explained) == layout.bytes_per_device


def check_same_layout(one: Layout, other: Layout) -> None:
    """Leaf for leaf the same, on axes of other names."""
    assert tuple(one.mesh.shape.values()) == tuple(other.mesh.shape.values())
    assert one.mesh.axis_types == other.mesh.axis_types
    assert one.bytes_per_device == other.bytes_per_device
    for a, b in zip(one.leaves, other.leaves, strict=True):
        assert numbered(a.spec, one.mesh) == numbered(b.spec, other.mesh), a.where


def check_sent(case: Case, layout: Layout, compiled: Any) -> None:
    """What the contract allows, as often as it allows; gathers of weights exactly."""
    contract = dict(_promise(words) for words in SENT[str(case)].split(", "))
    found, sums = Counter[str](), 0
    summed = {*batch_axes(case.mesh(), case.rules)}
    for one in collectives(compiled):
        found[one.what] += one.count
        if one.kind != "all-gather" and set(one.axes) & summed:
            sums += one.total
    needed = [what for what, (_, optional) in contract.items() if what in found or not optional]
    assert_collectives(compiled, needed)
    gathers, arrays = gathered(case, layout), summed_arrays(layout)
    for what, times in found.items():
        per_layer, _ = contract[what]
        kind, _, axes = what.partition(" over ")
        most = (
            gathers[what] + per_layer * LAYERS + (0 if what in gathers and not per_layer else FEW)
        )
        if kind == "all-reduce" and {*axes.split(",")} <= summed | {"context"}:
            most += arrays
        assert gathers[what] <= times <= most, what
    (cost,) = costs_on(layout.mesh, {}, [case.rules], abstract_state()[0])  # what the table says
    if summed and case.name not in ("pp", "tp_embed"):  # these take some of it apart
        assert cost.summed <= sums <= cost.summed + 256


def _promise(words: str) -> tuple[str, tuple[int, bool]]:
    """`all-gather tensor 9L?` as what is sent, how often a layer, and whether it may be missing."""
    found = re.fullmatch(r"([a-z-]+) ([a-z0-9+]+)(?: (\d+)L)?(\?)?", words)
    assert found is not None, words
    kind, axes, times, optional = found.groups()
    return f"{kind} over {axes.replace('+', ',')}", (int(times or 0), optional is not None)


def gathered(case: Case, layout: Layout) -> Counter[str]:
    """How often weights are gathered: each dim for the forward pass, and again for the backward.

    The table of rows is looked up once: ids have no gradient.
    """
    found: Counter[str] = Counter()
    for leaf, used in zip(layout.leaves, case.used(layout), strict=True):
        if leaf.path[0] != "params":
            continue
        times = LAYERS if "layers" in (leaf.names or ()) else 1
        passes = 1 if leaf.path[-1] == "embedding" else 2
        for dim, part in enumerate(leaf.spec):
            kept = spec_axes(used[dim]) if dim < len(used) else ()
            if axes := [axis for axis in spec_axes(part) if axis not in kept]:
                found[f"all-gather over {','.join(axes)}"] += times * passes
    return found


def summed_arrays(layout: Layout) -> int:
    """How many gradients a step sums, if each is summed alone: so many times at most."""
    return sum(
        LAYERS if "layers" in leaf.names else 1
        for leaf in layout.leaves
        if leaf.path[0] == "params" and leaf.names
    )


def test_every_preset_names_every_leaf() -> None:
    """15 presets, three meshes, auto and explicit axes; the state is traced once."""
    assert set(AXES) == set(PRESETS)
    assert sorted(str(case) for cases in alike() for case in cases) == sorted(
        str(Case(name, sizes)) for name in AXES for sizes in SIZES
    )
    assert GROUPS.keys() == SENT.keys()
    whole = Case("dp", (8,)).layout().bytes_per_device
    for name in AXES:
        for sizes in SIZES:
            found = [Case(name, sizes).layout(types) for types in ("auto", "explicit")]
            assert found[0].problems == () and found[0].unnamed == (), (name, sizes)
            assert found[0].leaves == found[1].leaves
            rest = found[0].bytes_per_device
            assert (rest == whole) == (name in ("dp", "ep_as_dp", "pp")), (name, sizes)


def test_what_counts_as_the_same_is_all_that_the_decoder_names() -> None:
    state, constrained = abstract_state()
    layout = Layout(state, Case("dp", (8,)).mesh(), PRESETS["dp"])
    of_leaves = {name for leaf in layout.leaves for name in leaf.names or () if name}
    assert constrained == {name for names in ACTIVATIONS for name in names}
    assert of_leaves.isdisjoint(constrained) and "embed" in of_leaves


def test_the_same_layout_is_the_same_program() -> None:
    """Lowered for the axes of `ep` and of `fsdp`, the text differs in their names alone."""
    texts: list[str] = []
    for name, axis in (("fsdp", "fsdp"), ("ep", "expert")):
        case = Case(name, (2, 2, 2))
        mesh, layout = case.mesh(), case.layout()
        batch = jax.ShapeDtypeStruct(
            TOKENS.shape, TOKENS.dtype, sharding=batch_sharding(mesh, case.rules)
        )
        with use(mesh, case.rules):
            step = jax.jit(STEP, out_shardings=(layout.shardings, None))
            lowered = step.lower(layout.abstract, {"tokens": batch, "targets": batch})
        texts.append(lowered.as_text().replace(f'"{axis}"', '"axis"'))
    assert texts[0] == texts[1]
