"""`shardflax explain` and the table of commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardflax.cli import COMMANDS, main
from tests.allocations import nothing_allocated

ROOT = Path(__file__).parent.parent.parent
SUBJECTS = "tests.cli.subjects"
MISSPELT = "benchmarks.misspelt:model"
TINY = ("explain", "tiny", "--layers", "1")
MLP = ("explain", f"{SUBJECTS}:pair")


def said(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Status, output, and errors of a command, which allocates nothing."""
    with nothing_allocated():
        status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_mesh_of_any_size_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, values = tmp_path / "page.html", tmp_path / "values.json"
    mesh = "dcn(data=2) ici(fsdp=16,tensor=16)"
    args = ("explain", "llama3-8b", "--mesh", mesh, "--html", page, "--json", values)
    status, out, err = said(capsys, *args, "--preset", "fsdp + tp_sp")
    # There are eight heads for keys: too few for sixteen devices.
    assert status == 0
    assert out.startswith("llama3-8b on data=2, fsdp=16, tensor=16 (2 slices) under fsdp + tp_sp\n")
    assert "kv_heads not tensor: 16 does not divide 8" in out and "512 devices" in out
    assert f"wrote {page}" in err and page.read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(values.read_text("utf-8"))["mesh"]["slices"] == 2


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, *TINY, "--mesh", "fsdp=4", "--json", "-", "--optimizer", "sgd")
    values = json.loads(out)
    assert status == 0 and values["title"] == "tiny"
    assert {leaf["path"].split("/")[0] for leaf in values["leaves"]} >= {"params", "opt_state"}


def test_problems_are_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, *TINY, "--mesh", "tensor=8", "--problems-only")
    assert status == 1
    lines = out.splitlines()
    assert len(lines) == 2 and all("is not divisible by 8 (tensor=8" in line for line in lines)
    status, out, _ = said(capsys, *MLP, "--mesh", "tensor=64")
    assert status == 1 and "problem: params/down/kernel" in out
    status, out, _ = said(capsys, *MLP, "--mesh", "tensor=2", "--problems-only")
    assert status == 0 and "no problems" in out


def test_a_misspelt_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("explain", MISSPELT, "--mesh", "fsdp=4,tensor=2", "--problems-only")
    status, out, _ = said(capsys, *args)
    assert status == 1
    assert out.count("\n") == 1 and out.startswith("params/layers_57/kernel, shape (16, 16)")
    assert "did you mean 'embed'?" in out


