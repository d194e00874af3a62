"""What users of Linen and its neighbours report most, as far as it concerns layouts.

Numbers are ranks among the public reports.  Those that are not in the list have their test below;
those about saving, restoring and speed alone are in tests/ckpt and benchmarks.

- 1, restoring on another topology:
  ckpt/test_manager.py::test_a_train_state_comes_back_bit_for_bit_in_another_layout
- 2, a name that matches no rule:
  silent/test_elsewhere.py::test_a_name_of_the_model_that_no_rule_knows
- 3, an indivisible dim:
  silent/test_elsewhere.py::test_a_kernel_of_17_columns_over_an_axis_of_2
- 7, initialising a big model:
  multidevice/test_partitioning_init.py::test_peak_memory
- 9, names and stacked dims:
  core/test_metadata.py::test_names_follow_dims_of_stacks
- 9, nested names are distinct:
  core/test_metadata.py::test_one_name_for_two_levels_is_refused
- 11, full rematerialization:
  multidevice/test_diagnostics.py::test_a_rematerialization_is_an_error_with_path_specs_and_cure
- 11, collective budgets:
  multidevice/test_communication.py::test_contracts
- 12, constraints without a mesh:
  multidevice/test_partitioning_constraints.py::test_names_and_rank_are_checked_without_a_mesh
- 13, layers on explicit axes:
  nn/test_matrix_explicit.py::test_names_come_before_the_operands
- 13, layers inside shard_map:
  nn/test_matrix_mesh.py::test_inside_shard_map
- 15, adafactor's state:
  multidevice/test_partitioning_layout.py::test_adafactors_factored_moments_drop_the_reduced_dim
- 15, masked optimizers:
  multidevice/test_partitioning_layout.py::test_masked_and_partitioned_optimizers
- 16, boxes in checkpoints:
  ckpt/test_manager.py::test_the_tree_on_disk_does_not_depend_on_boxes
- 19, one device needs no mesh:
  multidevice/test_partitioning_constraints.py::test_one_device_needs_no_lowering
- 21, which preset:
  explain/test_compare.py::test_what_is_sent_is_what_the_compiled_step_sends
- 21, presets:
  partitioning/test_presets.py::test_presets_shard_what_they_say
- 22, seeing a layout:
  multidevice/test_partitioning_layout.py::test_report_lists_what_nothing_used
- 24, the order of data:
  training/test_data_loader.py::test_the_order_does_not_depend_on_the_mesh
- 25, numbers on every mesh:
  multidevice/test_partitioning_init.py::test_same_numbers_on_every_mesh
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import shardflax.nn as nn
from shardflax import errors
from shardflax import partitioning as pt
from tests.core.harness import quick_key
from tests.silent import test_elsewhere
from tests.silent.said import MESH, RULES, layout_of, refused

P = jax.P
TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("text", [__doc__, test_elsewhere.__doc__], ids=["users", "elsewhere"])
def test_the_tests_that_are_listed_exist(text: str) -> None:
    named = re.findall(r"(\w+/\w+\.py)::(\w+)", text)
    assert len(named) >= 5
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), (file, test)


def test_3_an_indivisible_dim_is_made_larger_or_replicated_or_yields() -> None:
    """What to do about it is a choice, and each can be written in one place."""

    class Head(nn.Module):
        columns: int = 17
        names: Any = ("embed", "vocab")

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(self.columns, kernel_axes=self.names, use_bias=False, name="head")(x)

    for model, rules, spec in (
        (Head(18), RULES, P("fsdp", "tensor")),
        (Head(names=("embed", None)), RULES, P("fsdp")),
        (Head(), RULES | {"vocab": "tensor?"}, P("fsdp")),
        (Head(), RULES | {"vocab": None}, P("fsdp")),
    ):
        layout = layout_of(model, rules)
        layout.check()
        assert layout.leaf("params/head/kernel").spec == spec


def test_6_parameters_of_another_shape() -> None:
    model = nn.Dense(16, name="up", use_bias=False)
    variables = {"params": {"kernel": jnp.ones((8, 12))}}
    refused(
        lambda: model.apply(variables, jnp.ones((2, 8))),
        errors.ScopeParamShapeError,
        "the parameter 'kernel' is declared as 8x16 and the variables hold 8x12",
        "dim 1: 16 against 12",
        "an option of the module differs",
    )


def test_10_names_are_of_the_declared_shape() -> None:
    """Linen initialises a flattened kernel of `DenseGeneral`, and constrains that."""
    init = nn.with_logical_partitioning(jax.nn.initializers.ones, ("embed", "heads", "head_dim"))

    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.DenseGeneral((4, 2), kernel_init=init, use_bias=False, name="query")(x)

    layout = layout_of(Heads())
    leaf = layout.leaf("params/query/kernel")
    assert (leaf.shape, leaf.spec) == ((8, 4, 2), P("fsdp", "tensor"))
    bad = nn.DenseGeneral((4, 2), kernel_axes=("embed", "heads"), use_bias=False)
    refused(
        lambda: layout_of(bad).check(),
        pt.NamesRankError,
        "kernel",
        "2 names ('embed', 'heads')",
        "rank 3",
        "(8, 4, 2)",
    )


def test_12_names_are_checked_in_whatever_scope() -> None:
    x = jnp.ones((8, 8))
    for scope in (pt.logical_axis_rules(RULES), pt.use(MESH, RULES)):
        with scope:
            refused(
                lambda: nn.with_logical_constraint(x, ("batch", "act_mpl")),
                pt.UnknownNameError,
                "constraint at",
                "test_users.py:",
                "did you mean 'act_mlp'?",
            )
    refused(
        lambda: nn.with_logical_constraint(x, ("batch", "act_mlp", "x"), ()),
        pt.NamesRankError,
        "constraint at",
        "test_users.py:",
        "3 names ('batch', 'act_mlp', 'x') for an array of rank 2",
    )
    with pt.logical_axis_rules(RULES), jax.set_mesh(MESH):
        assert nn.with_logical_constraint(x, ("batch", "act_mlp")).sharding.spec == P(
            "fsdp", "tensor"
        )


def test_13_layers_take_names_of_their_outputs_on_explicit_axes() -> None:
    """Linen's `Dense` cannot be told."""
    mesh = pt.make_mesh("fsdp=4,tensor=2", axis_types="explicit")

    def run(layer: Any) -> Any:
        with pt.use(mesh, RULES):
            return jax.eval_shape(
                lambda key, x: layer.init_with_output(key, x)[0],
                jax.random.key(0),
                jax.ShapeDtypeStruct(
                    (8, 4, 8), "float32", sharding=jax.NamedSharding(mesh, P("fsdp"))
                ),
            )

    named = nn.Dense(16, out_axes=("batch", "length", "act_mlp"), name="up")
    assert run(named).sharding.spec == P("fsdp", None, "tensor")


