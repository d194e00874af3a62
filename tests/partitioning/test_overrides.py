"""Names by path: parameters, optimizer state and outputs of modules that say no names."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardflax.nn as nn
from shardflax.core.calls import context
from shardflax.partitioning import (
    AxisRules,
    LayoutError,
    NamesRankError,
    OverrideError,
    abstract_layout,
    logical_axis_rules,
    make_mesh,
    preset,
    set_logical_axis_rules,
    use,
)
from shardflax.partitioning.at_use import used_spec
from shardflax.partitioning.override_outputs import lay_out

KEY = jax.random.key(0)
ONES = jax.nn.initializers.ones


class Up(nn.Module):
    """A product as somebody wrote it who knew of no layouts."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("w", ONES, (x.shape[-1], self.features))


class Block(nn.Module):
    def setup(self) -> None:
        self.up = Up(16)
        self.down = Up(8)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(self.up(x))
        return self.down(h), h.sum()


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x, _ = Block(name=f"block_{i}")(x)
        return x


X = jnp.ones((4, 6, 8))
FSDP_TP = preset("fsdp_tp")
RULES = FSDP_TP.with_overrides(
    params={r"block_\d/up/w": ("embed", "mlp"), r"block_\d/down/w": ("mlp", "embed")},
    activations={
        r"block_\d/up": ("batch", "length", "act_mlp"),
        r"block_\d": [("batch", "norm_length", "act_embed"), None],
    },
)
MESH = make_mesh("fsdp=4,tensor=2")


