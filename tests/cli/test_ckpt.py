"""`shardflax ckpt`: what it prints, its exit status, and that it needs no devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shardflax import ckpt
from shardflax.cli import main
from shardflax.nn import LogicallyPartitioned

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1 and 2, which differ in one leaf, and with what a killed save left."""
    root = tmp_path_factory.mktemp("ckpt") / "run"
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    value = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    state = {f"layers_{i}": {"w": np.full(3, i, np.float32)} for i in range(5)}
    state |= {"head": {"kernel": LogicallyPartitioned(value, ("embed", "vocab"))}, "step": 1}
    with ckpt.CheckpointManager(root) as manager:
        manager.save(1, state, extras={"seen": 640}, metrics={"loss": 0.5})
        manager.save(2, state | {"head": {"kernel": value * 2}})
    (root / "3.saving-dead-1").mkdir()
    return root


def said(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Status and output of a command."""
    status = main(["ckpt", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = said(capsys, "ls", run)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 3
    assert lines[0].split()[0] == "1" and lines[0].endswith("committed") and "KiB" in lines[0]
    assert lines[2].split()[0] == "3.saving-dead-1" and lines[2].endswith("unfinished")
    status, out = said(capsys, "ls", run, "--json")
    assert [step["name"] for step in json.loads(out)] == ["1", "2", "3.saving-dead-1"]
    assert said(capsys, "ls", run / "3.saving-dead-1") == (
        1, f"no steps in {run / '3.saving-dead-1'}\n")  # fmt: skip


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = said(capsys, "show", run, "--step", 1)
    assert status == 0
    assert out.startswith(f"{run / '1'} (shardflax, step 1): 7 leaves, ")
    assert "by 1 process on fsdp=4, tensor=2\nmetrics: loss=0.5\nextras: seen\n" in out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "head/kernel float32[8,4] embed:fsdp, vocab:tensor 128 B" in rows
    assert "layers_0 ... layers_4 (5 alike)/w float32[3] 60 B" in rows
    assert "step 1 8 B" in rows
    _, out = said(capsys, "show", run, "--all")
    assert "alike" not in out and "layers_3/w" in out
    _, out = said(capsys, "show", run, "--step", 1, "--json")
    kernel = next(leaf for leaf in json.loads(out)["leaves"] if leaf["path"][0] == "head")
    assert kernel["names"] == ["embed", "vocab"] and kernel["axes"] == ["fsdp", "tensor"]


def test_show_on_a_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    _, out = said(capsys, "show", run)
    assert "\x1b[36mfloat32[8,4]" in out and "head/kernel" in out


def test_diff(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = (0, "7 leaves alike (values not compared)\n")
    assert said(capsys, "diff", run, "--step", 1, "--second-step", 2) == same
    status, out = said(capsys, "diff", run / "1", run / "2", "--values")
    line = "value    head/kernel  32 of 32 elements differ, by up to 1\n"
    assert (status, out) == (1, line + "1 leaf unlike, 6 leaves alike\n")
    status, out = said(capsys, "diff", run, run, "--rename", "layers_0=first")
    assert status == 1 and "extra    layers_0/w  float32[3] is only in the second" in out


def test_diff_with_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    kernels = {"up": np.ones((16, 32), np.float32), "down": np.ones((32, 16), np.float32)}
    tree = {"params": {k: {"kernel": v} for k, v in kernels.items()}}
    ckpt.save_safetensors(tmp_path / "w.safetensors", tree)
    args = ("diff", tmp_path / "w.safetensors", "--model", "tests.cli.subjects:pair")
    assert said(capsys, *args) == (0, "2 leaves alike (values not compared)\n")
    assert "error: --model takes the place" in said(capsys, *args, "--values")[1]
    assert said(capsys, "diff", tmp_path / "w.safetensors")[0] == 2


def test_verify(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out = said(capsys, "verify", run)
    assert status == 0 and out.startswith(f"{run / '2'}: ") and "all checksums right" in out
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.ones(9000)})
    path = next((tmp_path / "1" / "state" / "d").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    status, out = said(capsys, "verify", tmp_path)
    assert status == 1 and f"damaged: {path} is damaged" in out and "damaged: leaf 'w'" in out
    (tmp_path / "1" / "MANIFEST.json").write_bytes(b"x")
    status, out = said(capsys, "verify", tmp_path, "--step", "1")
    assert status == 1 and "MANIFEST.json: it is not a manifest" in out


def test_wrong_questions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = said(capsys, "show", run, "--step", 7)
    assert status == 2 and "no committed step 7; it has: 1, 2" in out
    assert said(capsys, "convert", run, run)[0] == 2
    for rule in ("x", "=x", "x="):
        status, out = said(capsys, "diff", run, run, "--rename", rule)
        assert status == 2 and "write OLD=NEW" in out
    with pytest.raises(SystemExit) as caught:
        main(["ckpt", "destroy"])
    assert caught.value.code == 2


_SCRIPT = """
import sys
from shardflax.cli import main
for line in sys.argv[1].splitlines():
    status = main(["ckpt", *line.split()])
    print(">>>", line.split()[0], status)
"""


def test_nothing_needs_a_device(run: Path, tmp_path: Path) -> None:
    """There is no backend at all: whatever would initialise one fails."""
    run = shutil.copytree(run, tmp_path / "run")  # of which it cleans up
    lines = f"""ls {run}
show {run}
verify {run}
diff {run} {run}/1 --values
convert {run} {tmp_path}/w.safetensors
convert {tmp_path}/w.safetensors {tmp_path}/again --as-step 9
diff {run} {tmp_path}/again --values
gc {run}
gc {run} --yes
diff {run} --model tests.cli.subjects:pair
"""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, lines],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "none_such"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    ends = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(">>>")]
    statuses = [int(status) for _, status in ends]
    assert statuses == [0, 0, 0, 1, 0, 0, 0, 0, 0, 1], done.stdout
    assert "3.saving-dead-1" in done.stdout and "--yes removes it" in done.stdout
    assert not (run / "3.saving-dead-1").exists() and ckpt.verify_checkpoint(run).ok
