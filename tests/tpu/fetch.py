"""Fetches the compiler for TPUs (libtpu) into a folder, for `make test` and `make bench`.

    python -m tests.tpu.fetch .venv-3.11/libtpu

The folder is beside the packages of the environment, not among them: there, JAX would look for a
TPU at each start.  Says in one line what happened and never fails; without the folder the tests of
the group `tpu` do not run, and `make bench` lacks a row.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from shardflax.partitioning.topology import libtpu_requirement

__all__ = ["fetch"]

_SECONDS = 600  # for 130 MB
_LEFT_OUT = "what takes it (tests of the group tpu, a row of the benchmarks) is left out"


def fetch(folder: Path, seconds: float = _SECONDS) -> str:
    """Has the libtpu that fits the installed jax in `folder`, or nothing; says which, and why."""
    wanted = libtpu_requirement()
    note = folder / "fetched.txt"
    if note.exists() and note.read_text(encoding="utf-8") == wanted:
        return f"libtpu: {wanted} is in {folder}"
    here = f"{platform.system()} {platform.machine()}"
    if here != "Linux x86_64":
        return f"libtpu: there is none for {here}: {_LEFT_OUT}"
    try:
        problem = _install(folder, wanted, seconds)
        if problem:
            return f"libtpu: {wanted} cannot be installed: {_LEFT_OUT}: {problem}"
        note.write_text(wanted, encoding="utf-8")
    except OSError as error:
        return f"libtpu: {folder} cannot be written: {_LEFT_OUT}: {error}"
    return f"libtpu: {wanted} was installed into {folder}"


def _install(folder: Path, wanted: str, seconds: float) -> str:
    """Installs into a folder beside, which then takes the name; what went wrong, or nothing."""
    new = folder.with_name(f"{folder.name}.new")
    for old in (new, folder):
        shutil.rmtree(old, ignore_errors=True)
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries=2",
        "--timeout=15",
    ]
    what = ["--no-deps", "--no-compile", "--only-binary=:all:", "--target", str(new), wanted]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *what],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode == 0:
            new.rename(folder)
            return ""
        problem = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
    except subprocess.TimeoutExpired:
        problem = f"pip took more than {seconds:.0f} s"
    shutil.rmtree(new, ignore_errors=True)
    return problem


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])), flush=True)