def init(key: jax.Array) -> Any:
    params = Model().init(key, X)["params"]
    return {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": 0}


def problems(rules: AxisRules) -> list[tuple[type, str]]:
    found = abstract_layout(init, KEY, mesh=MESH, rules=rules).problems
    return [(p.error, str(p)) for p in found]


def test_a_model_without_names_is_laid_out() -> None:
    layout = abstract_layout(init, KEY, mesh=MESH, rules=RULES)
    layout.check()
    up = layout.leaf("params/block_1/up/w")
    assert (up.names, up.spec, up.origin) == (("embed", "mlp"), P("fsdp", "tensor"), "said by path")
    assert layout.leaf("opt_state/0/mu/block_0/down/w").spec == P("tensor", "fsdp")
    assert layout.unnamed == ()
    assert not {"batch", "norm_length", "act_mlp"} & set(layout.unused_rules)
    bare = abstract_layout(init, KEY, mesh=MESH, rules=FSDP_TP)
    assert len(bare.unnamed) == 12


def constraints(model: nn.Module, variables: Any, rules: AxisRules) -> list[str]:
    """The constraints of a forward, in order, as the compiler gets them."""
    with use(MESH, rules):
        text = jax.jit(model.apply).lower(variables, X).as_text()
    found = re.findall(r"sdy.sharding_constraint .*?<@\w*, \[(.*?)\]>", text)
    return [re.sub(r'"|, \?', "", dims) for dims in found]


def test_its_forward_is_laid_out_too() -> None:
    """The constraints are in the program, for the arrays that were named and for no other."""
    variables = jax.eval_shape(Model().init, KEY, X)
    up, out = "{fsdp}, {}, {tensor}", "{fsdp}, {tensor}, {}"
    assert constraints(Model(), variables, RULES) == [up, out] * 2
    assert constraints(Model(), variables, FSDP_TP) == []


def test_inside_lifted_transforms_the_inner_rank_counts() -> None:
    """A scanned or mapped module is called once, inside: names are those of its own dims."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
            return Up(8, name="up")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="steps")(x)[0]

    rules = FSDP_TP.with_overrides(
        params={"steps/up/w": ("layers", "embed", "mlp")},
        activations={"steps/up": ("batch", "length", "act_mlp")},
    )
    layout = abstract_layout(lambda k: Scanned().init(k, X), KEY, mesh=MESH, rules=rules)
    layout.check()
    assert layout.leaf("params/steps/up/w").spec == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        (FSDP_TP.with_overrides(params={r"blok_\d/up/w": ("embed", "mlp")}), OverrideError,
         r"the override of params 'blok_\\d/up/w' matches nothing"),
        (FSDP_TP.with_overrides(activations={"block_0/upp": ("batch", "length", "act_mlp")}),
         OverrideError, "activations 'block_0/upp' matches nothing: did you mean 'block_0/up'?"),
        (RULES.with_overrides(params={"block_0/up/.": (None, "mlp")}), OverrideError,
         "the overrides of params for 'block_0/up/w' differ"),
        (RULES.with_overrides(activations={"block_0/up": ("batch", None, None)}), OverrideError,
         "the overrides of activations for 'block_0/up/__call__' differ"),
        (FSDP_TP.with_overrides(activations={"block_0/up": ("batch", "act_mlp")}), NamesRankError,
         "what block_0/up/__call__ returns: 2 names ('batch', 'act_mlp') for an array of rank 3"),
        (FSDP_TP.with_overrides(activations={"block_0": ("batch", None, None)}), OverrideError,
         "what block_0/__call__ returns: expected one array"),
        (FSDP_TP.with_overrides(activations={"block_0": [("batch", None, None)]}), OverrideError,
         "expected a tuple of 1, for which an override has names, found tuple of 2"),
        (FSDP_TP.with_overrides(activations={"block_1/up": [None]}), OverrideError,
         "expected a tuple of 1, for which an override has names, found"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_allocated(
    rules: AxisRules, error: type, text: str
) -> None:
    found = problems(rules)
    assert any(kind is error and text in said for kind, said in found), found


def test_outside_of_an_init_it_is_raised() -> None:
    model, variables = Up(8), {"params": {"w": jnp.ones((8, 8))}}
    for names, error in ((("batch",), NamesRankError), (("batsh", None, None), LayoutError)):
        rules = FSDP_TP.with_overrides(activations={"__call__": names})
        with (
            use(MESH, rules),
            pytest.raises(error, match=r"^what __call__ returns: "),
        ):
            model.apply(variables, X)


def test_what_a_dict_holds_is_laid_out_by_its_keys() -> None:
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return {"logits": Up(16, name="up")(x), "sums": (x.sum(), x)}

    variables = jax.eval_shape(Both().init, KEY, X)
    names = {"logits": ("batch", None, "act_mlp"), "sums": [None, ("batch", None, None)]}
    rules = FSDP_TP.with_overrides(activations={"": names})
    assert constraints(Both(), variables, rules) == ["{fsdp}, {}, {tensor}", "{fsdp}, {}, {}"]
    for wrong, text in (
        ({"logit": ("batch", None, None)}, "no key 'logit', .*did you mean 'logits'"),
        ({"sums": ("batch", None, None)}, "under 'sums' returns: expected one array"),
        ({"logits": {"a": ("batch",)}}, "expected a dict with 'a', .*found"),
        (("batch", None, None), "found dict. .*for a dict, a dict of them"),
    ):
        rules = FSDP_TP.with_overrides(activations={"__call__": wrong})
        with use(MESH, rules), pytest.raises(OverrideError, match=text):
            jax.eval_shape(Both().apply, variables, X)


def test_the_rules_in_scope_count_and_leave_nothing_behind() -> None:
    model, variables = Up(8), {"params": {"w": jnp.ones((8, 8))}}
    rules = AxisRules({"rows": "fsdp"}).with_overrides(activations={"": ("rows", None, None)})
    with use(MESH, rules):
        with use(MESH, rules):
            assert context.interceptors == [lay_out]
            assert model.apply(variables, X).sharding.spec == P("fsdp")
        with use(MESH, FSDP_TP):
            assert model.apply(variables, X).sharding.spec != P("fsdp")
    assert context.interceptors == []
    with logical_axis_rules(rules):
        assert model.apply(variables, X).shape == X.shape  # no mesh, no layout
    try:
        set_logical_axis_rules(rules)
        with jax.set_mesh(MESH):
            assert model.apply(variables, X).sharding.spec == P("fsdp")
        set_logical_axis_rules(())
        assert model.apply(variables, X).shape == X.shape
    finally:
        set_logical_axis_rules(())
        context.interceptors.remove(lay_out)


def test_layers_that_have_names_yield_to_those_by_path() -> None:
    """A weight at its use, and the layer's guess for its output, follow what is said by path."""
    seen: list[Any] = []

    class Probe(nn.Dense):
        @nn.compact
        def __call__(self, inputs: jax.Array) -> jax.Array:
            y = super().__call__(inputs)
            seen.append(used_spec(self.get_variable("params", "kernel"), self.kernel_axes))
            return y

    layer = Probe(16, use_bias=False)
    variables = {"params": {"kernel": jnp.ones((8, 16))}}
    down = {"params": {"kernel": ("mlp", "embed")}}
    for rules in (FSDP_TP, FSDP_TP.with_overrides(**down)):
        with use(MESH, rules):
            jax.make_jaxpr(layer.apply)(variables, X)
    assert seen == [P(None, "tensor"), P("tensor")]

    out = "{fsdp}, {}, {tensor}"
    assert out in constraints(layer, variables, FSDP_TP)
    assert out not in constraints(layer, variables, FSDP_TP.with_overrides(**down))
