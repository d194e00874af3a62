"""Rules of other codebases: what they become, what is said of it, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from shardflax.partitioning import (
    DEFAULT_RULES,
    AxisRules,
    InvalidRuleError,
    from_levanter,
    from_maxtext,
    from_t5x,
    logical_to_mesh_axes,
    preset,
    resolve,
)
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.vocabulary import known_name

# In the form of MaxText's configuration: every axis by its own word, several rules for a name.
MAXTEXT: list[Any] = [
    ["activation_batch", ["data", "fsdp", "fsdp_transpose", "expert"]],
    ["activation_batch_no_exp", ["data", "fsdp", "fsdp_transpose"]],
    ["activation_embed_and_logits_batch", ["data", "stage", "fsdp", "fsdp_transpose", "expert"]],
    ["activation_heads", ["tensor", "tensor_sequence"]],
    ["activation_kv_heads", ["tensor"]],
    ["activation_length", ["sequence", "context"]],
    ["activation_norm_length", ["context"]],
    ["activation_embed", []],
    ["activation_mlp", ["tensor", "tensor_sequence"]],
    ["activation_kv", []],
    ["activation_vocab", ["tensor", "sequence"]],
    ["activation_vocab", ["tensor"]],
    ["activation_vocab", "tensor_sequence"],
    ["activation_stage", "stage"],
    ["activation_exp", ["expert"]],
    ["mlp", ["fsdp_transpose", "tensor", "tensor_sequence"]],
    ["vocab", ["tensor", "tensor_sequence"]],
    ["q_heads", ["tensor", "tensor_sequence"]],
    ["kv_heads", ["tensor"]],
    ["embed", ["fsdp", "fsdp_transpose", "context", "expert"]],
    ["embed", ["fsdp", "context", "expert"]],
    ["embed_no_exp", ["fsdp", "context"]],
    ["norm", []],
    ["layers", "stage"],
    ["kv", []],
    ["kv_head_dim", []],
    ["exp", "expert"],
    ["cache_batch", []],
    ["cache_heads", ["tensor"]],
]

T5X: list[Any] = [
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("kv", None),
    ("joined_kv", "model"),
    ("embed", "model"),
    ("embed", "data"),
    ("relpos_buckets", None),
    ("length", None),
    ("layers", None),
]

LEVANTER = {
    "batch_axis": "batch",
    "fsdp_axis": "embed",
    "tensor_parallel_axes": ["mlp", "heads"],
    "axis_resources": {"position": None, "vocab": "model"},
    "parameter_axis_resources": {"kv_head": "data"},
    "num_train_steps": 100,
}


# Ours, and what others call it.
NAMES = {
    "act_mlp": "activation_mlp",
    "act_heads": "activation_heads",
    "batch": "activation_batch activation_batch_attn",
    "moe_batch": "activation_batch_no_exp_moe",
    "length": "activation_length position",
    "kv_length": "key_position",
    "head_dim": "kv head_size kv_head_dim",
    "heads": "q_heads",
    "expert": "exp experts",
    "expert_embed": "embed_moe",
    "expert_mlp": "mlp_moe",
    "vocab_embed": "embed_vocab",
    "embed": "embed",
}
AXES = {
    "fsdp2": "fsdp_transpose",
    "tensor": "model mdl tp",
    "context": "seq sequence cp",
    "stage": "pipeline pp",
    "data": "replica",
    "expert": "ep",
}


def test_every_word_of_other_codebases() -> None:
    for ours, theirs in NAMES.items():
        assert {known_name(name) for name in theirs.split()} == {ours}
    assert set(NAMES) <= set(DEFAULT_RULES.names)
    for ours, theirs in AXES.items():
        rules = from_maxtext([[f"dim_{axis}", [axis]] for axis in theirs.split()]).rules
        assert {axes for _, axes in rules} == {(ours,)}


def test_maxtext() -> None:
    found = from_maxtext(MAXTEXT, axes=["data", "fsdp"])
    rules = found.rules
    assert rules["batch"] == ("data", "fsdp", "fsdp2", "expert")
    assert rules["moe_batch"] == ("data", "fsdp", "fsdp2")
    assert rules["vocab_batch"] == ("data", "stage", "fsdp", "fsdp2", "expert")
    assert rules["embed"] == ("fsdp", "fsdp2?", "context", "expert") == DEFAULT_RULES["embed"]
    assert rules["act_vocab"] == ("tensor?", "context?")  # its last rule names no axis of the mesh
    assert rules["length"] == ("context",)  # two axes there, one here
    assert rules["head_dim"] == rules["act_head_dim"] == ()
    assert (rules["heads"], rules["expert"]) == (("tensor",), ("expert",))
    assert found.yielding == ("activation_vocab", "embed")
    assert found.own == ("embed_no_exp",)
    assert found.dropped == ("tensor_sequence",) and found.own_axes == ()
    assert ("kv", "head_dim") in found.renamed and ("kv_head_dim", "head_dim") in found.renamed
    assert found.renamed_axes == (("fsdp_transpose", "fsdp2"), ("sequence", "context"))
    assert "vocab_embed" in found.missing and "embed" not in found.missing
    assert (preset("dp") | rules)["vocab_embed"] == ()
    assert str(found).splitlines()[0] == f"maxtext rules: {len(rules)} names"


def test_axes_of_its_own_are_kept_unless_the_mesh_is_told() -> None:
    found = from_maxtext(MAXTEXT, choose={"activation_vocab": "tensor? tensor_sequence?"})
    assert found.own_axes == ("tensor_sequence",) and found.dropped == ()
    assert found.rules["mlp"] == ("fsdp2", "tensor", "tensor_sequence")
    assert found.rules["act_vocab"] == ("tensor?", "tensor_sequence?")


@pytest.mark.parametrize(
    "names",
    [
        ("embed", "mlp"),
        ("embed", "q_heads", "kv"),
        ("q_heads", "kv", "embed"),
        ("vocab", "embed"),
        ("exp", "embed_no_exp", "mlp"),
        ("activation_batch", "activation_norm_length", "activation_embed"),
        ("activation_batch", "activation_length", "activation_heads", "activation_kv"),
        ("cache_batch", "cache_heads", "kv"),
    ],
)
def test_maxtext_arrays_lie_as_they_lay(names: tuple[str, ...]) -> None:
    """The same axes as Linen's resolver gives, by the other words."""
    rules = from_maxtext(MAXTEXT, choose={"activation_vocab": "tensor"}).rules
    axes = tuple((axis, 2) for axis in sorted(rules.axes))
    found = resolve(tuple(map(known_name, names)), rules, (64,) * len(names), axes)
    assert found.problems == ()
    theirs = logical_to_mesh_axes(names, [(name, tuple(given)) for name, given in _pairs(MAXTEXT)])
    renamed = {"fsdp_transpose": "fsdp2", "sequence": "context"}
    expected = [
        tuple(dict.fromkeys(renamed.get(axis, axis) for axis in spec_axes(part)))
        for part in theirs or ()
    ]
    assert [dim.taken for dim in found.dims] == expected


