"""`shardflax.nn` imports layers on first use, and type checkers, `import *` and pickles see all."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import flax.linen
import pytest

import shardflax.nn as nn

TREE = ast.parse(Path(nn.__file__).read_text(encoding="utf-8"))


def imported(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """(name here, where it comes from) of each import; modules come from themselves."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name
                is_module = node.module == nn.__name__
                yield name, f"{node.module}.{alias.name}" if is_module else str(node.module)


def branches() -> tuple[dict[str, str], dict[str, str]]:
    """What type checkers import, and what the table says."""
    (choice,) = [n for n in TREE.body if isinstance(n, ast.If)]
    (assign,) = choice.orelse
    assert isinstance(assign, ast.Assign)
    assert isinstance(assign.value, ast.Call)
    names = ast.literal_eval(assign.value.args[1])
    table = {name: home for home, line in names.items() for name in line.split()}
    assert len(table) == sum(len(line.split()) for line in names.values()), "a name twice"
    return dict(imported(choice.body)), table | ast.literal_eval(assign.value.keywords[0].value)


def test_table_and_types_and_all_agree() -> None:
    typed, table = branches()
    assert typed == table
    at_once = dict(imported(TREE.body))
    assert not at_once.keys() & table.keys()
    offered = {*at_once, *table} - {"TYPE_CHECKING", "lazily"}
    assert offered == set(nn.__all__)
    assert offered <= set(dir(nn))


PROGRAM = """
import sys, pickle
import shardflax.nn as nn
early = [m for m in sys.modules if m.startswith("shardflax.") and m != "shardflax.nn"]
assert not [m for m in early if not m.startswith("shardflax.core")], early
dense = pickle.loads(sys.stdin.buffer.read())  # names a module that nobody imported yet
assert type(dense) is nn.Dense and dense.features == 3
assert nn.linear.Dense is nn.Dense and nn.activation.relu is nn.relu
space = {}
exec("from shardflax.nn import *", space)
assert set(nn.__all__) <= set(space)
from shardflax.nn import masks, recurrent_cells
import shardflax
assert "shardflax.training" not in sys.modules and shardflax.training.TrainState
assert set(shardflax.__all__) <= set(dir(shardflax))
assert {getattr(shardflax, n).__name__ for n in shardflax.__all__} <= sys.modules.keys()
"""


def test_layers_are_imported_on_first_use() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, input=pickle.dumps(nn.Dense(3)), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


LINENS = ["activation", "attention", "batch_apply", "combinators", "linear", "module"]
LINENS += ["normalization", "pooling", "recurrent", "spmd", "stochastic", "summary"]


@pytest.mark.parametrize("module", LINENS)
def test_linens_modules_offer_what_they_define(module: str) -> None:
    """`from flax.linen.linear import Conv` needs another prefix, and nothing else."""
    theirs = importlib.import_module(f"flax.linen.{module}")
    ours = importlib.import_module(f"shardflax.nn.{module}")
    shared = {
        name
        for name, value in vars(theirs).items()
        if getattr(value, "__module__", None) == theirs.__name__ and hasattr(flax.linen, name)
    }
    assert shared
    for name in shared:
        assert getattr(ours, name) is getattr(nn, name), name


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'shardflax\.nn' has no attribute 'Dens'"):
        attrgetter("Dens")(nn)
    with pytest.raises(ImportError, match="cannot import name 'Dens'"):
        exec("from shardflax.nn import Dens")
