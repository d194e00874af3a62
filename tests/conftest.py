"""Fixtures for every test; `../conftest.py` has already set up the eight emulated devices."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent

# The same examples in every run, and no limits of time: what passes here passes everywhere.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

# A shell starts what runs in its background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Ranks and dtypes promote only where the code says so (opt in: `usefixtures`)."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def checking_leaks() -> Iterator[None]:
    """A tracer that outlives its trace is an error (opt in: slows tracing down).

    JAX looks for it after each trace among all objects: those of earlier tests are hidden from it.
    """
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


@pytest.fixture
def start_local() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `launch.local`: `start_local(processes, devices, script, *args)`.

    Output comes in pipes.  What is still running when the test ends is killed.
    """
    started: list[subprocess.Popen[str]] = []

    def start(processes: int, devices: int, *command: str | Path, **kw: object):
        argv = ["-m", "launch.local", f"--processes={processes}", f"--devices={devices}", "--"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env, **kw}
        launcher = subprocess.Popen(
            [sys.executable, *argv, *map(str, command)],
            cwd=ROOT,
            text=True,
            start_new_session=True,
            **options,  # pyright: ignore[reportArgumentType, reportCallIssue]
        )
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()


@pytest.fixture
def run_local(start_local: Callable[..., subprocess.Popen[str]]):
    """Runs `launch.local` to its end: `run_local(processes, devices, script, *args)`.

    Gives a `subprocess.CompletedProcess` with the output as text; `timeout` in seconds.
    """

    def run(*args: object, timeout: float = 600.0, **kw: object) -> subprocess.CompletedProcess:
        launcher = start_local(*args, **kw)
        out, err = launcher.communicate(timeout=timeout)
        return subprocess.CompletedProcess(launcher.args, launcher.returncode, out, err)

    return run
