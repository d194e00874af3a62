"""Slips that every entry point has to answer: what was given, and what to write instead."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import shardflax.nn as nn
from shardflax import partitioning as pt

RULES = pt.AxisRules({"batch": "data", "embed": "fsdp", "mlp": "tensor", "act_mlp": "tensor"})
MESH = pt.make_mesh("fsdp=4,tensor=2")
X = jnp.ones((8, 8))


def _in_scope(run: Any) -> Any:
    with pt.use(MESH, RULES):
        return run()


def _layout(mesh: Any = MESH, rules: Any = RULES) -> Any:
    return pt.abstract_layout(lambda: {"w": X}, mesh=mesh, rules=rules)


@pytest.mark.parametrize("kind", ["compute", "optimizer", "eval"])
def test_a_set_changes_rules_that_are_there(kind: str) -> None:
    """A misspelt name in a set would change nothing, in silence."""
    text = f"rules: {kind}= changes the rule for 'bacth', .* none: did you mean 'batch'"
    with pytest.raises(pt.InvalidRuleError, match=text):
        pt.AxisRules(RULES, **{kind: {"bacth": None}})  # type: ignore[arg-type]
    with pytest.raises(pt.InvalidRuleError, match=text):
        RULES.with_sets(**{kind: [("bacth", None)]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("fsdp_tp", r"not 'fsdp_tp'. Write preset\('fsdp_tp'\)"),
        ({"batch": "data"}, r"not a dict. Write AxisRules\({...}\)"),
        ([("batch",)], r"not \('batch',\)"),
        (MESH, "not a Mesh"),
    ],
)
@pytest.mark.parametrize(
    "run",
    [
        lambda rules: pt.use(MESH, rules).__enter__(),
        lambda rules: pt.logical_axis_rules(rules).__enter__(),
        lambda rules: pt.set_logical_axis_rules(rules),
        lambda rules: pt.with_logical_constraint(X, ("batch", None), rules, MESH),
        lambda rules: pt.Layout({"w": X}, MESH, rules),
        lambda rules: _layout(rules=rules),
        lambda rules: pt.explain({"w": X}, MESH, rules),
        lambda rules: pt.batch_sharding(MESH, rules),
    ],
)
def test_what_is_no_rules(run: Any, wrong: Any, text: str) -> None:
    with pytest.raises(pt.InvalidRuleError, match=f"rules are AxisRules, .*{text}"):
        run(wrong)


@pytest.mark.parametrize(
    "run",
    [
        lambda mesh: pt.use(mesh, RULES).__enter__(),
        lambda mesh: pt.Layout({"w": X}, mesh, RULES),
        lambda mesh: _layout(mesh),
        lambda mesh: pt.init_sharded(lambda: X, mesh=mesh, rules=RULES),
        lambda mesh: pt.batch_sharding(mesh, RULES, ("batch",)),
        lambda mesh: pt.with_logical_constraint(X, ("batch", None), RULES, mesh),
    ],
)
def test_what_is_no_mesh(run: Any) -> None:
    with pytest.raises(pt.MeshSpecError, match=r"not 'fsdp=8'. Write make_mesh\('fsdp=8'\)"):
        run("fsdp=8")


def test_a_layout_needs_rules_and_a_mesh() -> None:
    with pytest.raises(pt.InvalidRuleError, match=r"not None. Write \(\) if none are wanted"):
        pt.Layout({"w": X}, MESH, None)  # type: ignore[arg-type]
    with pytest.raises(pt.MeshSpecError, match="not None"):
        pt.Layout({"w": X}, None, RULES)  # type: ignore[arg-type]


def test_a_mesh_axis_on_two_dims() -> None:
    """Of a box with mesh axes, JAX would refuse it later, and without a path."""
    box = nn.Partitioned(X, ("fsdp", "fsdp"))
    layout = pt.Layout({"w": box}, MESH, RULES)
    text = r"w, shape \(8, 8\): .*: dims 0 and 1 both have the axis 'fsdp'"
    with pytest.raises(pt.AxisConflictError, match=text):
        layout.check()


def test_dims_beside_a_weight_have_rules() -> None:
    with pytest.raises(pt.UnknownNameError, match=r"'bacth' .*did you mean 'batch'"):
        _in_scope(lambda: pt.at_use(X, ("embed", "mlp"), ("bacth",)))


def test_a_weight_that_was_never_boxed_has_a_place_in_errors() -> None:
    model = nn.Dense(8, kernel_axes=("emebd", "mlp"), use_bias=False)
    with pytest.raises(pt.UnknownNameError, match=r"weight at its use at .*test_slips.*'emebd'"):
        _in_scope(lambda: model.apply({"params": {"kernel": X}}, X))


def test_a_batch_over_a_mesh_with_another_word_for_its_axes() -> None:
    """The rules' axes count as size 1 where a mesh lacks them: the batch would be whole."""
    with pytest.raises(pt.UnknownAxisError, match=r"mesh axis 'model' .*did you mean 'tensor'"):
        pt.batch_sharding(pt.make_mesh("model=8"), RULES, ("batch",))


def test_parameters_that_are_not_where_they_are_said_to_be() -> None:
    with pytest.raises(pt.LayoutError, match=r"parameters=\('modle',\).*did you mean 'model'"):
        pt.Layout({"model": {"w": X}}, MESH, RULES, parameters=("modle",))


