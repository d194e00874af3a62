"""What the compiler does only as a last resort: caught, translated, and nothing else swallowed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.partitioning import (
    AxisRules,
    RematerializationError,
    RematerializationWarning,
    compile,
    compile_diagnostics,
    make_mesh,
    stderr_tap,
    use,
)
from shardflax.partitioning.hlo import parse
from shardflax.partitioning.rematerialization import from_log, from_program
from shardflax.partitioning.sharding_text import spec_of_text, tile_counts
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.stderr_filter import Filter
from shardflax.partitioning.stderr_tap import listen

P = jax.P
MESH = make_mesh("data=2,tensor=3", jax.devices()[:6])
RULES = AxisRules({"batch": "data", "act_mlp": "tensor", "length": None})


class Block(nn.Module):
    """From ('act_mlp', -) to (-, 'batch'): XLA knows no way on a mesh of 2 x 3."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        x = nn.with_logical_constraint(jnp.sin(x), ("act_mlp", None))
        return jnp.cos(nn.with_logical_constraint(x, (None, "batch"))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layers = nn.scan(Block, length=3, variable_axes={}, split_rngs={})
        return layers(name="layers")(x, None)[0]


def lowered(model: nn.Module, size: int = 6) -> Any:
    with use(MESH, RULES):
        return jax.jit(lambda x: model.apply({}, x)).lower(jnp.ones((size, 6)))


def test_a_rematerialization_is_an_error_with_path_specs_and_cure() -> None:
    with pytest.raises(RematerializationError) as error, use(MESH, RULES):
        compile(lowered(Stack()))
    (found,) = error.value.findings
    assert (found.path, found.before, found.after) == ("Stack/layers", P("tensor"), P(None, "data"))
    assert (found.shape, found.bytes, found.count, found.seen) == ((6, 6), 144, 3, "log")
    assert found.source.startswith("test_diagnostics.py:")
    text = str(error.value)
    assert "from:  P('tensor',)" in text and "to:    P(None, 'data')" in text
    assert "with_logical_constraint(x, (None, 'batch'))" in text and "('act_mlp', None)" in text
    assert "3 times a call" in text


def test_without_names_the_cure_is_said_in_specs() -> None:
    with pytest.raises(RematerializationError, match=r"lay the array out as P\(None, 'data'\)"):
        compile(lowered(Block()), mesh=MESH, rules=())


def test_it_may_be_a_warning_or_small_enough() -> None:
    program = lowered(Block(), 12)
    with pytest.warns(RematerializationWarning, match="Block") as caught:
        assert compile(program, mesh=MESH, then="warn").as_text()
    assert caught[0].filename == __file__
    compile(program, mesh=MESH, above=12 * 6 * 4)
    compile(program, mesh=MESH, then="collect")


def test_without_a_mesh_what_xla_says_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are taken out of stderr: they have to come back somewhere."""
    monkeypatch.setattr("shardflax.partitioning.diagnostics.mesh_of", lambda _: None)
    with pytest.raises(RematerializationError, match=r"Block.*\n.*\n    from:  {.*\n") as error:
        compile(lowered(Block()), rules=())
    assert "one layout on both sides" in str(error.value)


def test_programs_compiled_inside_are_noted() -> None:
    model = Block()
    with compile_diagnostics(MESH, RULES) as found, use(MESH, RULES):
        jax.block_until_ready(jax.jit(lambda x: model.apply({}, x))(jnp.ones((18, 6))))
    (one,) = found.rematerializations
    assert (one.path, one.shape, one.after) == ("Block", (18, 6), P(None, "data"))
    with pytest.raises(RematerializationError, match="Block"):  # noqa: SIM117
        with compile_diagnostics(MESH, RULES, then="error"):
            lowered(Block(), 24).compile()


def test_the_program_shows_what_the_log_does_not_say() -> None:
    """As from a cache, or where the log is off."""
    for model, count, after in ((Block(), 1, P(None, "data")), (Stack(), 3, P("tensor", "data"))):
        compiled = compile(lowered(model), mesh=MESH, then="collect")
        (found,) = from_program(parse(compiled.as_text()), MESH)
        assert (found.before, found.after, found.count) == (P("tensor"), after, count)
        assert found.seen == "program" and found.path.startswith(type(model).__name__)


def test_what_a_program_asks_for_is_no_finding() -> None:
    def body(x: Any) -> Any:
        whole = jax.lax.all_gather(x, "tensor", axis=0, tiled=True)
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("data") * 3, 3)

    mapped = jax.shard_map(
        body, mesh=MESH, in_specs=P("tensor"), out_specs=P("data"), check_vma=False
    )
    compile(jax.jit(mapped), jnp.ones((6, 6)), mesh=MESH)
    weights = jax.jit(lambda w, x: x @ jax.lax.with_sharding_constraint(w, P()))
    with jax.set_mesh(MESH):
        compile(weights, jax.device_put(jnp.ones((6, 6)), P("tensor")), jnp.ones((6, 6)), mesh=MESH)


GATHERED = """HloModule m

%cut (p: f32[8,4], t: s32[8], i: u32[]) -> f32[4,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %t = s32[8]{0} parameter(1)
  %i = u32[] parameter(2)
  %s = s32[1]{0} dynamic-slice(%t, %i), dynamic_slice_sizes={1}
  %b = s32[] bitcast(%s)
  %four = s32[] constant(4)
  %at = s32[] multiply(%b, %four)
  %zero = s32[] constant(0)
  ROOT %d = f32[4,4]{1,0} dynamic-slice(%p, %at, %zero), dynamic_slice_sizes={4,4}
}

ENTRY %main (a: f32[4,4]) -> (f32[4,4], f32[8,4]) {
  %a = f32[4,4]{1,0} parameter(0)
  %id = u32[] partition-id()
  %table = s32[8]{0} constant({0, 0, 0, 0, 1, 1, 1, 1})
  %g = f32[8,4]{1,0} all-gather(%a), replica_groups=GROUPS, dimensions={0}, NAME
  %c = f32[8,4]{1,0} copy(%g)
  %f = f32[4,4]{1,0} fusion(%c, %table, %id), kind=kLoop, calls=%cut
  %n = f32[8,4]{1,0} negate(WHOLE)
  ROOT %r = (f32[4,4]{1,0}, f32[8,4]{1,0}) tuple(%f, %n)
}"""


def gathered(whole: str, groups: str = "[4,2]<=[8]") -> Any:
    text = GATHERED.replace("WHOLE", whole).replace("GROUPS", groups)
    text = text.replace("NAME", 'metadata={op_name="jit(f)/net/transpose(jvp(up))/dot_general"}')
    return from_program(parse(text), make_mesh("data=2,tensor=4"))


def test_what_is_used_whole_as_well_is_gathered_for_a_reason() -> None:
    assert gathered("%g") == gathered("%c") == []
    (found,) = gathered("%a")
    assert (found.path, found.operation, found.shape) == ("net/up", "dot_general", (8, 4))
    assert (found.before, found.after) == (None, P("data"))
    assert found.shardings[0] == "dim 0 in 2 parts, over a part of tensor"
    (found,) = gathered("%a", "[4,2]<=[2,4]T(1,0)")
    assert found.before == P("data") and str(found).endswith("P('data',) -> P('data',)")


@pytest.mark.parametrize(
    "line",
    [
        "[SPMD] Involuntary full rematerialization. The compiler cannot go from sharding "
        "{mesh['data'=2,'tensor'=3], [{}, {'tensor'}]} to {mesh['data'=2,'tensor'=3], "
        "[{'data'}, {}]} efficiently for HLO operation %c = bf16[6,2]{1,0} copy(%s), "
        'metadata={op_name="jit(f)/a/jit(relu)/max"}. As the last resort, SPMD will ...',
        "[spmd] Involuntary full rematerialization. The compiler was not able to go from sharding "
        "{devices=[1,3,2]<=[2,3]T(1,0) last_tile_dim_replicate} to {devices=[2,1,3]<=[6] "
        "last_tile_dim_replicate} without doing a full rematerialization of the tensor for HLO "
        'operation: %c = bf16[6,2]{1,0} copy(%s), metadata={op_name="jit(f)/a/jit(relu)/max" '
        'source_file="/home/model.py" source_line=7}',
    ],
)
def test_both_forms_of_the_line(line: str) -> None:
    found = from_log(line, MESH)
    assert found is not None
    assert (found.path, found.operation, found.shape, found.bytes) == ("a", "max", (6, 6), 72)
    assert (found.before, found.after) == (P(None, "tensor"), P("data"))
    assert found.source == ("model.py:7" if "model.py" in line else "")
    nowhere = from_log(line, None)
    assert nowhere is not None and nowhere.before is None and "tensor" not in nowhere.path
    assert str(nowhere).startswith("a (max)")


def test_other_lines_are_none() -> None:
    assert from_log("E0102 03:04:05.6 7 spmd.cc:1] something else", MESH) is None


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("{replicated}", P()),
        ("{devices=[2,3]<=[6]}", P("data", "tensor")),
        ("{devices=[3,2]<=[2,3]T(1,0)}", P("tensor", "data")),
        ("{devices=[6,1]<=[2,3]T(1,0)}", P(("tensor", "data"))),
        ("{devices=[6,1]0,1,2,3,4,5}", P(("data", "tensor"))),
        ("{devices=[1,2,3]0,1,2,3,4,5 last_tile_dim_replicate}", P(None, "data")),
        ("{devices=[3,2]<=[2,3]T(1,0) last_tile_dims={manual}}", P("tensor")),
        ("{mesh['axis_0'=3,'axis_1'=2], device_ids=([2,3]T(1,0)), [{'axis_0'}]}", P("tensor")),
        ("{mesh['axis_0'=6], [{'axis_0':(1)2}, {'axis_0':(2)3}]}", P("data", "tensor")),
        ("{mesh['data'=2,'tensor'=3], [{'data', 'tensor'}], replicated={}}", P(("data", "tensor"))),
        ('#sdy.sharding<@mesh, [{"tensor", ?}, {?}]>', P("tensor")),
        ('<@mesh, [{}, {"data"}]>', P(None, "data")),
        ("{devices=[6,1]5,1,2,3,4,0}", None),
        ("{devices=[2]<=[2]}", None),
        ("{mesh['axis_0'=6], [{'axis_0':(3)2}]}", None),
        ("{maximal device=0}", None),
        ('<@mesh, [{"another"}]>', None),
    ],
)
def test_printed_shardings_are_specs(text: str, spec: Any) -> None:
    assert spec_of_text(text, MESH) == spec
    if spec:
        axes = [spec_axes(part) for part in spec]
        counts = [math.prod(MESH.shape[axis] for axis in found) for found in axes]
        assert list(tile_counts(text, MESH))[: len(counts)] == counts


@pytest.mark.parametrize("spec", [P("data"), P(None, ("tensor", "data")), P("tensor", "data")])
def test_what_this_version_of_jax_prints_is_read_back(spec: Any) -> None:
    sharding = jax.NamedSharding(MESH, spec)
    program = jax.jit(lambda x: x, in_shardings=sharding).lower(jnp.ones((6, 6)))
    texts = [t for t in program.as_text().splitlines() if "sdy.sharding =" in t]
    shown = texts[0].partition("sdy.sharding = ")[2].partition(">")[0]
    assert spec_of_text(shown, MESH) == spec


def note(thread: int, word: str) -> bytes:
    text = f"W0102 03:04:05.678901 {thread:7d} spmd.cc:1] Involuntary full rematerialization {word}"
    return text.encode() + b"\n"


def test_nothing_else_is_swallowed(capfd: pytest.CaptureFixture[str]) -> None:
    long = b"x" * 200_000 + b"\n"
    with listen() as lines:
        os.write(2, b"50 %")
        os.write(2, note(threading.get_native_id(), "one"))
        os.write(2, long)
        print("from python", file=sys.__stderr__, flush=True)
        child = subprocess.Popen(["sh", "-c", "sleep 0.2; echo from a child >&2"])
    os.write(2, b"after\n")
    assert child.wait() == 0
    assert [line.rpartition(" ")[2] for line in lines] == ["one"]
    for pid in stderr_tap._tap._filters:  # what the child wrote last has a way to go
        os.waitpid(pid, 0)
    text = capfd.readouterr().err
    assert "Involuntary" not in text and "mark" not in text
    for part in ("50 %" + long.decode(), "from python\n", "after\n", "from a child\n"):
        assert part in text


def test_stderr_survives_the_filter(capfd: pytest.CaptureFixture[str]) -> None:
    with listen() as lines:
        os.kill(stderr_tap._tap._filters[-1], signal.SIGKILL)
        os.waitpid(stderr_tap._tap._filters[-1], 0)
    os.write(2, b"still here\n")
    assert lines == [] == stderr_tap._tap._listeners
    assert "still here" in capfd.readouterr().err


def test_threads_get_the_notes_of_their_own_programs() -> None:
    got: dict[str, list[str]] = {}
    both = threading.Barrier(2)

    def run(word: str) -> None:
        with listen() as lines:
            both.wait(300)
            os.write(2, note(threading.get_native_id(), word))
            os.write(2, note(0, "nobody"))
            both.wait(300)
        got[word] = [line.rpartition(" ")[2] for line in lines]

    threads = [threading.Thread(target=run, args=(word,)) for word in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Lines that name neither thread go to both.
    assert {word: sorted(lines) for word, lines in got.items()} == {
        word: [word, "nobody", "nobody"] for word in ("a", "b")
    }


def test_last_words_are_heard(tmp_path: Path) -> None:
    package = str(Path(stderr_tap.__file__).parent)
    program = (
        "import os, sys, types\n"
        "for name in ('shardflax', 'shardflax.partitioning'):  # without JAX: it takes a second\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        f"    sys.modules[name].__path__ = [{package!r}]\n"
        "from shardflax.partitioning.stderr_tap import listen\n"
        "with listen():\n    os.write(2, b'last words\\n')\n    os._exit(7)\n"
    )
    with (tmp_path / "err").open("wb+") as err:
        done = subprocess.run([sys.executable, "-c", program], stderr=err, check=False)
        assert done.returncode == 7
        for _ in range(6000):
            err.seek(0)
            if b"last words" in (text := err.read()):
                break
            threading.Event().wait(0.05)
    assert b"last words\n" in text


def test_the_filter_takes_text_in_any_pieces() -> None:
    text = b"a\nb" + note(7, "one") + b"c\r50 %\r" + note(8, "two") + b"end\0mark 3\nlast"
    for size in (1, 2, 7, 64, len(text)):
        f = Filter()
        pieces = [f.feed(text[i : i + size]) for i in range(0, len(text), size)]
        assert b"".join(passed for passed, _ in pieces) + f.finish() == b"a\nbc\r50 %\rendlast"
        answer = note(7, "one") + note(8, "two") + b"\0mark 3\n"
        assert b"".join(answers for _, answers in pieces) == answer


def test_compiling_goes_on_without_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no processes here")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with warnings.catch_warnings(), pytest.raises(RematerializationError) as error:
        compile(lowered(Block()), mesh=MESH)
    assert [one.seen for one in error.value.findings] == ["program"]
