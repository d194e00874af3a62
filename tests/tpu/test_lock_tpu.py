"""`shardflax lock --topology`, and `explain`: what the compiler of TPUs knows, kept and checked."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from shardflax.cli import main
from shardflax.partitioning import libtpu_version, read_lock

pytestmark = pytest.mark.tpu


def test_entries_for_tpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "shardflax.lock"
    asked = ["tests.cli.subjects:program", "--mesh", "fsdp=-1", "--topology", "v5e:2x4"]
    assert main(["lock", "--file", str(file), *asked]) == 0
    (entry,) = read_lock(file).values()
    name = "tests.cli.subjects:program fsdp=-1 fsdp_tp v5e:2x4"
    assert f"{name}: new" in capsys.readouterr().out
    assert entry.compiler == f"jax {jax.__version__}, libtpu {libtpu_version()} for TPU v5 lite"
    assert entry.mesh == "fsdp=8" and entry.asked["topology"] == "v5e:2x4"
    assert {one.axes for one in entry.collectives or ()} == {"fsdp"}
    assert entry.memory is not None and entry.memory["arguments"] >= entry.bytes_per_device
    # The check compiles anew; one byte more of memory is seen.
    values = json.loads(file.read_text("utf-8"))
    values["entries"][name]["memory"]["temporary"] += 1024
    file.write_text(json.dumps(values), "utf-8")
    assert main(["lock", "--file", str(file), "--check"]) == 1
    out = capsys.readouterr().out
    assert "memory of the step, temporary: " in out and "(-1.0 KiB)" in out
    assert "collectives" not in out


def test_topologies_that_libtpu_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tests.cli.subjects:program", "--mesh", "fsdp=-1", "--topology", "v5e:3x3"]
    assert main(["lock", *asked]) == 2
    assert "no TPU topology 'v5e:3x3': libtpu says: " in capsys.readouterr().err


def test_explain_knows_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tests.cli.subjects:program", "--mesh", "dcn(data=2) ici(fsdp=-1)"]
    assert main(["explain", *asked, "--topology", "v5e:2x4", "--json", "-"]) == 0
    mesh = json.loads(capsys.readouterr().out)["mesh"]
    assert "TPU v5 lite" in str(mesh) and "100000" in str(mesh)
    # Two chips by four: an axis of three fits nowhere.
    wrong = ["tests.cli.subjects:program", "--mesh", "fsdp=3", "--topology", "v5e:2x4"]
    assert main(["explain", *wrong]) == 2
    assert "needs 3 devices, and there are 8" in capsys.readouterr().err