def test_arrays_cannot_be_made_on_an_abstract_mesh() -> None:
    mesh: Any = pt.make_abstract_mesh("fsdp=8")
    with pytest.raises(pt.MeshScopeError, match=r"init_sharded.*has no devices.*abstract_layout"):
        pt.init_sharded(lambda: X, mesh=mesh, rules=RULES)


def test_overrides_are_compared_with_what_a_user_wrote() -> None:
    """Not with the attributes that every module has."""
    rules = RULES.with_overrides(activations={"nope": ("batch", "act_mlp")})
    model = nn.Dense(8)
    layout = pt.abstract_layout(lambda: model.init(jax.random.key(0), X), mesh=MESH, rules=rules)
    (problem,) = layout.problems
    assert "scope" not in str(problem) and "known: , __call__." in str(problem)


def test_slices_that_do_not_divide_the_devices() -> None:
    with pytest.raises(pt.MeshSpecError, match=r"3 slices .* 64 devices"):
        pt.make_abstract_mesh("dcn(data=-1) ici(fsdp=-1)", devices=64, slices=3)


@pytest.mark.parametrize(
    "error",
    [
        pt.CollectivesError(["a", "b"]),
        pt.LockDriftError(["a", "b"]),
        pt.LockFileError("no.lock", "there is no such file."),
        pt.PartitioningUnspecifiedError(nn.Partitioned(1.0, ("embed",))),
        pt.UnknownNameError("a", [pt.Problem(pt.UnknownNameError, "a")]),
    ],
)
def test_errors_cross_processes(error: Exception) -> None:
    """As a test runner with workers sends them."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_what_is_wrong_with_a_parameter_is_said_once() -> None:
    """And not for each of its moments."""
    wrong = nn.LogicallyPartitioned(X, ("emebd", "mlp"))
    state = {"mu": {"w": X}, "nu": {"w": X}, "params": {"w": wrong}}
    with pytest.raises(pt.UnknownNameError, match=r"^params/w, [^\n]*$"):
        pt.Layout(state, MESH, RULES).check()


def test_an_optimizer_that_masks_boxed_parameters() -> None:
    """Optax replaces what is in the box: a box around nothing is no leaf."""
    params = {"w": nn.LogicallyPartitioned(X, ("embed", "mlp")), "b": nn.Partitioned(X[0], (None,))}
    tx = optax.masked(optax.adam(1e-3), {"w": True, "b": False})
    state = {"params": params, "opt_state": tx.init(params)}
    layout = pt.Layout(state, MESH, RULES)
    assert layout.leaf("opt_state/inner_state/0/mu/w").spec == jax.P("fsdp", "tensor")
    assert layout.unnamed == layout.problems == ()
    assert jax.tree.structure(layout.specs) == jax.tree.structure(nn.unbox(state))
    made, _ = pt.init_sharded(
        lambda: {"params": params, "opt_state": tx.init(params)}, mesh=MESH, rules=RULES
    )
    assert jax.tree.structure(made) == jax.tree.structure(layout.specs)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("all-gahter over fsdp", "'all-gahter': did you mean 'all-gather'"),
        ("all-gather over fspd", "no axis 'fspd': did you mean 'fsdp'"),
        ("all-gather over tensor,fsdp", "order of the mesh, fsdp,tensor"),
    ],
)
def test_a_contract_that_no_program_can_break(what: str, text: str) -> None:
    """Said as "none of these", it would hold for ever."""
    compiled = jax.jit(lambda x: x).lower(X).compile()
    with pytest.raises(pt.CollectivesError, match=text):
        pt.assert_collectives(compiled, {what: 0}, MESH)
    pt.assert_collectives(compiled, {"all-gather over fsdp": 0, "all-to-all over expert": 0}, MESH)


def test_rules_made_of_rules_keep_their_sets() -> None:
    """As a sequence of pairs they would lose them, and ZeRO-1 with them."""
    whole = pt.preset("zero1").with_overrides(params={"w": ("embed",)}).with_min_size(7)
    assert pt.AxisRules(whole) == whole
    again = pt.AxisRules(whole, eval={"batch": None})
    assert again == whole.with_sets(eval={"batch": None})
    assert again.optimizer == whole.optimizer


@pytest.mark.parametrize("names", ["batch", ["batch", "act_mlp"], {"a": "batch"}])
@pytest.mark.parametrize("run", [pt.with_logical_constraint, pt.reshard])
def test_names_that_are_no_tuple(run: Any, names: Any) -> None:
    x = {"a": X} if isinstance(names, dict) else X
    with pytest.raises(pt.TreeMismatchError, match=r"are a tuple: write \('batch',"):
        _in_scope(lambda: run(x, names))


def test_one_string_is_not_taken_by_its_letters() -> None:
    text = r"one for each dim: write \('embed',\)"
    names: Any = "embed"
    for wrong in (
        lambda: nn.Dense(8, kernel_axes=names).init(jax.random.key(0), X),
        lambda: pt.named(nn.initializers.zeros, names)(jax.random.key(0), (4,)),
        lambda: pt.batch_sharding(pt.make_mesh("data=8"), pt.preset("dp"), names),
    ):
        with pytest.raises(pt.NamesRankError, match=text):
            wrong()
