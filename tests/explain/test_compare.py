"""Presets beside one another: what is held is that of the layout, what is sent that of programs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import shardflax.nn as nn
from shardflax import partitioning as pt
from shardflax.cli import main
from shardflax.partitioning import Comparison, PresetCost, compare_presets
from shardflax.programs import Program, layout_of, traced_step
from tests.allocations import nothing_allocated
from tests.cli.subjects import MLP

KEY = jax.eval_shape(lambda: jax.random.key(0))
MODEL, TX = MLP(), optax.sgd(0.1, momentum=0.9)


def init(key: Any) -> Any:
    params = MODEL.init(key, jnp.ones((8, 16)))["params"]
    return {"params": params, "opt_state": TX.init(params)}


def step(state: Any, x: Any) -> Any:
    grads = jax.grad(lambda p: jnp.sum(MODEL.apply({"params": p}, x) ** 2))(state["params"])
    updates, opt_state = TX.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, 0


PROGRAM = Program(init, step, jax.ShapeDtypeStruct((8, 16), jnp.float32), ("batch", None))


def compared(mesh: Any, **more: Any) -> Comparison:
    about = {"batch": PROGRAM.batch, "batch_names": PROGRAM.batch_names, **more}
    with nothing_allocated():
        return compare_presets(init, mesh, KEY, **about)


def row(found: Comparison, title: str) -> PresetCost:
    return next(one for one in found.rows if title in one.presets)


def test_what_is_held_is_what_the_layout_holds() -> None:
    found = compared("data=2,fsdp=2,tensor=2")
    assert sorted(name for one in found.rows for name in one.presets) == sorted(pt.PRESETS)
    mesh = pt.make_abstract_mesh("data=2,fsdp=2,tensor=2")
    for one in found.rows:
        layout = layout_of(PROGRAM, mesh, pt.preset(one.presets[-1]))
        held = [leaf.bytes_per_device for leaf in layout.leaves if leaf.path[0] == "params"]
        assert (one.params, one.rest) == (sum(held), layout.bytes_per_device - sum(held))
    assert row(found, "fsdp").presets == ("fsdp", "hsdp", "fsdp2d")
    assert row(found, "fsdp").batch == row(found, "fsdp_tp").batch == 8 * 16 * 4 // 4
    order = [(bool(one.idle), one.held) for one in found.rows]
    assert order == sorted(order) and found.rows[0].title == "fsdp_tp"
    assert row(found, "fsdp_tp").idle == () and row(found, "fsdp").idle == ("tensor",)
    assert row(found, "dp").idle == ("fsdp", "tensor")


@pytest.mark.parametrize(
    ("name", "spec"),
    [("dp", "data=8"), ("zero1", "data=8"), ("fsdp", "fsdp=8"), ("hsdp", "data=2,fsdp=4")],
)
def test_what_is_sent_is_what_the_compiled_step_sends(name: str, spec: str) -> None:
    """Byte for byte: weights and gradients are all that this model sends under these presets.

    The first weight is gathered for the forward pass alone: what it is applied to has no gradient.
    """
    mesh, rules = pt.make_mesh(spec), pt.preset(name)
    (found,) = compared(spec, presets=[name]).rows
    compiled = traced_step(PROGRAM, layout_of(PROGRAM, mesh, rules), rules).lower().compile()
    sent = {"all-gather": 0, "all-reduce": 0}
    for one in pt.collectives(compiled):
        sent[one.kind] += one.total
    once = 16 * 32 * 4 if "fsdp" in spec else 0
    assert (found.gathered - once, found.summed) == tuple(sent.values())
    assert found.summed > 0 and (found.gathered > 0) == (name != "dp")


def test_what_crosses_slices() -> None:
    rows = compared(
        ["dcn(data=2) ici(fsdp=4)", "dcn(fsdp=2) ici(data=4)", "data=2,fsdp=4"], presets=["hsdp"]
    ).rows
    across = {one.mesh: one.across for one in rows}
    (one,) = {(one.gathered, one.summed) for one in rows if one.mesh.startswith("data=2")}
    assert across["data=2, fsdp=4"] == 0
    assert across["data=2, fsdp=4 (2 slices)"] == one[1] == 2 * 16 * 32 * 4
    assert across["data=4, fsdp=2 (2 slices)"] == sum(one)  # and so every gather of a weight


def test_experts_are_used_where_they_lie() -> None:
    """A weight of experts is gathered over the axes of `moe_batch`, of which theirs is none."""
    names = ("expert", "expert_embed", "expert_mlp")
    box = pt.LogicallyPartitioned(jax.ShapeDtypeStruct((2, 8, 4), jnp.float32), names)
    (found,) = compare_presets({"w": box}, "fsdp=2,expert=2", presets=["fsdp + ep"]).rows
    assert (found.params, found.gathered, found.summed) == (64, 2 * 128, 128)


def test_what_is_wrong_comes_last_and_is_said() -> None:
    model, x = nn.Dense(17, kernel_axes=("embed", "mlp"), use_bias=False), jnp.ones((6, 16))
    found = compare_presets(model, "data=4,tensor=2", x, presets=["tp_sp", "dp"], batch=x)
    text = str(found)
    assert [bool(one.problems) for one in found.rows] == [True, True]
    assert "dp on data=4, tensor=2: batch: dim 0 'batch' of size 6" in text
    assert "params/kernel, shape (16, 17): dim 1 'mlp' of size 17" in text
    assert "2 problems; tensor idles\n" in text and "1 problem; tensor idles\n" in text
    with pytest.raises(pt.UnknownPresetError, match="did you mean 'fsdp'"):
        compare_presets(model, "fsdp=4", x, presets=["fdsp"])
    with pytest.raises(pt.InvalidRuleError, match="not plain pairs"):
        compare_presets(model, "fsdp=4", x, presets=[[("embed", "fsdp")]])  # type: ignore[list-item]


def test_a_table_and_values() -> None:
    from rich.console import Console

    found = compared(["fsdp=4,tensor=2", "data=8"], presets=["fsdp_tp", "dp"], title="mine")
    lines = str(found).splitlines()
    assert lines[0] == "mine" and lines[1].split() == [
        "presets", "mesh", "params", "rest", "batch", "held", "gathered", "summed", "notes"
    ]  # fmt: skip
    assert lines[3].startswith("fsdp_tp") and lines[4].startswith("fsdp_tp, dp  data=8")
    assert len(lines) == 3 + 3 + 1 + 2
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(found)
    shown = console.export_text()
    assert "fsdp_tp" in shown and "fsdp, tensor idle" in shown and "Bytes on each device" in shown
    values = json.loads(found.to_json())
    assert values["rows"][0]["presets"] == ["fsdp_tp"] and values["rows"][0]["problems"] == []


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ("explain", "tests.cli.subjects:program", "--mesh", "fsdp=8", "--compare")
    assert main([*args, "--also", "fsdp=-1,tensor=2", "--devices", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tests.cli.subjects:program\n") and "fsdp=4, tensor=2" in out
    small = ("explain", "tests.cli.subjects:program", "--mesh", "fsdp=1", "--compare", "--json")
    assert main([*small, "-", "--preset", "tests.cli.subjects:RULES"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["rows"]
    assert {"own rules", *pt.PRESETS} == set(one["presets"])
    assert main([*small, str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["format"] == "shardflax.comparison"
    assert main([*args, "--html", str(tmp_path / "a.html")]) == 2
    assert main([*args[:-1], "--also", "data=8"]) == 2
    assert "it goes with --compare" in capsys.readouterr().err
