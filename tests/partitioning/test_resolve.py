"""The strict resolver: what it assigns, what it refuses, and the record that it keeps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import (
    DEFAULT_RULES,
    KNOWN_AXES,
    AxisConflictError,
    AxisRules,
    IndivisibleDimError,
    NamesRankError,
    RepeatedNameError,
    UnknownAxisError,
    UnknownNameError,
    logical_to_mesh_axes,
    make_mesh,
    preset,
    resolve,
    use,
)
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.vocabulary import tie_rank

FULL = (("data", 2), ("fsdp", 2), ("fsdp2", 2), ("expert", 2), ("context", 2), ("tensor", 2))


def spec(names: Any, shape: Any, axes: Any, rules: AxisRules = DEFAULT_RULES) -> P:
    found = resolve(names, rules, shape, axes)
    assert found.problems == ()
    return found.spec


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "mlp"), (64, 64), P(("fsdp", "context", "expert"), ("fsdp2", "tensor"))),
        (("mlp", "embed"), (64, 64), P(("fsdp2", "tensor"), ("fsdp", "context", "expert"))),
        (("embed", "heads", "head_dim"), (64, 4, 8),
         P(("fsdp", "fsdp2", "context", "expert"), "tensor")),
        (("vocab", "vocab_embed"), (64, 64), P("tensor", ("fsdp", "fsdp2", "context", "expert"))),
        (("expert", "expert_embed", "expert_mlp"), (2, 64, 64),
         P("expert", ("fsdp", "context"), ("fsdp2", "tensor"))),
        (("embed", "q_lora"), (64, 64), P(("fsdp", "fsdp2", "context", "expert"))),
        (("q_lora", "mlp"), (64, 64), P(("fsdp", "context", "expert"), ("fsdp2", "tensor"))),
        (("batch", "norm_length", "act_embed"), (16, 4, 8),
         P(("data", "fsdp", "fsdp2", "expert"), ("context", "tensor"))),
        (("batch", "norm_length", "act_mlp"), (16, 4, 8),
         P(("data", "fsdp", "fsdp2", "expert"), "context", "tensor")),
        (("batch", "norm_length", "act_embed"), (16, 2, 8),
         P(("data", "fsdp", "fsdp2", "expert"), "context")),
        (("kv_heads", "head_dim"), (1, 8), P()),
        (("layers", "norm"), (3, 5), P()),
        ((None, "mlp"), (7, 8), P(None, ("fsdp2", "tensor"))),
        ((), (), P()),
        ((P.UNCONSTRAINED, "heads"), (7, 8), P(P.UNCONSTRAINED, "tensor")),
    ],
)  # fmt: skip
def test_default_rules(names: Any, shape: Any, expected: P) -> None:
    assert spec(names, shape, FULL) == expected


def test_axes_of_size_1_or_absent_change_nothing() -> None:
    small = (("fsdp", 4), ("tensor", 2))
    more = (("data", 1), ("fsdp", 4), ("context", 1), ("tensor", 2))
    for names in (("embed", "mlp"), ("vocab", "vocab_embed")):
        assert spec(names, (8, 8), small) == spec(names, (8, 8), more)


def test_assignment_is_per_axis() -> None:
    """Where `fsdp2` is taken, `tensor` of the same rule still applies (Linen: neither does)."""
    rules = AxisRules({"a": "fsdp2", "mlp": "fsdp2? tensor"})
    axes = (("fsdp2", 2), ("tensor", 2))
    assert spec(("a", "mlp"), (4, 4), axes, rules) == P("fsdp2", "tensor")


def test_record_says_what_was_given_up_and_why() -> None:
    rules = AxisRules({"a": "fsdp", "b": "data? fsdp? expert? context? tensor"})
    axes = (("data", 1), ("fsdp", 2), ("context", 4), ("tensor", 2))
    a, b = resolve(("a", "b"), rules, (4, 6), axes).dims
    assert (a.taken, a.given_up, a.rule) == (("fsdp",), (), ("fsdp",))
    assert b.taken == ("tensor",)
    assert dict(b.given_up) == {
        "data": "size 1",
        "fsdp": "taken by dim 0 'a'",
        "expert": "not in the mesh",
        "context": "8 does not divide 6",
    }


@pytest.mark.parametrize(
    ("names", "shape", "error", "text"),
    [
        (("emebd", "mlp"), (8, 8), UnknownNameError, "'emebd' (dim 0 of ('emebd', 'mlp')): "
         "did you mean 'embed'?"),
        (("mlp",), (8, 8), NamesRankError, "1 names ('mlp',) for an array of rank 2"),
        (("mlp", None, None), (8, 8), NamesRankError, "3 names"),
        (("mlp", "mlp"), (8, 8), RepeatedNameError, "on dims 0 and 1"),
        (("heads", "vocab"), (8, 8), AxisConflictError, "both claim the axis 'tensor' (rules "
         "'heads': 'tensor', 'vocab': 'tensor'). Write 'tensor?'"),
        (("heads",), (17,), IndivisibleDimError, "dim 0 'heads' of size 17 (shape (17,), names "
         "('heads',)) is not divisible by 2 (tensor=2; rule 'heads': 'tensor'). Make it 18, "),
        (("a",), (8,), UnknownAxisError, "names the axis 'tensr', which the mesh (data, fsdp, "
         "fsdp2, expert, context, tensor) lacks: did you mean 'tensor'?"),
        ((3,), (8,), UnknownNameError, "a name is a string or None, not 3"),
    ],
)  # fmt: skip
def test_refusals_name_the_cure(names: Any, shape: Any, error: type, text: str) -> None:
    rules = DEFAULT_RULES | {"a": "tensr"}
    (problem,) = resolve(names, rules, shape, FULL).problems
    assert problem.error is error
    assert text in problem.text


def test_without_a_mesh_names_and_rank_are_checked_and_sizes_are_not() -> None:
    assert resolve(("heads",), DEFAULT_RULES, (17,)).problems == ()
    assert resolve(("haeds",), DEFAULT_RULES, (17,)).problems
    assert resolve(("heads",), DEFAULT_RULES, (17, 2)).problems


def test_all_unknown_names_of_an_array_are_reported() -> None:
    assert len(resolve(("emebd", "mpl"), DEFAULT_RULES, (2, 2)).problems) == 2


def test_logical_to_mesh_axes_is_strict_under_axis_rules() -> None:
    rules = preset("fsdp_tp")
    assert logical_to_mesh_axes(("embed", "mlp"), rules) == P("fsdp", "tensor")
    with use(make_mesh("fsdp=8"), rules):
        assert logical_to_mesh_axes(("embed", "mlp")) == P("fsdp")
    with pytest.raises(UnknownNameError, match="did you mean 'embed'"):
        logical_to_mesh_axes(("emebd",), rules)


AXES = ("data", "fsdp", "fsdp2", "tensor", "rows")
# Drawn whole from a list: drawing each axis by itself takes ten times as long.
RULES = [
    tuple(axis + "?" * may for axis, may in zip(axes, yields, strict=True))
    for count in range(4)
    for axes in itertools.permutations(AXES, count)
    for yields in itertools.product((0, 1), repeat=count)
]
rule = st.sampled_from(RULES)
NAMES = ("a", "b", "c", "mlp", "embed", "q_lora")
tables = st.tuples(*[rule] * len(NAMES)).map(
    lambda rules: AxisRules(zip(NAMES, rules, strict=True))
)
meshes = st.sampled_from(list(itertools.product((1, 2, 3, 4), repeat=len(AXES)))).map(
    lambda sizes: tuple(zip(AXES, sizes, strict=True))
)
SIZES = list(itertools.product((1, 2, 3, 4, 6, 8, 12, 24, 48), repeat=4))
# Few dims as often as many: of many, most have something wrong.
SOME_NAMES = [
    some
    for count, times in ((0, 5), (1, 30), (2, 6), (3, 1))
    for some in times * list(itertools.permutations(NAMES, count))
] + list(itertools.permutations(NAMES, 4))[::6]
arrays = st.tuples(st.sampled_from(SOME_NAMES), st.sampled_from(SIZES)).map(
    lambda both: (both[0], both[1][: len(both[0])])
)


@given(arrays, tables, meshes)
@settings(max_examples=200)
def test_no_axis_twice_and_no_indivisible_dim(array: Any, rules: AxisRules, axes: Any) -> None:
    names, shape = array
    found = resolve(names, rules, shape, axes)
    assume(not found.problems)
    sizes = dict(axes)
    used = [axis for part in found.spec for axis in spec_axes(part)]
    assert len(used) == len(set(used))
    assert all(sizes[axis] > 1 for axis in used)
    for part, size in zip(found.spec, shape, strict=False):
        assert size % math.prod(sizes[axis] for axis in spec_axes(part)) == 0
    for dim, record in enumerate(found.dims):
        firm = [e for e in rules[names[dim]] if not e.endswith("?")]
        assert {axis for axis in firm if sizes[axis] > 1} <= set(record.taken)
        given = {axis for axis, _ in record.given_up}
        assert given | set(record.taken) == {e.rstrip("?") for e in rules[names[dim]]}


@given(arrays, tables, meshes, st.sampled_from(list(itertools.permutations(range(len(NAMES))))))
@settings(max_examples=150)
def test_order_of_dims_matters_only_in_ties(
    array: Any, rules: AxisRules, axes: Any, places: Any
) -> None:
    """Permuting the dims permutes the spec, unless two dims of one rank may yield one axis.

    The order in which the rules are written never matters.
    """
    names, shape = array
    wishes = [
        (e.rstrip("?"), tie_rank(name)) for name in names for e in rules[name] if e[-1] == "?"
    ]
    assume(len(wishes) == len(set(wishes)))
    order = [place for place in places if place < len(names)]
    one = resolve(names, rules, shape, axes)
    shuffled = AxisRules([rules.entries[place] for place in places])
    assert resolve(names, shuffled, shape, axes) == one
    two = resolve(tuple(names[i] for i in order), rules, tuple(shape[i] for i in order), axes)
    assert bool(one.problems) == bool(two.problems)
    assume(not one.problems)
    assert [one.dims[i].taken for i in order] == [d.taken for d in two.dims]


@given(arrays, tables, meshes)
@settings(max_examples=100)
def test_axes_of_size_1_never_change_a_result(array: Any, rules: AxisRules, axes: Any) -> None:
    """Neither where they are left out nor where there are more (of the presets' axes)."""
    names, shape = array
    fewer = tuple((axis, size) for axis, size in axes if size > 1 or axis not in KNOWN_AXES)
    more = (("stage", 1), *axes, ("expert", 1))
    one, two, three = (resolve(names, rules, shape, each) for each in (axes, fewer, more))
    assert one.spec == two.spec == three.spec
    assert one.problems == two.problems == three.problems
    assert [d.taken for d in one.dims] == [d.taken for d in two.dims]


@given(arrays, tables, meshes, st.integers(0, 2000))
@settings(max_examples=100)
def test_threshold_keeps_small_arrays_whole_and_others_as_they_are(
    array: Any, rules: AxisRules, axes: Any, least: int
) -> None:
    names, shape = array
    found = resolve(names, rules, shape, axes, least)
    if math.prod(shape) >= least:
        assert found == resolve(names, rules, shape, axes)
    else:
        assert found.spec == P() and found.problems == ()


@given(arrays, tables, meshes)
@settings(max_examples=50)
def test_deterministic_and_cached(array: Any, rules: AxisRules, axes: Any) -> None:
    names, shape = array
    found = resolve(names, rules, shape, axes)
    assert resolve(names, AxisRules(list(rules), title="equal"), shape, axes) is found
    assert resolve.__wrapped__(names, rules, shape, axes) == found


@given(tables, tables, tables)
@settings(max_examples=50)
def test_sums_do_not_depend_on_order(one: AxisRules, two: AxisRules, three: AxisRules) -> None:
    """The same axes, as firm; the order of axes is that of the presets where both have some."""

    def sets(rules: AxisRules) -> dict[str, set[str]]:
        return {name: set(axes) for name, axes in rules}

    assert one + one == one
    assert sets(one + two) == sets(two + one)
    assert sets((one + two) + three) == sets(one + (two + three))
    assert sets(one | two) == sets(two)