@pytest.mark.parametrize("name", ["made", "pair", "program", "stateless"])
def test_import_paths(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--mesh", "fsdp=4", "--preset", f"{SUBJECTS}:RULES")
    status, out, _ = said(capsys, "explain", f"{SUBJECTS}:{name}", *args)
    assert status == 0
    assert "params/up/kernel" in out and "under own rules" in out


WRONG = {
    "axis": (["tiny", "--mesh", "fspd=4"], "did you mean 'fsdp'?"),
    "syntax": (["tiny", "--mesh", "fsdp:4"], "cannot read 'fsdp:4'"),
    "open": (["tiny", "--mesh", "fsdp=-1"], "Write the size, or --devices 256."),
    "count": (["tiny", "--mesh", "fsdp=-1,tensor=3", "--devices", "8"], "Write tensor=2 or"),
    "dcn": (["tiny", "--mesh", "dcn(tensor=2) ici(fsdp=4)"], "say --across-dcn tensor."),
    "slip": (["tiny", "--mesh", "fspd=4"], "is meant, say so: --other-axes fspd."),
    "folder": (["tiny", "--mesh", "fsdp=4", "--html", "no/such/page.html"], "it cannot be written"),
    "page": (["tiny", "--mesh", "fsdp=4", "--html", "-"], "such as --html layout.html"),
    "batch": (["tiny", "--mesh", "fsdp=4", "--batch", "0"], "--batch 0: there is at least one"),
    "preset": (["tiny", "--mesh", "fsdp=4", "--preset", "fsdp_pt"], "did you mean 'fsdp_tp'?"),
    "model": (["tinny", "--mesh", "fsdp=4"], "did you mean 'tiny'? A model of yours is package."),
    "rows": (["tiny", "--mesh", "fsdp=4", "--batch", "6"], "batch: dim 0 'batch' of size 6"),
    "none": (["tiny", "--mesh", "fsdp=-1", "--devices", "0"], "--devices 0: there is at least one"),
    "file": ([f"{SUBJECTS}.py:pair", "--mesh", "fsdp=4"], f"Write its module, {SUBJECTS}:pair."),
    "nameless": ([f"{SUBJECTS}:", "--mesh", "fsdp=4"], "write package.module:name"),
    "arguments": ([f"{SUBJECTS}:given", "--mesh", "fsdp=4"], "'key'): write one that calls it"),
    "no-return": ([f"{SUBJECTS}:forgot", "--mesh", "fsdp=4"], "it returns None without arrays"),
    "text": ([f"{SUBJECTS}:text", "--mesh", "fsdp=4"], "it returns a str at ['a']"),
    "leaves": ([f"{SUBJECTS}:leaves", "--mesh", "fsdp=4"], "calling it ends the process"),
    "layers": ([f"{SUBJECTS}:pair", "--mesh", "fsdp=4", "--layers", "2"], "--layers is for decod"),
    "module": (["no.such:thing", "--mesh", "fsdp=4"], "there is no module 'no'"),
    "submodule": ([f"{SUBJECTS}.x:thing", "--mesh", "fsdp=4"], f"no module '{SUBJECTS}.x'"),
    "name": ([f"{SUBJECTS}:pear", "--mesh", "fsdp=4"], "did you mean 'pair'?"),
    "empty": ([":", "--mesh", "fsdp=4"], "write package.module:name"),
    "kind": ([f"{SUBJECTS}:NUMBER", "--mesh", "fsdp=4"], "expected a function, or a Program"),
    "inputs": ([f"{SUBJECTS}:model_alone", "--mesh", "fsdp=4"], "depend on its inputs"),
    "rules": (["tiny", "--mesh", "a=4", "--preset", f"{SUBJECTS}:NUMBER"], "expected AxisRules"),
    "mesh-axis": (["tiny", "--mesh", "model=4"], "did you mean 'tensor'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_one_line_and_status_two(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args, expected = WRONG[case]
    status, out, err = said(capsys, "explain", *args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_what_a_spec_does_not_say_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """What the errors above ask for."""
    for args, heading in (
        (("--mesh", "fsdp=-1,tensor=2", "--devices", "8"), "on fsdp=4, tensor=2"),
        (("--mesh", "dcn(data=-1) ici(fsdp=4)", "--devices", "8"), "on data=2, fsdp=4 (2 slices)"),
        (
            ("--mesh", "dcn(tensor=2) ici(fsdp=4)", "--across-dcn", "tensor"),
            "on fsdp=4, tensor=2 (2 slices)",
        ),
        (("--mesh", "fsdp=4,fspd=2", "--other-axes", "fspd"), "on fsdp=4, fspd=2"),
    ):
        status, out, _ = said(capsys, *MLP, *args, "--problems-only")
        assert (status, out.startswith(f"{MLP[1]} {heading} under fsdp_tp")) == (0, True), out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise ValueError('a fault')", "ValueError: a fault"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
    ],
)
def test_modules_that_cannot_be_imported(
    text: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No status of success, and none of problems that were found: in one line, with the place."""
    monkeypatch.syspath_prepend(tmp_path)
    Path(tmp_path, "their_module.py").write_text(text)
    for asked in (["their_module:x"], ["tiny", "--preset", "their_module:x"]):
        status, out, err = said(capsys, "explain", *asked, "--mesh", "fsdp=4")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"'their_module:x': importing their_module fails: {expected}" in err
        assert "their_module.py, line 1)" in err


def test_faults_of_the_model_are_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """They have a traceback, and the status of no result."""
    assert main(["explain", f"{SUBJECTS}:broken", "--mesh", "fsdp=4"]) == 2
    err = capsys.readouterr().err
    assert "subjects.py" in err and err.rstrip().splitlines()[0].startswith("Traceback")
    assert "RuntimeError: a fault of the user's" in err


def test_wrong_options_are_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["explain"], ["explain", "tiny"], ["explain", "tiny", "--mehs", "fsdp=4"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
    assert "--mesh" in capsys.readouterr().err


def test_the_table_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert main(["explian"]) == 2
    assert "did you mean 'explain'?" in capsys.readouterr().err


PROGRAM = """
import os, sys
from shardflax.cli import main
assert "jax" not in sys.modules, "the table of commands imports nothing"
status = main(["explain", "benchmarks.misspelt:model", "--mesh", "fsdp=64,tensor=8"])
from tests.allocations import nothing_allocated
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
# Who reads goes away (`| head`): the status of SIGPIPE, and no traceback.
read, write = os.pipe()
os.close(read)
os.dup2(write, sys.stdout.fileno())
assert main(["explain", "llama3-8b", "--mesh", "fsdp=4", "--json", "-"]) == 141
assert os.environ["JAX_PLATFORMS"] == "cpu"
sys.exit(status)
"""


@pytest.mark.multiprocess
def test_no_device_is_touched() -> None:
    """In a process of its own: no backend of JAX is ever started, and so nothing allocated."""
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["JAX_PLATFORMS"] = "tpu"  # commands leave accelerators alone
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "did you mean 'embed'?" in done.stdout and "512 devices" in done.stdout
