"""What `explain` says of a state, in Python, as JSON, as text and for rich."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from benchmarks import misspelt
from shardflax import partitioning as pt
from shardflax.models import Decoder, decoder_config
from shardflax.partitioning import Explanation, Layout, LayoutError, explain, preset
from tests.allocations import nothing_allocated
from tests.core.harness import quick_key
from tests.explain.states import RULES, SPEC, boxed, many, state


@pytest.fixture(scope="module")
def found() -> Explanation:
    return explain(state(), SPEC, RULES, title="mine")


def leaf(explanation: Explanation, path: str) -> Any:
    return next(one for one in explanation.leaves if one.path == path)


def test_every_dim_says_its_rule_and_what_it_gave_up(found: Explanation) -> None:
    embed, mlp = leaf(found, "params/up/kernel").dims
    assert (embed.name, embed.rule, embed.taken, embed.local) == (
        "embed", ("fsdp",), ("fsdp",), 16
    )  # fmt: skip
    assert (mlp.rule, mlp.taken, mlp.local) == (("fsdp?", "tensor"), ("tensor",), 48)
    assert mlp.given_up == (("fsdp", "taken by dim 0 'embed'"),)
    vocab = leaf(found, "params/head/kernel").dims[1]
    assert vocab.taken == () and vocab.losses == (("tensor", "2 does not divide 17"),)


def test_every_leaf_says_where_its_names_are_from(found: Explanation) -> None:
    origins = {one.path: one.origin for one in found.leaves}
    assert origins["params/up/kernel"] == "its box"
    assert origins["mu/up/kernel"] == "as its parameter"
    assert origins["step"] == "a single number"
    assert origins["loose"] == "nothing names it" and not leaf(found, "loose").named
    assert found.followers == {
        "mu/norm/scale": "params/norm/scale",
        "mu/up/kernel": "params/up/kernel",
    }


def test_names_that_are_mesh_axes_have_no_rule(found: Explanation) -> None:
    first, second = leaf(found, "params/axes").dims
    assert (first.name, first.rule, first.taken, first.local) == ("tensor", None, ("tensor",), 4)
    assert (second.name, second.taken) == (None, ())


def test_bytes(found: Explanation) -> None:
    kernel = leaf(found, "params/up/kernel")
    assert (kernel.bytes, kernel.parts, kernel.bytes_per_device) == (64 * 96 * 4, 8, 64 * 96 // 2)
    assert found.bytes_per_device == sum(found.memory.values())
    assert list(found.memory) == ["loose", "mu", "params", "step"]


def test_meshes_of_any_size_are_planned_without_devices(found: Explanation) -> None:
    mesh = found.mesh
    assert (mesh.size, mesh.slices, mesh.ids) == (16, 2, ())
    assert [(axis.name, axis.dcn, axis.ici) for axis in mesh.axes] == [
        ("data", 2, 1),
        ("fsdp", 1, 4),
        ("tensor", 1, 2),
    ]
    large = explain(state(), "fsdp=8,tensor=2:explicit,data=64", RULES)
    assert large.mesh.size == 1024 and large.mesh.axes[2].kind == "explicit"
    with pytest.raises(pt.MeshSpecError, match="Write the size"):
        explain(state(), "fsdp=-1", RULES)


def test_devices_of_a_real_mesh_are_known() -> None:
    mesh = pt.make_mesh("dcn(data=2) ici(fsdp=4)")
    explained = explain(state(), mesh, RULES).mesh
    assert sorted(explained.ids) == list(range(8)) and explained.slices == 2
    assert str(explained) == "data=2, fsdp=4 (2 slices)"


def test_what_nothing_used(found: Explanation) -> None:
    assert found.layout.unused_rules == ("batch", "layers")
    assert found.layout.unused_axes == ("data",)
    assert found.layout.unnamed == ("loose",)
    text = str(found)
    assert "rules that nothing used: batch, layers" in text
    assert "axes that nothing used: data" in text
    assert "replicated, for nothing names them: loose" in text


def test_plain_pairs_say_which_rule_fired_and_which_were_passed_over() -> None:
    pairs = [("embed", "fsdp"), ("mlp", ("fsdp", "tensor")), ("mlp", "tensor"), ("norm", None)]
    found = explain(state(), SPEC, pairs)
    mlp = leaf(found, "params/up/kernel").dims[1]
    assert (mlp.rule, mlp.taken) == (("tensor",), ("tensor",))
    assert dict(mlp.given_up)["fsdp"] == "fsdp is taken by dim 0 'embed'"
    assert found.rules_title == "plain pairs"
    vocab = leaf(found, "params/head/kernel").dims[1]
    assert (vocab.name, vocab.rule, vocab.taken) == ("vocab", None, ())


def test_rule_sets_are_told_apart() -> None:
    """Moments that lie otherwise than their parameters are not said to follow them."""
    found = explain(state(), "data=4", pt.AxisRules(RULES, optimizer={"embed": "data"}))
    assert leaf(found, "params/up/kernel").spec == ((), ())
    moment = leaf(found, "mu/up/kernel")
    assert moment.spec == (("data",), ()) and moment.rule_set == "optimizer"
    assert found.followers == {"mu/norm/scale": "params/norm/scale"}
    sets = found.to_dict()["rules"]["sets"]
    assert list(sets) == ["optimizer"] and {"name": "embed", "axes": ["data"]} in sets["optimizer"]


def test_parts_make_up_the_whole_under_every_preset() -> None:
    """One trace of a decoder; its layout under every preset, on a mesh with every axis."""
    mesh = pt.make_abstract_mesh("data=2,stage=2,fsdp=2,fsdp2=2,expert=2,context=2,tensor=2")
    model, tokens = Decoder(decoder_config("tiny")), jnp.zeros((32, 16), jnp.int32)
    with pt.use(mesh, pt.DEFAULT_RULES):
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    for name in pt.PRESETS:
        explanation = explain(variables, mesh, preset(name))
        for one, plain in zip(explanation.leaves, explanation.layout.leaves, strict=True):
            assert one.parts * one.bytes_per_device == one.bytes, (name, one)
            assert math.prod(dim.local for dim in one.dims) * one.parts == math.prod(one.shape)
            assert tuple(dim.taken for dim in one.dims) == one.spec or one.problems
            assert plain.where == one.path


# --- what can be explained


def test_models_are_initialised_abstractly() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any, wide: bool = False) -> Any:
            return nn.Dense(32 if wide else 8, kernel_axes=("embed", "mlp"), name="up")(x)

    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    with nothing_allocated():
        found = explain(Model(), "fsdp=4,tensor=2", preset("fsdp_tp"), x, wide=True)
    assert leaf(found, "params/up/kernel").shape == (16, 32)
    with pytest.raises(LayoutError, match="its parameters depend on its inputs"):
        explain(Model(), "fsdp=4,tensor=2", preset("fsdp_tp"))


def test_functions_and_layouts_are_explained() -> None:
    def init(key: jax.Array, wide: bool) -> Any:
        return {"w": pt.named(jax.nn.initializers.ones, ("embed",))(key, (16 if wide else 8,))}

    mesh = pt.make_abstract_mesh("fsdp=4")
    key = jax.eval_shape(lambda: jax.random.key(0))
    called = explain(init, mesh, preset("fsdp"), key, wide=True)
    assert called.leaves[0].shape == (16,)
    again = explain(called.layout, mesh, preset("fsdp"))
    assert again.to_json() == called.to_json()


def test_a_name_misspelt_among_two_hundred_is_refused_before_anything_is_allocated() -> None:
    model, x = misspelt.model()
    key, mesh, rules = quick_key(0), pt.make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
    with nothing_allocated():
        found = explain(model, mesh, rules, x)
        assert len(found.leaves) == 200
        assert [p.error for p in found.problems] == [pt.UnknownNameError]
        with pytest.raises(
            pt.UnknownNameError, match=r"params/layers_57/kernel.*did you mean 'embed'"
        ):
            found.check()
        with pytest.raises(pt.UnknownNameError, match="params/layers_57/kernel"):
            pt.init_sharded(lambda key, x: model.init(key, x), key, x, mesh=mesh, rules=rules)


# --- how it is shown


def test_json_is_as_promised() -> None:
    """The whole text for a small state: a change here is a change of the format's version."""
    small = {"params": {"up": boxed((64, 96), "embed", "mlp")}, "step": jnp.int32(0)}
    rules = pt.AxisRules({"embed": "fsdp", "mlp": "fsdp? tensor", "norm": None}, title="mine")
    found = explain(small, "fsdp=4,tensor=2", rules, title="small")
    axis = {"dcn": 1, "type": "auto"}
    assert json.loads(found.to_json()) == {
        "format": "shardflax.explanation",
        "version": 1,
        "title": "small",
        "mesh": {
            "axes": [
                {"name": "fsdp", "size": 4, "ici": 4, **axis},
                {"name": "tensor", "size": 2, "ici": 2, **axis},
            ],
            "devices": 8,
            "slices": 1,
            "ids": None,
            "platform": "",
        },
        "rules": {
            "title": "mine",
            "entries": [
                {"name": "embed", "axes": ["fsdp"]},
                {"name": "mlp", "axes": ["fsdp?", "tensor"]},
                {"name": "norm", "axes": []},
            ],
            "sets": {},
        },
        "bytes": 24580,
        "bytes_per_device": 3076,
        "memory": {"params": 3072, "step": 4},
        "leaves": [
            {
                "path": "params/up",
                "shape": [64, 96],
                "dtype": "float32",
                "names": ["embed", "mlp"],
                "origin": "its box",
                "rule_set": "stored",
                "spec": [["fsdp"], ["tensor"]],
                "dims": [
                    {
                        "size": 64,
                        "local": 16,
                        "name": "embed",
                        "rule": ["fsdp"],
                        "taken": ["fsdp"],
                        "given_up": [],
                    },
                    {
                        "size": 96,
                        "local": 48,
                        "name": "mlp",
                        "rule": ["fsdp?", "tensor"],
                        "taken": ["tensor"],
                        "given_up": [{"axis": "fsdp", "why": "taken by dim 0 'embed'"}],
                    },
                ],
                "bytes": 24576,
                "bytes_per_device": 3072,
                "parts": 8,
                "problems": [],
            },
            {
                "path": "step",
                "shape": [],
                "dtype": "int32",
                "names": [],
                "origin": "a single number",
                "rule_set": "stored",
                "spec": [],
                "dims": [],
                "bytes": 4,
                "bytes_per_device": 4,
                "parts": 1,
                "problems": [],
            },
        ],
        "unnamed": [],
        "unused_rules": ["norm"],
        "unused_defaults": [],
        "unused_axes": [],
        "problems": [],
    }


