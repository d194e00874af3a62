"""What tracing costs beside hand-written JAX, in calls of Python, which no busy machine disturbs.

The benchmarks take times (`benchmarks/tracing.py`); of those nothing can be asserted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import shardflax.nn as nn
from benchmarks import raw
from benchmarks.models import Sizes, linen_models
from benchmarks.timing import calls_of
from benchmarks.tracing import traced

SIZES = Sizes(blocks=2)
X = jnp.ones((SIZES.batch, SIZES.length, SIZES.width))
KEY = jax.random.key(0)
MODEL = linen_models(nn).Unrolled(SIZES)


def calls(fn: Callable[..., Any], *args: Any) -> int:
    trace = traced(fn, *args)
    trace()  # JAX and we find out once what holds for every trace
    return calls_of(trace)


def test_a_trace_of_apply_makes_few_calls_more_than_one_of_raw_jax() -> None:
    params = jax.eval_shape(MODEL.init, KEY, X)["params"]
    ours = calls(lambda p, x: MODEL.apply({"params": p}, x), params, X)
    by_hand = calls(lambda p, x: raw.unrolled(p, x, SIZES), params, X)
    assert 1 < ours / by_hand < 1.1


def test_a_trace_of_init_makes_few_calls_more_than_one_of_raw_jax() -> None:
    ours = calls(MODEL.init_with_output, KEY, X)
    by_hand = calls(lambda k, x: raw.init_unrolled(k, x, SIZES), KEY, X)
    assert 1 < ours / by_hand < 1.1
