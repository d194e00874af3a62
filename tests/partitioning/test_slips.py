"""Slips that every entry point has to answer: what was given, and what to write instead."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import shardflax.nn as nn
from shardflax import partitioning as pt
from shardflax import struct

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
        lambda: _in_scope(lambda: pt.constrain(X, names)),
    ):
        with pytest.raises(pt.NamesRankError, match=text):
            wrong()


# Not typed: what a type checker would refuse is what is tried.
loose: Any = pt


def _over_all() -> Any:
    """A program for all devices of the mesh."""
    x = jax.ShapeDtypeStruct((8, 8), "float32", sharding=jax.NamedSharding(MESH, jax.P("fsdp")))
    return jax.jit(lambda x: x + 1).lower(x).compile()


NOTHING = jax.jit(lambda: 0).lower().compile()
LOOSE: Any = RULES
WRONG_TYPES: dict[str, tuple[type[Exception], str, Any]] = {
    "rules": (pt.InvalidRuleError, r"'fsdp' is no table of rules.*preset\('fsdp'\)",
              lambda: loose.AxisRules("fsdp")),
    "rules-none": (pt.InvalidRuleError, "None is no table of rules", lambda: loose.AxisRules(None)),
    "rules-pair": (pt.InvalidRuleError, r"\('a',\) is no pair", lambda: loose.AxisRules([("a",)])),
    "rules-axes": (pt.InvalidRuleError, "'a': 4 is no axis", lambda: loose.AxisRules({"a": 4})),
    "rules-size": (pt.InvalidRuleError, "number of elements, not 'x'",
                   lambda: LOOSE.with_min_size("x")),
    "rules-name": (pt.UnknownNameError, "no rule for the name 'emebd': did you mean 'embed'",
                   lambda: LOOSE["emebd"]),
    "rules-or": (pt.InvalidRuleError, "overrides: None is no table", lambda: LOOSE | None),
    "rules-add": (pt.InvalidRuleError, r"rules \+ a dict: .* Write \|",
                  lambda: LOOSE + {"embed": "data"}),
    "overrides": (pt.OverrideError, "overrides of params: a str is no dict of names by path",
                  lambda: LOOSE.with_overrides(params="kernel")),
    "preset": (pt.UnknownPresetError, "such as 'fsdp_tp' .*found None", lambda: loose.preset(None)),
    "preset-sum": (pt.UnknownPresetError, r"no preset '' \(in 'fsdp \+'\)",
                   lambda: loose.preset("fsdp +")),
    "mesh": (pt.MeshSpecError, "not by None. Write 'fsdp=4", lambda: loose.make_mesh(None)),
    "mesh-sizes": (pt.MeshSpecError, "not by a tuple", lambda: loose.make_mesh((4, 2))),
    "mesh-devices": (pt.MeshSpecError, r"jax.devices\(\)\[:4\], not an int",
                     lambda: loose.make_mesh("fsdp=4", 4)),
    "mesh-types": (pt.MeshSpecError, "found a tuple. Write one type for all axes",
                   lambda: loose.make_mesh("fsdp=8", axis_types=("explicit",))),
    "mesh-type": (pt.MeshSpecError, "an int is no axis type",
                  lambda: loose.make_mesh("fsdp=8", axis_types={"fsdp": 1})),
    "abstract": (pt.MeshSpecError, "devices is a number, such as 8, not a list",
                 lambda: loose.make_abstract_mesh("fsdp=-1", jax.devices())),
    "abstract-none": (pt.MeshSpecError, "devices=0: there is at least one",
                      lambda: loose.make_abstract_mesh("fsdp=-1", 0)),
    "abstract-slices": (pt.MeshSpecError, "slices=0: there is at least one",
                        lambda: loose.make_abstract_mesh("fsdp=8", 8, slices=0)),
    "mesh-few": (pt.MeshSpecError, r"multiply to 16, which .* Write ici\(fsdp=8\)",
                 lambda: loose.make_mesh("dcn(data=-1) ici(fsdp=16)")),
    "picture": (pt.MeshSpecError, "a mesh is expected, not 'fsdp=8'",
                lambda: loose.mesh_picture("fsdp=8")),
    "picture-show": (pt.LayoutError, "show='ids': did you mean 'id'",
                     lambda: loose.mesh_picture(MESH, "ids")),
    "networks": (pt.MeshSpecError, "with devices is expected, not None",
                 lambda: loose.networks(None)),
    "mesh-reshard": (pt.MeshSpecError, r"Write make_mesh\('fsdp=8'\)",
                     lambda: loose.reshard(X, ("embed", None), RULES, "fsdp=8")),
    "mesh-sent": (pt.MeshSpecError, r"Write make_mesh\('fsdp=8'\)",
                  lambda: loose.collectives(None, "fsdp=8")),
    "mesh-sharding": (pt.MeshSpecError, "not None",
                      lambda: loose.logical_to_mesh_sharding({}, None, RULES)),
    "mesh-box": (pt.MeshSpecError, "not None", lambda: loose.get_sharding({}, None)),
    "mesh-program": (pt.MeshScopeError, "pass mesh=", lambda: pt.collectives(NOTHING)),
    "mesh-other": (pt.MeshScopeError, "is for 8 devices, and the mesh has 2",
                   lambda: pt.collectives(_over_all(), pt.make_mesh("data=2", jax.devices()[:2]))),
    "mesh-nowhere": (pt.MeshScopeError, "does not say which device is where",
                     lambda: loose.collectives(NOTHING, pt.make_abstract_mesh("data=8"))),
    "then": (pt.LayoutError, "then='eror': did you mean 'error'",
             lambda: loose.compile(jax.jit(lambda x: x), X, then="eror")),
    "names": (pt.NamesRankError, "not None",
              lambda: loose.with_partitioning(nn.initializers.ones, None)),
    "names-alone": (pt.NamesRankError, r"write \('embed',\)",
                    lambda: loose.logical_to_mesh_axes("embed", [("embed", "fsdp")])),
    "names-list": (pt.UnknownNameError, r"None, not \('embed',\)",
                   lambda: loose.logical_to_mesh_axes((["embed"], None), RULES)),
    "names-batch": (pt.UnknownNameError, r"None, not \('embed',\)",
                    lambda: loose.batch_sharding(MESH, RULES, (["embed"], None))),
    "names-constrain": (pt.UnknownNameError, r"None, not \('embed',\)",
                        lambda: _in_scope(lambda: loose.constrain(X, (["embed"], None)))),
    "init-rules": (pt.InvalidRuleError, r"Write preset\('fsdp'\)",
                   lambda: loose.with_logical_partitioning(nn.initializers.ones, (), rules="fsdp")),
    "state": (pt.LayoutError, "params: a str is no array",
              lambda: loose.Layout({"params": "llama3-8b"}, MESH, RULES)),
    "layout": (pt.LayoutError, "a Layout is expected, not a dict",
               lambda: loose.lock({"params": X})),
    "layout-usage": (pt.LayoutError, "That of an Explanation is its `layout`",
                     lambda: loose.rule_usage(pt.explain({"w": X}, MESH, RULES))),
    "layout-compiled": (pt.LayoutError, "a Layout is expected, not an int",
                        lambda: loose.assert_compiled(NOTHING, 1)),
    "compile": (pt.LayoutError, r"not a function. Write compile\(jax.jit\(fn\), \*args\)",
                lambda: loose.compile(lambda x: x, X)),
    "collectives": (pt.LayoutError, r"not a Lowered. Write compile\(\)",
                    lambda: loose.collectives(jax.jit(lambda x: x).lower(X))),
    "compiled": (pt.LayoutError, r"not a function. Write jax.jit\(fn\).lower",
                 lambda: loose.assert_compiled(lambda x: x, _layout())),
    "lock": (pt.LayoutError, r"not a dict. Write read_lock\(path\)\['its name'\]",
             lambda: loose.check_lock({}, _layout())),
    "imported": (pt.InvalidRuleError, "not an ImportedRules. Write the `rules` of it",
                 lambda: loose.Layout({"w": X}, MESH, loose.from_t5x([("mlp", "model")]))),
    "levanter": (pt.InvalidRuleError, "an int is no configuration.*asdict",
                 lambda: loose.from_levanter(3)),
    "explain-class": (pt.LayoutError, r"Dense is a class. Give a module of it: Dense\(...\)",
                      lambda: pt.explain(nn.Dense, MESH, RULES, X)),
    "init-module": (pt.LayoutError, r"init_sharded: Dense is a module.*\(model.init, key",
                    lambda: pt.init_sharded(nn.Dense(4), X, mesh=MESH, rules=RULES)),
    "layout-module": (pt.LayoutError, r"abstract_layout\(model.init, key",
                      lambda: pt.abstract_layout(nn.Dense(4), X, mesh=MESH, rules=RULES)),
    "mesh-dict": (pt.MeshSpecError, r"Write make_mesh\({'fsdp': 8}\)",
                  lambda: loose.batch_sharding({"fsdp": 8}, RULES)),
    "mesh-case": (pt.UnknownAxisError, "mesh 'FSDP=8': .*did you mean 'fsdp'",
                  lambda: pt.make_mesh("FSDP=8")),
    "preset-case": (pt.UnknownPresetError, "did you mean 'fsdp_tp'", lambda: pt.preset("FSDP_TP")),
    "slices": (pt.MeshSpecError, r"fake_slices\('2'\): .*Write a divisor of 8",
               lambda: loose.fake_slices("2").__enter__()),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_what_is_of_another_type(case: str) -> None:
    error, text, run = WRONG_TYPES[case]
    with pytest.raises(error, match=text):
        run()


def test_names_that_are_no_collection() -> None:
    """One name, where several may be given, is no collection of letters."""
    wanted = {"fsdp": 4, "fspd": 2}
    for given in ("fspd", ("fspd",)):
        assert dict(pt.make_abstract_mesh("fsdp=4,fspd=2", other_axes=given).shape) == wanted
    with pytest.raises(pt.UnknownAxisError, match="other_axes"):
        pt.make_abstract_mesh("fsdp=4,fspd=2", other_axes="not fspd")
    assert pt.make_abstract_mesh("dcn(tensor=2)", across_dcn="tensor").size == 2
    assert loose.make_mesh("fsdp=8", MESH.devices).size == 8  # an array of devices is one too


def test_one_of_several_may_be_said_alone() -> None:
    """A string is a collection of letters, and `*` among them accepts everything."""
    whole = pt.Layout({"params": {"w": jnp.ones((64, 64))}}, MESH, RULES)
    with pytest.raises(pt.SilentReplicationError, match="params/w"):
        loose.assert_compiled(NOTHING, whole, above=0, accept="params/*/scale")
    loose.assert_compiled(NOTHING, whole, above=0, accept="params/*")
    with pytest.raises(pt.CollectivesError, match="'all-gahter': did you mean"):
        loose.assert_collectives(NOTHING, "all-gahter over fsdp", MESH)
    layout = pt.Layout({"model": {"params": {"w": X}}}, MESH, RULES, parameters="model/params")
    assert layout.leaf("model/params/w").origin == "nothing names it"
    assert pt.batch_sharding(MESH, pt.preset("dp"), ("batch",), shape=[8]).spec == jax.P()  # type: ignore[arg-type]


def test_an_axis_that_may_yield_in_plain_pairs() -> None:
    """There it is the name of an axis, as in Linen: what meets the mesh says what to write."""
    pairs = [("batch", "fsdp?")]
    assert pt.logical_to_mesh_axes(("batch",), pairs) == jax.P("fsdp?")
    box = nn.LogicallyPartitioned(X, ("batch", None), rules=pairs)
    text = r"'fsdp\?', which the mesh lacks: .*strict rules: write AxisRules"
    with pytest.raises(pt.UnknownAxisError, match=text):
        pt.Layout({"w": box}, MESH, pairs).check()
    with pytest.raises(pt.UnknownAxisError, match=text):
        pt.with_logical_constraint(X, ("batch", None), pairs, MESH)


def test_where_in_the_model_a_constraint_is() -> None:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.with_logical_constraint(x, ("bacth", None))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Inner(name="block")(x)

    for model, text in (
        (Inner(), r"\(in an Inner, the outermost module\)"),
        (Outer(), r"\(in block, an Inner\)"),
    ):
        with pytest.raises(pt.UnknownNameError, match=text):
            _in_scope(lambda model=model: model.apply({}, X))


def test_what_cannot_be_lowered_has_a_place() -> None:
    """An axis over which a vmap around maps, met in a module; and devices that are not there."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.with_logical_constraint(x, ("embed",))

    mapped = jax.vmap(lambda x: Inner(name="block").apply({}, x), spmd_axis_name="fsdp")
    text = (
        r"names \('embed',\) at .*test_slips.py:\d+ \(in an Inner, the outermost module\): an axis"
    )
    with pytest.raises(pt.AxisConflictError, match=text):
        _in_scope(lambda: jax.make_jaxpr(mapped)(X))
    nowhere = pt.make_abstract_mesh("fsdp=4,tensor=2")
    text = r"names \('embed', None\) at .*test_slips.py:\d+: an array that is not traced"
    with pt.use(nowhere, RULES), pytest.raises(pt.MeshScopeError, match=text):
        nn.with_logical_constraint(X, ("embed", None))