def test_problems_are_in_the_json_and_the_text() -> None:
    found = explain(many(12), "fsdp=4,tensor=2", RULES)
    problem = json.loads(found.to_json())["problems"][0]
    assert (problem["path"], problem["error"], problem["dim"]) == (
        "params/layers_7x/kernel", "UnknownNameError", 0
    )  # fmt: skip
    assert "1 problem, see below" in str(found) and "problem: params/layers_7x/kernel" in str(found)


def test_a_problem_of_a_parameter_is_said_once() -> None:
    kernel = jax.ShapeDtypeStruct((6,), jnp.float32)
    moments = {name: {"w": kernel} for name in ("mu", "nu")}
    found = explain({"params": {"w": boxed((6,), "embed")}, **moments}, "fsdp=4", RULES)
    lines = [line for line in str(found).splitlines() if line.startswith("problem:")]
    assert len(found.problems) == 3 and len(lines) == 1
    assert "(and 2 leaves as it)" in " ".join(str(found).split())


def test_text_has_a_line_for_each_leaf(found: Explanation) -> None:
    lines = str(found).splitlines()
    assert lines[0] == "mine on data=2, fsdp=4, tensor=2 (2 slices) under mine"
    assert sum(line.startswith(("params/", "mu/", "loose", "step")) for line in lines) == 8
    kernel = next(line for line in lines if line.startswith("params/up/kernel"))
    assert "embed→fsdp, mlp→tensor" in kernel and "mlp not fsdp: taken by dim 0" in kernel