def test_15_optimizer_state_that_follows_no_parameter_is_named() -> None:
    """Adafactor's moments follow; what does not is on record, never guessed."""
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=4)
    boxed = {"w": nn.LogicallyPartitioned(jnp.ones((8, 16)), ("embed", "mlp"))}
    state: Any = {"params": boxed, "opt": jax.eval_shape(tx.init, {"w": jnp.ones((8, 16))})}
    layout = pt.Layout(state, MESH, RULES)
    assert layout.leaf("opt/0/v_row/w").spec == P("fsdp")
    assert layout.leaf("opt/0/v_col/w").spec == P("tensor")
    strange = pt.Layout({"params": boxed, "buffer": jnp.ones((32, 32))}, MESH, RULES)
    assert strange.unnamed == ("buffer",) and "buffer" in str(strange)
    nothing = jax.jit(lambda: 0).lower().compile()
    refused(
        lambda: pt.assert_compiled(nothing, strange, above=1024),
        pt.SilentReplicationError,
        "buffer, leaf (32, 32): 4096 B on each device, 3584 B of them in vain",
        "nothing names its dims",
        "kernel_axes",
    )


def test_19_a_model_with_names_runs_where_there_is_no_mesh() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(4, kernel_axes=("embed", "mlp"))(x)
            return nn.with_logical_constraint(x, ("batch", "act_mlp"))

    with pt.logical_axis_rules(RULES):
        y, _ = jax.jit(Net().init_with_output)(quick_key(0), jnp.ones((3, 5)))
    assert y.shape == (3, 4)  # 3 rows over no axis at all: nothing to refuse


def test_20_stock_layers_have_default_names_under_strict_rules_alone() -> None:
    layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    plain = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 4, 8)))
    assert not any(
        isinstance(leaf, nn.Partitioned)
        for leaf in jax.tree.leaves(plain, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    )
    layout = layout_of(nn.Sequential([nn.Dense(16), nn.LayerNorm()]))
    assert layout.unnamed == () and layout.problems == ()


def test_22_a_layout_can_be_read_before_anything_runs() -> None:
    text = str(layout_of(nn.Dense(16, kernel_axes=("embed", "mlp"))))
    for part in ("params/kernel", "(embed, mlp)", "(fsdp, tensor)", "bytes / device", "a device"):
        assert part in text


def test_23_conflicts_are_not_settled_by_order() -> None:
    model = nn.Dense(16, kernel_axes=("heads", "mlp"), use_bias=False)
    refused(
        lambda: layout_of(model).check(),
        pt.AxisConflictError,
        "params/kernel, shape (8, 16)",
        "dims 0 'heads' and 1 'mlp' of ('heads', 'mlp') both claim the axis 'tensor'",
        "Write 'tensor?' in the rule that may yield",
    )
    for rules, spec in (
        (RULES | {"heads": "tensor?"}, P(None, "tensor")),
        (RULES | {"mlp": "tensor?"}, P("tensor")),
    ):
        assert layout_of(model, rules).leaf("params/kernel").spec == spec


def test_24_a_batch_that_the_mesh_does_not_divide() -> None:
    refused(
        lambda: pt.batch_sharding(MESH, RULES, ("batch", "length"), shape=(10, 128)),
        pt.IndivisibleDimError,
        "batch: dim 0 'batch' of size 10",
        "not divisible by 4",
        "Make it 12",
    )
