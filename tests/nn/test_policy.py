"""A `Policy` as the dtype of every layer, and what it is beside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.nn.errors import PolicyError
from tests.nn.row import Row, floats
from tests.nn.rows import ROWS

KEY = jax.random.key(0)
TYPED = [r for r in ROWS if r.has_dtype]


def shapes(row: Row, **options: Any) -> Any:
    """Shapes and dtypes of variables and output."""

    def run() -> Any:
        variables = row.init(**options)
        return variables, row.apply(variables, *row.inputs(), **options)

    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), jax.eval_shape(run))


@pytest.mark.parametrize("row", TYPED, ids=[r.name for r in TYPED])
def test_every_layer_takes_a_policy_as_its_dtype(row: Row) -> None:
    policy = nn.Policy("bfloat16", param="bfloat16")
    assert shapes(row, dtype=policy) == shapes(row, dtype="bfloat16", param_dtype="bfloat16")


def test_a_model_that_passes_its_dtype_on_takes_a_policy() -> None:
    class Model(nn.Module):
        dtype: Any = None

        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.LayerNorm(dtype=self.dtype)(nn.Dense(4, dtype=self.dtype)(x))
            return x.astype(self.dtype) + jnp.zeros((), self.dtype)

    y, variables = Model(nn.Policy("bfloat16", param="float16")).init_with_output(KEY, floats(2, 3))
    assert y.dtype == jnp.bfloat16
    assert {str(p.dtype) for p in jax.tree.leaves(variables)} == {"float16"}


def test_a_layer_s_own_parameters_come_first() -> None:
    policy = nn.Policy("bfloat16", param="float16")
    assert nn.Dense(3, dtype=policy, param_dtype=jnp.bfloat16).param_dtype == jnp.bfloat16
    assert nn.Dense(3, dtype=policy).clone(features=4).param_dtype == jnp.float16


def test_a_policy_of_ones_own() -> None:
    class Mine(nn.Policy):
        pass

    assert nn.Dense(3, dtype=Mine("bfloat16", param="float16")).param_dtype == jnp.float16


def test_reductions() -> None:
    narrow, wide = nn.Policy("bfloat16", reduce="bfloat16"), nn.Policy("bfloat16")
    assert not nn.LayerNorm(dtype=narrow).force_float32_reductions
    assert nn.LayerNorm(dtype=wide).force_float32_reductions
    assert nn.MultiHeadAttention(2, dtype=wide).force_fp32_for_softmax
    assert not nn.MultiHeadAttention(2, dtype=narrow).force_fp32_for_softmax


def test_text_and_back() -> None:
    policy = nn.Policy.parse("compute=bfloat16, output=float32")
    assert policy == nn.Policy("bfloat16", output="float32") and hash(policy) == hash(policy)
    assert nn.Policy.parse(str(policy)) == policy
    assert nn.Policy.parse("bfloat16") == nn.Policy(jnp.bfloat16)
    assert nn.Dense(3, **policy.options()).dtype == jnp.bfloat16


def test_casts_leave_integers_alone() -> None:
    tree = {"x": jnp.ones(2), "ids": jnp.arange(2)}
    policy = nn.Policy("bfloat16", param="float16", output="float32")
    found = [
        str(cast(tree)["x"].dtype)
        for cast in (policy.cast_to_compute, policy.cast_to_param, policy.cast_to_output)
    ]
    assert found == ["bfloat16", "float16", "float32"]
    assert policy.cast_to_compute(tree)["ids"].dtype == jnp.int32
    assert nn.dtypes.promote_dtype(jnp.ones(2), dtype=policy)[0].dtype == jnp.bfloat16


def test_parts_that_are_none() -> None:
    with pytest.raises(PolicyError, match="compute=int32 is no floating dtype"):
        nn.Policy("int32")
    with pytest.raises(PolicyError, match="param='bf17' is no dtype"):
        nn.Policy(param="bf17")
    with pytest.raises(PolicyError, match=r"'params' is no part of a policy; these are: \['com"):
        nn.Policy.parse("params=float32")
