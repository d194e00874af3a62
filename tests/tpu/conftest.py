"""What the tests of the group `tpu` share: eight TPUs that are not there, and programs for them.

They need libtpu in `PYTHONPATH` (`make test` fetches it), and no TPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from shardflax.partitioning import tpu_topology


@pytest.fixture(scope="session")
def tpus() -> list[Any]:
    """The devices of a v5e slice of two by four chips."""
    return tpu_topology("v5e:2x4")


@pytest.fixture(scope="package", autouse=True)
def as_users_compile() -> Iterator[None]:
    """The suite compiles with few optimizations; what is compared here is what TPUs would run."""
    few = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", few)
