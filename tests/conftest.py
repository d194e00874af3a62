"""Fixtures for every test; `../conftest.py` has already set up the eight emulated devices."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Ranks and dtypes promote only where the code says so (opt in: `usefixtures`)."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def checking_leaks() -> Iterator[None]:
    """A tracer that outlives its trace is an error (opt in: slows tracing down)."""
    with jax.checking_leaks():
        yield
