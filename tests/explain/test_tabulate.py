"""Tables of modules say how variables lie, where a mesh and rules are given or in scope."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.partitioning import AxisRules, make_abstract_mesh, use
from tests.core.harness import quick_key

RULES = AxisRules({"embed": "fsdp", "mlp": "tensor", "norm": None, "act_mlp": None, "batch": None})
PLAIN: dict[str, Any] = {"console_kwargs": {"force_terminal": False, "width": 200}}
MESH = make_abstract_mesh("fsdp=4,tensor=2")
X = jnp.ones((8, 16))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, kernel_axes=("embed", "mlp"), bias_axes=("mlp",), name="up")(x)
        return nn.BatchNorm(use_running_average=False, name="bn")(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Block(name="block")(x)


def cells(table: str, path: str) -> list[str]:
    """The columns of the row at a path, each as one line."""
    for row in re.split(r"^[├└┡].*$", table, flags=re.MULTILINE):
        lines = [line.strip("│").split("│") for line in row.strip().splitlines()]
        if lines and lines[0][0].strip() == path:
            return [" ".join(" ".join(column).split()) for column in zip(*lines, strict=True)]
    raise AssertionError(f"no row at {path}")


def test_names_specs_and_bytes_have_columns() -> None:
    table = Net().tabulate(quick_key(0), X, mesh=MESH, rules=RULES, **PLAIN)
    assert all(head in table for head in ("names", "spec", "bytes / device"))
    names, spec, held = cells(table, "block/up")[-3:]
    assert names == "bias: (mlp) kernel: (embed, mlp)"
    assert spec == "bias: (tensor) kernel: (fsdp, tensor)"
    assert held == "bias: 16 B kernel: 64 B 80 B"
    # Both collections of a module, and no names twice.
    assert cells(table, "block/bn")[-1].endswith("128 B")
    assert "P(" not in table
    total = next(line for line in table.splitlines() if " Total " in line)
    assert total.rstrip("│ ").endswith("208 B")


def test_hidden_modules_count_where_they_are_cut() -> None:
    table = Net().tabulate(quick_key(0), X, mesh=MESH, rules=RULES, depth=1, **PLAIN)
    assert cells(table, "block")[-3:] == ["", "", "208 B"]


def test_what_is_in_scope_counts() -> None:
    given = nn.tabulate(Net(), quick_key(0), mesh=MESH, rules=RULES, **PLAIN)(X)
    with use(MESH, RULES):
        assert nn.tabulate(Net(), quick_key(0), **PLAIN)(X) == given
    assert "bytes / device" not in nn.tabulate(Net(), quick_key(0), **PLAIN)(X)


def test_a_wrong_name_is_said_in_the_table() -> None:
    rules = AxisRules(RULES, title="mine").with_rules(mlp="fsdp")
    table = Net().tabulate(quick_key(0), X, mesh=MESH, rules=rules, **PLAIN)
    assert "both claim the axis" in cells(table, "block/up")[-2]


def test_arguments_of_the_module_are_the_modules() -> None:
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: Any, mesh: str = "", **more: Any) -> Any:
            assert mesh == "mine" and more == {"rules": "mine"}
            return nn.Dense(8)(x)

    table = Own().tabulate(quick_key(0), X, mesh="mine", rules="mine", **PLAIN)
    assert "bytes / device" not in table


def test_strangers_are_still_refused() -> None:
    with pytest.raises(TypeError, match="rule"):
        Net().tabulate(quick_key(0), X, rule=RULES, **PLAIN)
