"""What other codebases let pass without a word, one test a line: here an error, or a choice.

The lines are about MaxText's rules, Linen and JAX.  Each test does what a user does there, and
looks for the path, the names, the rule and the cure in the text that comes back.  Where the
matter has a test of its own, that goes deeper:

- constraints under `with mesh:`:
  partitioning/test_linen_parity.py::test_legacy_mesh_scope_keeps_constraints_that_linen_drops
- constraints without rules:
  multidevice/test_partitioning_constraints.py::test_no_rules_warns_once_and_names_the_call
- tuple rules:
  partitioning/test_resolve.py::test_assignment_is_per_axis
- the dim of the stacked name:
  core/test_metadata.py::test_names_follow_dims_of_stacks
- `remat_scan` with names:
  core/test_metadata.py::test_levels_of_remat_scan_have_names_of_their_own
- explicit meshes:
  nn/test_matrix_explicit.py::test_names_come_before_the_operands
- strict parameters:
  multidevice/test_partitioning_init.py::test_everything_wrong_is_said_at_once_and_nothing_runs
- full rematerialization:
  multidevice/test_diagnostics.py::test_a_rematerialization_is_an_error_with_path_specs_and_cure
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax import partitioning as pt
from tests.silent.said import MESH, RULES, layout_of, refused

P = jax.P
INIT = jax.nn.initializers.ones


class Net(nn.Module):
    """Two layers; `up` and `down` say the names of their kernels."""

    up: tuple[str | None, ...] = ("embed", "mlp")
    down: tuple[str | None, ...] = ("mlp", "embed")
    width: int = 16

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(self.width, kernel_axes=self.up, use_bias=False, name="up")(x)
        return nn.Dense(8, kernel_axes=self.down, use_bias=False, name="down")(h)


# MaxText's rules


def test_a_name_of_the_model_that_no_rule_knows() -> None:
    refused(
        lambda: layout_of(Net(up=("embed", "mlp_moe_up"))).check(),
        pt.UnknownNameError,
        "params/up/kernel, shape (8, 16)",
        "no rule for the name 'mlp_moe_up' (dim 1 of ('embed', 'mlp_moe_up'))",
        "Correct the name, add a rule with rules | {'mlp_moe_up': ...}",
        "replicated with None",
    )


def test_names_of_activations_that_no_rule_knows() -> None:
    class Constrained(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.with_logical_constraint(x, ("batch", "act_embd"))

    refused(
        lambda: layout_of(Constrained()).check(),
        pt.UnknownNameError,
        "test_elsewhere.py:",
        "in a Constrained, the outermost module",
        "('batch', 'act_embd')",
        "did you mean 'act_embed'?",
    )


def test_rules_that_nothing_uses() -> None:
    layout = layout_of(Net(), RULES | {"stale": "fsdp"})
    assert "stale" in layout.unused_rules and "embed" not in layout.unused_rules
    assert "rules that nothing used" in str(layout) and "stale" in str(layout)


def test_rules_for_axes_that_the_mesh_lacks() -> None:
    rules = pt.AxisRules({"embed": "fsdp", "mlp": "tensor_sequence"})
    refused(
        lambda: layout_of(Net(), rules).check(),
        pt.UnknownAxisError,
        "the rule 'mlp': 'tensor_sequence' names the axis 'tensor_sequence'",
        "which the mesh (fsdp, tensor) lacks",
    )


def test_one_axis_for_the_batch_and_the_experts() -> None:
    rules = pt.AxisRules({"batch": "fsdp tensor", "expert": "tensor", "embed": None})

    def dispatch() -> Any:
        with pt.use(MESH, rules):
            return pt.constrain(jnp.ones((8, 4, 2)), ("batch", "expert", "embed"))

    refused(
        dispatch,
        pt.AxisConflictError,
        "dims 0 'batch' and 1 'expert'",
        "'tensor'",
        "rules 'batch': 'fsdp tensor', 'expert': 'tensor'",
        "Write 'tensor?' in the rule that may yield",
        "test_elsewhere.py:",
    )
    yields = pt.resolve(
        ("batch", "expert"), rules | {"batch": "fsdp tensor?"}, (8, 4), (("fsdp", 4), ("tensor", 2))
    )
    assert yields.spec == P("fsdp", "tensor")  # said: then the experts have it
    assert yields.dims[0].given_up[0][0] == "tensor"


# Linen


def test_a_misspelt_mesh_axis() -> None:
    refused(
        lambda: layout_of(Net(), pt.AxisRules({"embed": "fspd", "mlp": None})).check(),
        pt.UnknownAxisError,
        "'fspd'",
        "rule 'embed'",
        "did you mean 'fsdp'?",
    )
    boxed = {"kernel": nn.Partitioned(jnp.ones((8, 16)), ("fspd", None))}
    refused(
        lambda: pt.Layout(boxed, MESH, RULES).check(),
        pt.UnknownAxisError,
        "kernel, shape (8, 16)",
        "names ('fspd', None)",
        "did you mean 'fsdp'?",
    )


def test_rules_with_several_axes_are_not_all_or_nothing() -> None:
    rules = pt.AxisRules({"embed": "fsdp", "mlp": "fsdp? tensor"})
    leaf = layout_of(Net(), rules).leaf("params/up/kernel")
    assert leaf.spec == P("fsdp", "tensor")
    assert leaf.dims[1].given_up == (("fsdp", "taken by dim 0 'embed'"),)
    linens = [("embed", "fsdp"), ("mlp", ("fsdp", "tensor"))]  # plain pairs are Linen's, exactly
    assert pt.logical_to_mesh_axes(("embed", "mlp"), linens) == P("fsdp", None)


def test_a_constraint_without_rules_in_scope() -> None:
    with pytest.warns(pt.NoRulesWarning) as caught:
        nn.with_logical_constraint(jnp.ones((2, 2)), ("batch", "act_mlp"))
    text = str(caught[0].message)
    assert "('batch', 'act_mlp') at" in text and "test_elsewhere.py:" in text
    assert "does nothing" in text and "logical_axis_rules" in text


def test_constraints_under_the_old_mesh_scope() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with MESH, nn.logical_axis_rules(RULES):
            y: Any = jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", "act_mlp")))(
                jnp.ones((8, 8))
            )
    assert y.sharding.spec == P("fsdp", "tensor")


def test_parameters_are_strict_before_anything_is_allocated() -> None:
    model = Net(down=("mlp", "emebd"))

    def run() -> Any:
        return pt.init_sharded(
            lambda key: model.init(key, jnp.ones((2, 8))), jax.random.key(0), mesh=MESH, rules=RULES
        )

    refused(run, pt.UnknownNameError, "params/down/kernel", "'emebd'", "did you mean 'embed'?")


def test_a_negative_stacking_axis_puts_its_name_on_its_dim() -> None:
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layers = nn.vmap(
                nn.Dense,
                variable_axes={"params": -1},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return layers(16, kernel_axes=("embed", "mlp"), use_bias=False, name="layers")(x)

    leaf = layout_of(Stack()).leaf("params/layers/kernel")
    assert (leaf.names, leaf.shape) == (("embed", "mlp", "layers"), (8, 16, 3))


def test_a_partition_name_that_is_not_there() -> None:
    box = nn.LogicallyPartitioned(jnp.ones((3, 8)), ("stage", "embed"))
    refused(
        lambda: box.remove_axis(0, {nn.PARTITION_NAME: "layers"}),
        pt.PartitionNameMismatchError,
        "'layers'",
        "('stage', 'embed')",
        "metadata_params",
    )


def test_no_partition_name_at_all() -> None:
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layers = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
            )
            return layers(16, kernel_axes=("embed", "mlp"), name="layers")(jnp.stack([x] * 3))

    refused(
        lambda: layout_of(Stack()),
        pt.PartitioningUnspecifiedError,
        "('mlp',)",
        "The variable is params/layers/bias",
        "metadata_params={'partition_name': 'layers'}",
    )


def test_remat_scan_takes_names_for_its_dims() -> None:
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            levels = [{nn.PARTITION_NAME: "stack"}, {nn.PARTITION_NAME: "layers"}]
            layers = nn.remat_scan(nn.Dense, (2, 3), metadata_params=levels)
            return layers(8, kernel_axes=("embed", "mlp"), use_bias=False, name="layers")(x)

    leaf = layout_of(Stack()).leaf("params/layers/kernel")
    assert leaf.names == ("stack", "layers", "embed", "mlp")


def test_an_explicit_mesh_takes_mesh_axes_on_parameters_and_names_on_outputs() -> None:
    mesh = pt.make_mesh("fsdp=4,tensor=2", axis_types="explicit")
    kernel = nn.with_partitioning(jax.nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    layer = nn.Dense(16, kernel_init=kernel, use_bias=False, out_axes=("batch", "act_mlp"))

    def run(key: Any) -> Any:
        return layer.init_with_output(key, jnp.ones((8, 8)))

    with pt.use(mesh, RULES):
        y, variables = jax.eval_shape(run, jax.random.key(0))
    assert y.sharding.spec == P("fsdp", "tensor")
    assert variables["params"]["kernel"].names == ("fsdp", "tensor")


def test_a_kernel_of_17_columns_over_an_axis_of_2() -> None:
    refused(
        lambda: layout_of(Net(width=17)).check(),
        pt.IndivisibleDimError,
        "params/up/kernel, shape (8, 17)",
        "dim 1 'mlp' of size 17",
        "names ('embed', 'mlp')",
        "not divisible by 2 (tensor=2; rule 'mlp':",
        "Make it 18, let the axis yield ('tensor?'), or replicate the dim",
    )
    yields = layout_of(Net(width=17), RULES | {"mlp": "tensor?"}).leaf("params/up/kernel")
    assert yields.spec == P("fsdp")  # a choice, and on record
    assert yields.dims[1].given_up[0][0] == "tensor"


# JAX


def test_full_rematerialization_has_a_place_two_specs_and_a_cure() -> None:
    mesh = pt.make_mesh("data=2,tensor=3", jax.devices()[:6])
    rules = pt.AxisRules({"batch": "data", "act_mlp": "tensor"})

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.with_logical_constraint(jnp.tanh(x), ("act_mlp", None))
            return jnp.sin(nn.with_logical_constraint(x, (None, "batch")))

    with pt.use(mesh, rules):
        program = jax.jit(lambda x: Block().apply({}, x)).lower(jnp.ones((6, 6)))
        refused(
            lambda: pt.compile(program),
            pt.RematerializationError,
            "Block (sharding_constraint), test_elsewhere.py:",
            "from:  P('tensor',)",
            "to:    P(None, 'data')",
            "with_logical_constraint(x, (None, 'batch'))",
        )


def test_indivisible_arguments_have_names() -> None:
    """Where `jax.jit` says `IndivisibleError` of some argument, the layout has said which."""
    refused(
        lambda: pt.batch_sharding(MESH, RULES, ("batch", "length"), shape=(6, 8)),
        pt.IndivisibleDimError,
        "batch: dim 0 'batch' of size 6",
        "names ('batch', 'length')",
        "fsdp=4; rule 'batch'",
        "Make it 8",
    )


def test_shardings_of_a_tree_over_axes_that_are_misspelt() -> None:
    """JAX says which axis, and not of which parameter."""
    boxed = {"up": {"kernel": nn.Partitioned(jnp.ones((8, 16)), ("fspd", None))}}
    specs, pairs = {"up": {"kernel": P("embed", "mlp")}}, [("mlp", "fspd")]
    for call in (
        lambda: nn.get_sharding(boxed, MESH),
        lambda: nn.logical_to_mesh_sharding(specs, MESH, pairs),
    ):
        parts = "up/kernel: ", "'fspd', which the mesh (fsdp, tensor) lacks: did you mean 'fsdp'?"
        refused(call, pt.UnknownAxisError, *parts)
    refused(
        lambda: nn.logical_to_mesh({"up": {"kernel": P("embed", "mpl")}}, RULES),
        pt.UnknownNameError,
        "up/kernel: no rule for the name 'mpl'",
    )