def test_rules_that_a_preset_brought_are_not_missed() -> None:
    """No model has all names of a preset; those that one wrote oneself are listed."""
    state = {"w": nn.LogicallyPartitioned(X, ("embed", "mlp"))}
    rules = pt.preset("fsdp_tp") | {"stale": "fsdp", "mlp": "tensor?"}
    layout = pt.Layout(state, MESH, rules)
    assert layout.unused_rules == ("stale",)
    assert {"batch", "heads"} <= set(layout.unused_defaults) and "mlp" not in layout.unused_defaults
    assert "rules that nothing used: stale\n" in f"{layout}\n"
    assert "rules of presets that nothing used: batch" in str(pt.rule_usage(layout))
    assert pickle.loads(pickle.dumps(rules)).own == rules.own == {"stale", "mlp"}
    for own, expected in (
        (rules | pt.preset("tp_sp"), {"stale"}),  # the preset's rule is in the place of mine
        (rules + pt.preset("tp_sp"), {"stale", "mlp"}),
        (pt.preset("dp").with_sets(compute={"embed": None}), {"embed"}),
        (pt.AxisRules(pt.preset("dp"), eval={"batch": None}, title="mine"), {"batch"}),
        (pt.preset("zero1"), set()),
        (pt.AxisRules(zip(("embed",), ("fsdp",), strict=True)), {"embed"}),
    ):
        assert own.own == expected


