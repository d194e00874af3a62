"""`AxisRules` and presets as values."""

from __future__ import annotations

import pickle

import pytest

from shardflax.core.boxes import AxisMetadata
from shardflax.partitioning import (
    DEFAULT_RULES,
    AxisRules,
    InvalidRuleError,
    get_logical_axis_rules,
    logical_axis_rules,
    preset,
    set_logical_axis_rules,
)
from shardflax.partitioning.resolve import check_mesh_axes
from shardflax.partitioning.scope import rules_in_scope


def test_spellings_of_a_rule_are_equal() -> None:
    a = AxisRules({"embed": "fsdp fsdp2? tensor", "norm": None})
    b = AxisRules([("embed", ("fsdp", "fsdp2?", "tensor")), ("norm", ())], title="other")
    assert a == b
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a
    assert list(a) == [("embed", ("fsdp", "fsdp2?", "tensor")), ("norm", ())]
    assert (len(a), a[0], a["norm"], a.get("x")) == (2, a.entries[0], (), None)
    assert "embed" in a and "fsdp" not in a
    assert a.axes == {"fsdp", "fsdp2", "tensor"}


def test_rules_combine_without_changing() -> None:
    base = AxisRules({"embed": "fsdp", "mlp": "tensor"}, title="base")
    more = base | {"mlp": None, "vocab": "tensor"}
    assert (more["mlp"], more["vocab"], base["mlp"]) == ((), ("tensor",), ("tensor",))
    assert more.names == ("embed", "mlp", "vocab")
    assert base | AxisRules({"embed": "data"}) == base.with_rules(embed="data")
    with pytest.raises(AttributeError):
        base.title = "x"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([("embed", "fsdp"), ("embed", "data")], "more than one rule for 'embed'"),
        ({"embed": "fsdp fsdp?"}, "an axis stands twice in 'fsdp fsdp?'"),
        ({"embed": "fsdp,tensor"}, "'fsdp,tensor' is no axis"),
        ({"embed": (1,)}, "1 is no axis"),
        ({"": "fsdp"}, "non-empty string"),
        ({3: "fsdp"}, "non-empty string, not 3"),
    ],
)
def test_senseless_rules_are_refused(rules: object, text: str) -> None:
    with pytest.raises(InvalidRuleError, match=text.replace("?", r"\?")):
        AxisRules(rules)  # pyright: ignore[reportArgumentType]


def test_with_rules_knows_its_names() -> None:
    with pytest.raises(InvalidRuleError, match="did you mean 'embed'"):
        AxisRules({"embed": "fsdp"}).with_rules(emebd=None)


def test_printed_as_a_table() -> None:
    assert str(preset("fsdp_tp").with_rules(act_embed="tensor")).splitlines()[:3] == [
        "fsdp_tp | overrides",
        "batch           data fsdp",
        "vocab_batch     data fsdp",
    ]
    assert str(AxisRules({})) == "rules"


def test_rules_scope_nests_and_is_restored_after_errors() -> None:
    assert get_logical_axis_rules() == ()
    with logical_axis_rules([("a", "data")]):
        with pytest.raises(RuntimeError), logical_axis_rules(DEFAULT_RULES):
            assert get_logical_axis_rules() is DEFAULT_RULES
            raise RuntimeError
        assert get_logical_axis_rules() == [("a", "data")]
    set_logical_axis_rules([("b", "data")])
    assert get_logical_axis_rules() == [("b", "data")]
    set_logical_axis_rules(())
    assert rules_in_scope() is None
    with logical_axis_rules(()):
        assert rules_in_scope() == ()


def test_rules_against_a_mesh() -> None:
    """The presets' own axes may be absent; any other axis must be in the mesh."""
    assert check_mesh_axes(DEFAULT_RULES, {"data": 8}) == ()
    assert check_mesh_axes(DEFAULT_RULES, {"data": 8, "rows": 2}) == ()
    (problem,) = check_mesh_axes(AxisRules({"embed": "fspd"}), {"fsdp": 8})
    assert "'fspd', which the mesh (fsdp) lacks: did you mean 'fsdp'?" in str(problem)
    (problem,) = check_mesh_axes(AxisRules({"mlp": "model"}), {"tensor": 8})
    assert "which the mesh (tensor) lacks: did you mean 'tensor'?" in str(problem)
    sets = AxisRules({"embed": "rows"}).with_sets(optimizer={"embed": "rows fspd"})
    (problem,) = check_mesh_axes(sets, {"fsdp": 4, "rows": 2})
    assert "the rule 'embed': 'rows fspd' names the axis 'fspd'" in str(problem)
    (problem,) = check_mesh_axes(DEFAULT_RULES, {"data": 4, "model": 2})
    assert str(problem) == "no rule names the mesh axis 'model' (size 2): did you mean 'tensor'?"


def test_boxes_are_axis_metadata() -> None:
    from shardflax.partitioning import LogicallyPartitioned, Partitioned

    assert issubclass(Partitioned, AxisMetadata) and issubclass(LogicallyPartitioned, Partitioned)