def test_rich_shows_leaves_that_follow_their_parameters_as_one() -> None:
    from rich.console import Console

    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(explain(state(), SPEC, RULES))
    text = console.export_text()
    assert "2 leaves, each as its parameter" in text and "mu/…" in text
    assert "mu/up/kernel" not in text and "params/up/kernel" in text


def test_rich_leaves_nothing_out_of_a_narrow_window() -> None:
    from rich.console import Console

    console = Console(width=64, file=io.StringIO(), record=True)
    found = explain(state(), SPEC, RULES)
    console.print(found, found.layout)
    text = console.export_text()
    assert all(len(line) <= 64 for line in text.splitlines())
    words = " ".join(text.split())
    for part in ("embed→fsdp", "mlp→tensor", "mlp not fsdp:", "taken by", "vocab not tensor:"):
        assert part in words, part
    assert "params/head/" in words and "  kernel" in text  # broken at a slash
    wrong = explain(
        {
            "params": {"w": boxed((6, 2), "embed", None), "v": boxed((8,), "embed")},
            "mu": {"w": jnp.ones((6, 2)), "v": jnp.ones(8)},
        },
        "fsdp=4",
        RULES,
    )
    console.print(wrong)
    text = console.export_text()
    assert "mu/…" in text and "mu/w" not in text  # wrong in the way of its parameter


def test_saved_files(found: Explanation, tmp_path: Any) -> None:
    assert json.loads(found.save(tmp_path / "a.json").read_text()) == found.to_dict()
    assert found.save(tmp_path / "a.html").read_text("utf-8") == found.to_html()
    assert repr(found) == "<Explanation of 8 leaves on data=2, fsdp=4, tensor=2 (2 slices)>"
    assert isinstance(found.layout, Layout)
