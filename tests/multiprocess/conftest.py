"""Fixtures for tests of which launchers and starts of programs are not the subject."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.multiprocess.quick import ROOT, Launcher, Nursery


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables: processes compile the same programs again and again; one of them does, then."""
    folder = tmp_path_factory.mktemp("compiled")
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


@pytest.fixture(scope="session")
def nursery(compiled: dict[str, str]) -> Iterator[Nursery]:
    """Starts programs at once, by itself or for `start_quick`."""
    nursery = Nursery({**os.environ, **compiled, "PYTHONPATH": str(ROOT)})
    yield nursery
    nursery.close()


@pytest.fixture
def start_quick(nursery: Nursery) -> Iterator[Callable[..., Launcher]]:
    """`start_local` of `tests/conftest.py`, without the time that it takes to import JAX."""
    started: list[Launcher] = []

    def start(*args: object) -> Launcher:
        started.append(nursery.start(*args))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for launcher in started:
        launcher.kill()


@pytest.fixture
def run_quick(nursery: Nursery) -> Callable[..., object]:
    """`run_local` of `tests/conftest.py`, without the time that it takes to import JAX."""
    return partial(nursery.run)
