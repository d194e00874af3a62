"""Initializers draw JAX's numbers, and compare by what they draw."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardflax.nn import initializers as ours

CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("constant", (3,), {}),
    ("constant", (np.arange(4.0),), {}),
    ("uniform", (), {}),
    ("normal", (0.02,), {"dtype": jnp.bfloat16}),
    ("truncated_normal", (0.5,), {"lower": -1.0}),
    ("variance_scaling", (2.0, "fan_avg", "normal"), {"in_axis": [0, 1], "out_axis": -1}),
    ("lecun_normal", (), {"batch_axis": (0,)}),
    ("lecun_uniform", (), {}),
    ("glorot_normal", (), {}),
    ("glorot_uniform", (), {}),
    ("xavier_normal", (), {}),
    ("xavier_uniform", (), {}),
    ("he_normal", (), {}),
    ("he_uniform", (), {}),
    ("kaiming_normal", (), {}),
    ("kaiming_uniform", (), {}),
    ("orthogonal", (), {"scale": 2.0}),
    ("delta_orthogonal", (), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_numbers_are_jax_s(name: str, args: Any, kwargs: Any) -> None:
    mine = getattr(ours, name)(*args, **kwargs)
    theirs = getattr(jax.nn.initializers, name)(*args, **kwargs)
    key, shape = jax.random.key(1), (3, 2, 4)
    half = jnp.float32 if "orthogonal" in name else jnp.float16  # QR has no half precision
    for dtype in ((), (half,)):
        found, expected = mine(key, shape, *dtype), theirs(key, shape, *dtype)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    again = getattr(ours, name)(*args, **kwargs)
    assert mine == again and hash(mine) == hash(again)


def test_different_recipes_differ() -> None:
    assert ours.constant(1) != ours.constant(1.0)
    assert ours.constant(np.ones(2)) != ours.constant(np.ones(2)), "arrays compare by identity"
    assert ours.lecun_normal() != ours.lecun_uniform()
    assert ours.normal(0.1) != ours.truncated_normal(0.1)


def test_the_namespace_is_complete() -> None:
    assert set(ours.__all__) - {"Initializer"} >= {name for name, _, _ in CASES}
    assert ours.zeros_init() is ours.zeros is jax.nn.initializers.zeros
    assert ours.ones_init() is ours.ones is jax.nn.initializers.ones
