"""The four sets of rules, names by path, the threshold, and roles: all in one value."""

from __future__ import annotations

import pickle

import pytest
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import (
    AxisRules,
    InvalidRuleError,
    OverrideError,
    Roles,
    preset,
    resolve,
)

BASE = AxisRules({"batch": "data", "embed": "fsdp", "mlp": "tensor"}, title="base")


def test_what_follows_what() -> None:
    """Compute and optimizer are as stored, eval is as compute."""
    assert BASE.stored is BASE.compute is BASE.optimizer is BASE.eval is BASE
    rules = BASE.with_sets(compute={"embed": None})
    assert rules["embed"] == rules.stored["embed"] == rules.optimizer["embed"] == ("fsdp",)
    assert rules.compute["embed"] == rules.eval["embed"] == ()
    assert rules.stored == BASE and rules.stored.sets == ()
    assert rules.compute.compute is rules.compute


def test_sets_of_the_constructor_and_later_are_equal() -> None:
    one = AxisRules(BASE, optimizer={"embed": "fsdp data"}, eval={"batch": None})
    two = BASE.with_sets(optimizer={"embed": ("fsdp", "data")}).with_sets(eval={"batch": ()})
    assert one == two and hash(one) == hash(two) and one != BASE
    assert one.axes == {"data", "fsdp", "tensor"}
    assert BASE.with_sets(optimizer={"embed": "fsdp"}) == BASE  # it says what holds anyway


def test_a_dict_changes_a_set_and_rules_replace_it() -> None:
    rules = BASE.with_sets(optimizer={"embed": "data"})
    assert rules.with_sets(optimizer={"mlp": None}).optimizer["embed"] == ("data",)
    assert rules.with_sets(optimizer=BASE) == BASE
    with pytest.raises(InvalidRuleError, match="the rules for eval have none for batch, mlp"):
        BASE.with_sets(eval=AxisRules({"embed": None}))
    with pytest.raises(InvalidRuleError, match="'fsdp,x' is no axis"):
        BASE.with_sets(eval={"embed": "fsdp,x"})


def test_both_operators_go_through_all_sets() -> None:
    rules = BASE.with_sets(optimizer={"embed": "fsdp data"})
    more = rules | {"mlp": None, "mine": "rows"}
    assert more["mlp"] == more.optimizer["mlp"] == ()
    assert more["mine"] == more.optimizer["mine"] == ("rows",)
    assert more.optimizer["embed"] == ("fsdp", "data")
    assert (BASE | rules) == rules
    assert rules.with_rules(embed=None) == BASE.with_rules(embed=None)
    total = preset("zero1") + preset("tp_sp")
    assert total.optimizer["mlp"] == total["mlp"] == ("tensor",)
    assert (total["embed"], total.optimizer["embed"]) == ((), ("data?",))


def test_no_hash_is_pickled() -> None:
    """Strings hash differently in each process."""
    rules = BASE.with_sets(compute={"embed": None}).with_min_size(7)
    rules = rules.with_overrides(params={"a/.*": ("embed",)}, activations={"a": [("batch",), None]})
    here = hash(rules)
    object.__setattr__(rules, "_hash", here + 1)  # as if made in another process
    again = pickle.loads(pickle.dumps(rules))
    assert (again, hash(again)) == (rules, here)


def test_threshold() -> None:
    """Small parameters are whole, whatever the rules; their names are checked all the same."""
    rules, axes = BASE.with_min_size(65), (("fsdp", 4), ("tensor", 2))
    found = resolve(("embed", "mlp"), rules, (8, 8), axes, rules.min_size)
    assert found.spec == P() and found.problems == ()
    assert found.dims[0].given_up == (("fsdp", "below the threshold of 65 elements"),)
    assert resolve(("embed",), rules, (7,), axes, rules.min_size).problems == ()
    assert resolve(("embed", "mlp"), rules, (8, 16), axes, rules.min_size).spec == P(
        "fsdp", "tensor"
    )
    assert resolve(("embed", "mlp"), rules, (8, 8), axes).spec == P("fsdp", "tensor")
    assert resolve(("emebd",), rules, (8,), axes, rules.min_size).problems
    assert rules.optimizer.min_size == rules.compute.min_size == 65
    assert (rules | {"mlp": None}).min_size == (BASE + rules).min_size == 65
    with pytest.raises(InvalidRuleError, match="min_size is a number of elements, not -1"):
        BASE.with_min_size(-1)


