"""Topologies of TPUs, with libtpu and without; and how `make test` fetches it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from shardflax.cli import main
from shardflax.partitioning import (
    LibtpuError,
    LockEntry,
    UnknownTopologyError,
    libtpu_requirement,
    tpu_topology,
    write_lock,
)
from shardflax.partitioning.slices import slice_of
from tests.tpu import fetch

ROOT = Path(__file__).parent.parent.parent


def without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardflax.partitioning.topology.libtpu_version", lambda: None)


WRONG = {
    "v5e-8": "no TPU topology 'v5e-8'. Write a generation and its chips",
    "v5e:8": "no TPU topology 'v5e:8'. Write a generation and its chips",
    "v6:2x4": "did you mean 'v6e:2x4'?",
}


@pytest.mark.parametrize("name", WRONG)
def test_names_are_read_before_libtpu_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_libtpu(monkeypatch)
    with pytest.raises(UnknownTopologyError) as error:
        tpu_topology(name)
    assert WRONG[name] in str(error.value)
    with pytest.raises(UnknownTopologyError, match="there is at least one"):
        tpu_topology("v5e:2x4", slices=0)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_libtpu(monkeypatch)
    with pytest.raises(LibtpuError) as error:
        tpu_topology("v5e:2x4")
    wanted = libtpu_requirement()
    assert f"pip install --no-deps --target tpulib '{wanted}'" in str(error.value)
    assert f'{wanted}; extra == "tpu"' in (metadata.requires("jax") or ())


def test_lock_refuses_without_libtpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    without_libtpu(monkeypatch)
    asked = {"model": "tiny", "mesh": "fsdp=8", "preset": "fsdp", "topology": "v5e:2x4"}
    entry = LockEntry("fsdp=8", "fsdp", 0, {}, asked=asked)
    file = write_lock(tmp_path / "shardflax.lock", {"mine": entry})
    assert main(["lock", "--file", str(file), "--check"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: mine is compiled for TPUs (v5e:2x4): ")
    assert "is not installed" in err and "pip install" in err
    assert main(["lock", "tiny", "--mesh", "fsdp=8", "--topology", "v5e:2x4"]) == 2
    both = ["--topology", "v5e:2x4", "--no-collectives"]
    capsys.readouterr()
    assert main(["lock", "tiny", "--mesh", "fsdp=8", *both]) == 2
    assert "Leave one of them out" in capsys.readouterr().err


# --- with libtpu


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "slices", "number", "kind"),
    [
        ("v5e:1x1", 1, 1, "TPU v5 lite"),
        ("v5e:2x4", 2, 16, "TPU v5 lite"),
        ("v4:2x2x2", 1, 16, "TPU v4"),  # two cores a chip
        ("v5p:4x4x8", 1, 128, "TPU v5"),
        ("v6e:16x16", 1, 256, "TPU v6 lite"),
        ("tpu7x:2x2x1", 1, 8, "TPU7x"),
    ],
)
def test_generations(name: str, slices: int, number: int, kind: str) -> None:
    devices = tpu_topology(name, slices)
    assert (len(devices), devices[0].device_kind) == (number, kind)
    assert len({slice_of(device) for device in devices}) == slices


@pytest.mark.tpu
def test_chips_that_no_host_has_are_refused() -> None:
    with pytest.raises(UnknownTopologyError, match="'v5e:3x3': libtpu says: INVALID_ARGUMENT"):
        tpu_topology("v5e:3x3")


SIDE_BY_SIDE = """
from shardflax.partitioning import tpu_topology
print(len(tpu_topology("v5e:2x2")))
"""


@pytest.mark.tpu
def test_processes_compile_side_by_side() -> None:
    """libtpu locks a file of the host: it is held here, and another process goes on anyway."""
    tpu_topology("v5e:2x4")
    env = {k: v for k, v in os.environ.items() if k != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    argv = [sys.executable, "-c", SIDE_BY_SIDE]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


# --- how `make test` gets it


class Pip:
    """Stands in for a process that runs pip."""

    def __init__(self, problem: str = "") -> None:
        self.problem, self.calls = problem, 0

    def __call__(self, argv: list[str], **_: Any) -> Any:
        self.calls += 1
        if not self.problem:
            Path(argv[argv.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(argv, bool(self.problem), "", self.problem)


def fetched(
    monkeypatch: pytest.MonkeyPatch, folder: Path, pip: Pip, machine: str = "x86_64"
) -> str:
    monkeypatch.setattr(fetch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(fetch.platform, "machine", lambda: machine)
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return fetch.fetch(folder)


def test_it_is_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip, folder = Pip(), tmp_path / "libtpu"
    assert "was installed" in fetched(monkeypatch, folder, pip) and folder.is_dir()
    assert f"{libtpu_requirement()} is in" in fetched(monkeypatch, folder, pip)
    assert pip.calls == 1
    (folder / "fetched.txt").write_text("libtpu==0.0.1.*")  # for the jax that was there before
    assert "was installed" in fetched(monkeypatch, folder, pip) and pip.calls == 2


def test_what_cannot_be_fetched_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pip, folder = Pip("WARNING: retrying\nERROR: No matching distribution found"), tmp_path / "lib"
    said = fetched(monkeypatch, folder, pip)
    assert "is left out: ERROR: No matching distribution found" in said
    assert "\n" not in said and list(tmp_path.iterdir()) == []
    said = fetched(monkeypatch, folder, pip, "aarch64")
    assert said == f"libtpu: there is none for Linux aarch64: {fetch._LEFT_OUT}"
    assert pip.calls == 1
    # What was there for another jax is gone: its compiler would not fit.
    folder.mkdir()
    assert "left out" in fetched(monkeypatch, folder, pip) and not folder.exists()
