"""Rows about tracing: Python that runs once per compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import raw
from benchmarks.models import SIZES, count_body_traces, linen_models
from benchmarks.report import Row
from benchmarks.timing import calls_of, cpu_time, in_turn

__all__ = ["rows", "traced"]


def rows(ours: Any, flax: Any, rounds: int) -> list[Row]:
    """The rows of the table about tracing; `ours` and `flax` are the two namespaces."""
    models = {"ours": linen_models(ours), "flax": linen_models(flax)}
    x = jnp.ones((SIZES.batch, SIZES.length, SIZES.width))
    key = jax.random.key(0)
    out: list[Row] = []
    for kind, apply_budget, init_budget, apply_raw, init_raw in (
        ("Unrolled", 1.25, 1.25, _unrolled, raw.init_unrolled),
        ("Scanned", 1.5, 2.0, raw.scanned, raw.init_scanned),
    ):
        made = {name: getattr(space, kind)(SIZES) for name, space in models.items()}
        params = made["ours"].init(key, x)["params"]
        apply = {name: traced(_applied(model), params, x) for name, model in made.items()}
        apply["raw"] = traced(apply_raw, params, x)
        init = {name: traced(model.init_with_output, key, x) for name, model in made.items()}
        init["raw"] = traced(lambda k, x, f=init_raw: f(k, x, SIZES), key, x)
        text = f"24 {'unrolled' if kind == 'Unrolled' else 'scanned'} transformer blocks"
        over = "raw JAX" if kind == "Unrolled" else "a raw `lax.scan`"
        out.append(_row(f"trace `apply` of {text}, over {over}", apply_budget, apply, rounds))
        out.append(_row(f"trace `init` of {text}, over {over}", init_budget, init, rounds))
        if kind == "Unrolled":
            out.append(_calls(f"Python calls in these traces of {text}, over {over}", apply, init))
    return [*out, _body_traces(ours, flax)]


def _unrolled(params: Any, x: jax.Array) -> jax.Array:
    return raw.unrolled(params, x, SIZES)


def _applied(model: Any) -> Callable[..., Any]:
    return lambda params, x: model.apply({"params": params}, x)


def traced(fn: Callable[..., Any], *args: Any) -> Callable[[], object]:
    """A function that traces `fn` anew at each call: JAX caches by function."""
    return lambda: jax.jit(lambda *a: fn(*a)).trace(*args)


def _calls(what: str, apply: dict[str, Any], init: dict[str, Any]) -> Row:
    """The same as a figure that no noise touches; the contenders ran before, so caches are full."""
    counts = {
        name: [calls_of(side[name]) / calls_of(side["raw"]) for side in (apply, init)]
        for name in ("ours", "flax")
    }
    texts = {name: "; ".join(f"{x:.2f}" for x in pair) for name, pair in counts.items()}
    return Row(
        f"{what}: `apply`; `init`", 1.1, max(counts["ours"]), max(counts["flax"]), texts=texts
    )


def _row(what: str, budget: float, contenders: dict[str, Any], rounds: int) -> Row:
    taken = in_turn(contenders, rounds, cpu_time)
    return Row.of_ratio(what, budget, taken, over="raw")


def _body_traces(ours: Any, flax: Any) -> Row:
    counts = {
        name: [count_body_traces(space, depth) for depth in (1, 2, 3)]
        for name, space in (("ours", ours), ("flax", flax))
    }
    return Row(
        "body traces at scan depth 1 / 2 / 3, at `init`; at `apply`",
        budget=1,
        ours=max(max(pair) for pair in counts["ours"]),
        flax=max(max(pair) for pair in counts["flax"]),
        unit="traces",
        texts={name: _pairs(pairs) for name, pairs in counts.items()} | {"budget": "1 / 1 / 1"},
    )


def _pairs(pairs: list[tuple[int, int]]) -> str:
    at_init, at_apply = (" / ".join(map(str, side)) for side in zip(*pairs, strict=True))
    return f"{at_init}; {at_apply}"