def test_roles() -> None:
    assert preset("default").roles == Roles(
        ("data", "fsdp", "fsdp2", "expert"), ("context",), ("expert",), ("stage",)
    )
    assert preset("decode").roles.batch == ("data", "fsdp", "fsdp2", "expert")
    assert preset("ep_as_cp").roles.context == ("expert",)
    assert BASE.roles == Roles(("data",))
    assert BASE.with_sets(compute={"batch": "data fsdp"}).roles.batch == ("data", "fsdp")
    assert preset("default").roles.on({"fsdp": 4, "context": 1, "tensor": 2}) == Roles(("fsdp",))


def test_names_by_path() -> None:
    rules = BASE.with_overrides(params={r".*/kernel": ("embed", "mlp"), r"a/bias": ("mlp",)})
    assert rules.param_names("a/kernel") == ("embed", "mlp")
    assert rules.param_names("kernel") is None and rules.param_names("a/kernel/0") is None
    assert rules.optimizer.param_names("a/bias") == ("mlp",)
    assert BASE.param_names("a/kernel") is None
    again = rules.with_overrides(params={"a/bias": (None,)}, activations={"a": ("batch", None)})
    assert again.param_names("a/bias") == (None,)
    assert again.activation_names("a/__call__") == ("batch", None)
    assert again.activation_names("a/decode") is again.activation_names("b/__call__") is None
    assert rules != BASE and hash(rules) != hash(BASE)


def test_two_overrides_must_not_differ() -> None:
    rules = BASE.with_overrides(params={".*": ("embed",), "a/.*": ("mlp",)})
    assert rules.param_names("b/bias") == ("embed",)
    with pytest.raises(
        OverrideError, match=r"params for 'a/bias' differ: '\.\*': \('embed',\), 'a/"
    ):
        rules.param_names("a/bias")
    same = BASE.with_overrides(params={".*": ("embed",), "a/.*": ("embed",)})
    assert same.param_names("a/bias") == ("embed",)
    with pytest.raises(OverrideError, match=r"base \+ base: 'a' has the names"):
        _ = BASE.with_overrides(params={"a": ("mlp",)}) + BASE.with_overrides(params={"a": (None,)})


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"a(": ("embed",)}, r"overrides of params: 'a\(' is no expression"),
        ({"a": "embed"}, "'a' has 'embed' for names. Write a tuple with one name, or None, for"),
        ({"a": [("embed",)]}, "for names. Write a tuple"),
        ({"a": (1,)}, "for names. Write a tuple"),
    ],
)
def test_senseless_overrides_are_refused(params: dict[str, object], text: str) -> None:
    with pytest.raises(OverrideError, match=text):
        BASE.with_overrides(params=params)  # pyright: ignore[reportArgumentType]


def test_printed_with_its_sets() -> None:
    rules = BASE.with_sets(compute={"embed": None}, eval={"batch": None}).with_min_size(1000)
    rules = rules.with_overrides(params={"a": ("embed", None)}, activations={"b": ("batch",)})
    assert str(rules).splitlines() == [
        "base",
        "batch  data",
        "embed  fsdp",
        "mlp    tensor",
        "in compute:",
        "embed  -",
        "in evaluation:",
        "batch  -",
        "names of the parameters a: (embed, None)",
        "names of what b returns: (batch,)",
        "parameters below 1,000 elements are not sharded",
    ]
    table = rules.__rich__()
    assert [str(column.header) for column in table.columns] == ["name", "stored", "compute", "eval"]
    assert [str(cell) for cell in table.columns[2].cells] == ["", "-", ""]
