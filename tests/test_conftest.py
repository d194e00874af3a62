"""The fixtures do what they promise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest


def test_eight_emulated_devices() -> None:
    assert [d.platform for d in jax.devices()] == ["cpu"] * 8


@pytest.mark.usefixtures("strict_promotion")
def test_strict_promotion_refuses_ranks_and_dtypes() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        _ = jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(Exception, match="promotion"):
        _ = jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)


@pytest.mark.usefixtures("checking_leaks")
def test_checking_leaks_finds_a_kept_tracer() -> None:
    kept: list[jax.Array] = []
    with pytest.raises(Exception, match=r"[Ll]eaked"):
        jax.jit(lambda x: kept.append(x * 2))(1.0)
    assert len(kept) == 1
