"""What the tests of this folder share: a mesh, rules, and how a refusal is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardflax.partitioning import Layout, abstract_layout, make_mesh, preset

MESH, RULES = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")


def layout_of(model: Any, rules: Any = RULES, mesh: Any = MESH) -> Layout:
    """The layout of a module's variables, abstractly, for an input of (2, 8)."""
    key = jax.random.key(0)
    return abstract_layout(lambda k: model.init(k, jnp.ones((2, 8))), key, mesh=mesh, rules=rules)


def refused(call: Callable[[], Any], error: type[Exception], *parts: str) -> None:
    """`call` raises `error` itself, and its text (with its notes) has every one of `parts`."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert [part for part in parts if part not in text] == [], text