def _pairs(rules: list[Any]) -> list[tuple[str, Any]]:
    return [(name, (axes,) if isinstance(axes, str) else axes) for name, axes in rules]


def test_t5x() -> None:
    found = from_t5x(T5X, choose={"embed": "data"})
    assert found.rules["embed"] == ("data",)
    assert found.rules["heads"] == found.rules["joined_kv"] == ("tensor",)
    assert found.rules["head_dim"] == found.rules["length"] == ()
    assert found.renamed == (("kv", "head_dim"),)
    assert found.renamed_axes == (("model", "tensor"),)
    assert found.own == ("joined_kv", "relpos_buckets")


def test_levanter() -> None:
    found = from_levanter(LEVANTER)
    rules = found.rules
    assert rules["batch"] == rules.compute["batch"] == ("data", "fsdp")
    assert (rules["embed"], rules.compute["embed"]) == (("fsdp",), ())
    assert (rules["kv_heads"], rules.compute["kv_heads"]) == (("fsdp",), ())
    assert rules["mlp"] == rules["vocab"] == rules.compute["heads"] == ("tensor",)
    assert rules["length"] == rules.optimizer["length"] == ()
    assert rules.optimizer["embed"] == ("fsdp",)
    newer = {
        "mesh": {
            "axes": {"replica": 1, "data": -1, "model": 1},
            "shared_mapping": {"mlp": "model", "heads": "model", "vocab": "model"},
            "compute_mapping": {"batch": ["replica_dcn", "replica", "data"], "position": None},
            "param_mapping": {"embed": "data", "kv_head": "data"},
        }
    }
    other = from_levanter(newer).rules
    assert dict(other) == dict(rules) and dict(other.compute) == dict(rules.compute)
    assert "replica -> data" in str(found)


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: from_t5x(T5X), "'embed' takes tensor, or else data. Strict rules have one rule a "
         "name.*choose={'embed': 'data'}"),
        (lambda: from_maxtext(["embed"]), "maxtext rules: a pair of a name and axes, not 'embed'"),
        (lambda: from_maxtext([("embed", "fsdp", "data")]), "a pair of a name and axes"),
        (lambda: from_t5x([(None, "data")]), "a pair of a name and axes"),
        (lambda: from_levanter({"embed": "data"}), "levanter rules: none of axis_resources"),
        (lambda: from_maxtext([("embed", ["a-b"])]), "'a-b' is no axis"),
        (lambda: from_maxtext([3]), "a pair of a name and axes, not 3"),  # type: ignore[list-item]
        (lambda: from_maxtext(None), "not None"),  # type: ignore[arg-type]
        (lambda: from_maxtext([("embed", 3)]), "'embed' takes 3, and no names of axes"),
        (lambda: from_t5x([("embed", "data")], choose={"embd": "data"}),
         r"choose=\{'embd': ...\}: no rule: did you mean 'embed'"),
        (lambda: from_levanter({"fsdp_axis": "embed", "mesh": "data=8"}), "'mesh' is a str"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_strictly_is_refused(run: Any, text: str) -> None:
    with pytest.raises(InvalidRuleError, match=text):
        run()


def test_of_two_names_that_become_one_both_are_kept_where_they_differ() -> None:
    found = from_maxtext([("exp", "expert"), ("experts", None), ("heads", "x"), ("q_heads", "y")])
    assert dict(found.rules) == {"expert": ("expert",), "experts": (), "heads": ("x",),
                                 "q_heads": ("y",)}  # fmt: skip
    assert found.renamed == (("exp", "expert"),) and found.own == ("experts", "q_heads")


def test_rules_to_the_first_that_fits() -> None:
    """What stands after a rule to nothing is never tried; repeated rules are one."""
    found = from_maxtext([("a", ["x", "y"]), ("a", ["x"]), ("a", ["x"]), ("a", []), ("a", ["z"])])
    assert found.rules == AxisRules({"a": "x? y?"})


def test_rules_that_say_all_combinations_are_one() -> None:
    """Two axes that may yield, written out; and what could never be reached."""
    listed = [["a", [*axes, "x"]] for axes in (["y", "z"], ["z"], ["y"], ["y", "z"], [])]
    found = from_maxtext(listed)
    assert found.rules == AxisRules({"a": "y? z? x"}) and found.yielding == ("a",)
    for axes in itertools.product((1, 2), repeat=2):
        taken = [axis for axis, size in zip("yz", axes, strict=True) if size > 1]
        names, mesh = ("b", "a"), (("x", 2), ("y", 2), ("z", 2))
        strict = resolve(names, found.rules | {"b": taken}, (8, 8), mesh)
        theirs = logical_to_mesh_axes(names, [("b", tuple(taken)), *_pairs(listed)])
        assert [set(dim.taken) for dim in strict.dims] == [
            set(spec_axes(one)) for one in theirs or ()
        ]
    with pytest.raises(InvalidRuleError, match=r"'a' takes y z x, or else y, or else z. Strict"):
        from_maxtext([["a", ["y", "z", "x"]], ["a", ["y"]], ["a", ["z"]]])


def test_a_whole_configuration_is_read() -> None:
    listed = [["mlp", ["tensor"]], ["embed", []]]
    rules = from_maxtext({"logical_axis_rules": listed, "steps": 10}).rules
    assert rules == from_maxtext(listed).rules == from_maxtext({"mlp": "tensor", "embed": []}).rules


def test_a_name_of_another_codebase_is_recognised_in_errors() -> None:
    (problem,) = resolve(("activation_kv_heads",), DEFAULT_RULES, (2,)).problems
    assert "did you mean 'act_kv_heads'?" in problem.text
    (problem,) = resolve(("kv",), DEFAULT_RULES, (2,)).problems
    assert "did you mean 'head_dim'?" in problem.text
