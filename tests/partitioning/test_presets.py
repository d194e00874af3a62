"""Presets: complete, what they say they are, and sums of one another."""

from __future__ import annotations

import itertools

import pytest
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import (
    DEFAULT_RULES,
    KNOWN_AXES,
    PRESETS,
    AxisRules,
    UnknownPresetError,
    batch_axes,
    make_mesh,
    preset,
    resolve,
)

CHANGED = ("tp_embed", "ep_as_cp", "cp_as_ep", "decode")
"""Presets that are no cut of the default rules: they give a name axes that it has not there."""


def test_all_are_there() -> None:
    assert list(PRESETS) == [
        "dp", "zero1", "fsdp", "hsdp", "fsdp2d", "tp_sp", "tp_embed", "fsdp_tp",
        "cp", "ep", "ep_as_cp", "cp_as_ep", "ep_as_dp", "pp", "decode",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_complete(name: str) -> None:
    """Every preset knows every default name, and the presets' axes alone."""
    rules = preset(name)
    assert rules.title == name
    assert rules.names == DEFAULT_RULES.names
    assert rules.axes <= set(KNOWN_AXES)
    if name not in CHANGED:
        assert all(set(axes) <= set(DEFAULT_RULES[key]) for key, axes in rules)


@pytest.mark.parametrize(
    ("name", "axes", "some"),
    [
        ("dp", {"data"}, {"embed": (), "batch": ("data",)}),
        ("zero1", {"data"}, {"embed": (), "batch": ("data",)}),
        ("fsdp", {"data", "fsdp"}, {"embed": ("fsdp",), "mlp": ()}),
        ("hsdp", {"data", "fsdp"}, {"embed": ("fsdp",), "batch": ("data", "fsdp")}),
        ("fsdp2d", {"data", "fsdp", "fsdp2"}, {"embed": ("fsdp", "fsdp2?"), "mlp": ("fsdp2?",)}),
        ("tp_sp", {"data", "tensor"}, {"norm_length": ("tensor?",), "act_embed": ()}),
        ("tp_embed", {"data", "tensor"}, {"norm_length": (), "act_embed": ("tensor",)}),
        ("fsdp_tp", {"data", "fsdp", "tensor"}, {"embed": ("fsdp",), "mlp": ("tensor",)}),
        ("cp", {"data", "context"}, {"length": ("context",), "embed": ("context",)}),
        ("ep", {"data", "expert"}, {"batch": ("data", "expert"), "moe_batch": ("data",),
                                    "embed": ("expert",)}),
        ("ep_as_cp", {"data", "expert"}, {"batch": ("data",), "length": ("expert",)}),
        ("cp_as_ep", {"data", "context"}, {"expert": ("context",), "length": ("context",)}),
        ("ep_as_dp", {"data", "expert"}, {"batch": ("data", "expert"), "embed": ()}),
        ("pp", {"data", "stage"}, {"stage": ("stage",), "vocab_batch": ("data", "stage")}),
        ("decode", set(KNOWN_AXES) - {"stage"}, {"embed": (), "cache_length": ("context?",)}),
    ],
)  # fmt: skip
def test_presets_shard_what_they_say(
    name: str, axes: set[str], some: dict[str, tuple[str, ...]]
) -> None:
    rules = preset(name)
    assert rules.axes == axes
    assert {key: rules[key] for key in some} == some


def test_zero1_shards_the_optimizer_alone() -> None:
    """Whole parameters, moments over `data`: in an order that cuts what other axes have cut."""
    rules, axes = preset("zero1"), (("data", 4), ("fsdp", 2))
    kernel = (("embed", "mlp"), (8, 8), axes)
    assert resolve(kernel[0], rules, *kernel[1:]).spec == P()
    assert resolve(kernel[0], rules.optimizer, *kernel[1:]).dims[0].taken == ("data",)
    assert resolve(("embed",), rules.optimizer, (3,), axes).problems == ()
    both = preset("zero1 + fsdp")
    assert (both["embed"], both.optimizer["embed"]) == (("fsdp",), ("fsdp", "data?"))


def test_sums() -> None:
    assert preset("fsdp + tp_sp") == preset("fsdp") + preset("tp_sp") == preset("fsdp_tp")
    assert preset("fsdp+tp_sp").title == "fsdp + tp_sp"
    assert preset("dp + fsdp2d + tp_sp + cp + ep + pp") == DEFAULT_RULES == preset("default")
    assert preset("ep_as_cp + cp")["length"] == ("context", "expert")
    for one, two in itertools.combinations(PRESETS, 2):
        assert preset(one) + preset(two) == preset(two) + preset(one)
        assert preset(one) + preset(one) == preset(one)


def test_an_axis_that_must_not_yield_in_one_must_not_in_the_sum() -> None:
    one, two = AxisRules({"a": "x? y"}), AxisRules({"a": "x", "b": "rows"})
    assert (one + two)["a"] == ("x", "y")
    assert (one + two)["b"] == ("rows",)


def test_decode_takes_rows_of_any_number() -> None:
    axes = (("data", 4), ("tensor", 2))
    names = ("batch", "norm_length", "act_embed")
    assert resolve(names, preset("decode"), (1, 1, 8), axes).spec == P()
    assert resolve(names, preset("decode"), (8, 16, 8), axes).spec == P("data", "tensor")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fsdp_pt", "no preset 'fsdp_pt': did you mean 'fsdp_tp'"),
        ("fsdp + tp_ps", r"no preset 'tp_ps' \(in 'fsdp \+ tp_ps'\): did you mean 'tp_sp'"),
        ("fsdp +", "no preset ''"),
    ],
)
def test_misspelt_preset(name: str, text: str) -> None:
    with pytest.raises(UnknownPresetError, match=text):
        preset(name)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_batch_of_a_preset_is_its_role(name: str) -> None:
    mesh = make_mesh("data=2,fsdp=2,expert=2")
    assert batch_axes(mesh, preset(name)) == preset(name).roles.on(mesh.shape).batch