def test_a_layout_crosses_processes_without_its_devices() -> None:
    state = {"w": nn.LogicallyPartitioned(X, ("embed", "mlp")), "few": optax.adam(1e-3).init(X[0])}
    layout = pt.Layout(state, pt.make_mesh("dcn(data=2) ici(fsdp=2,tensor=2)"), RULES)
    assert layout.shardings and layout.abstract  # kept, with devices in them
    again = pickle.loads(pickle.dumps(layout))
    assert isinstance(again.mesh, jax.sharding.AbstractMesh)
    assert (str(again), again.specs, again.leaves) == (str(layout), layout.specs, layout.leaves)
    assert again.shardings["w"].spec == layout.shardings["w"].spec
    assert copy.deepcopy(layout).mesh is layout.mesh
    shown = pt.explain(layout, layout.mesh, RULES)
    assert pickle.loads(pickle.dumps(shown)).to_json() == shown.to_json()


def test_a_layout_that_cannot_cross_says_what_can() -> None:
    class State(struct.PyTreeNode):
        w: Any
        fn: Any = struct.field(pytree_node=False, default=None)

    layout = pt.Layout(State(X, lambda x: x), MESH, RULES)
    with pytest.raises(pt.LayoutError, match=r"cannot be pickled.*abstract_layout.*lock\(layout\)"):
        pickle.dumps(layout)
