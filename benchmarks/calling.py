"""Rows about calls: what a module, an eager layer and a jitted step cost each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.models import linen_models
from benchmarks.report import Row
from benchmarks.timing import Rounds, cpu_time, in_turn
from shardflax.training.train_state import TrainState

__all__ = ["rows"]


def rows(ours: Any, flax: Any, rounds: int) -> list[Row]:
    """The rows of the table about calls; `ours` and `flax` are the two namespaces."""
    # These contenders take milliseconds: many short rounds are the best cure for noise.
    return [
        _noop(ours, flax, 4 * rounds),
        *_dispatch(ours, flax, 10 * rounds),
        _eager(ours, flax, 10 * rounds),
    ]


def _noop(ours: Any, flax: Any, rounds: int, count: int = 100, calls: int = 5) -> Row:
    contenders: dict[str, Callable[[], object]] = {}
    for name, space in (("ours", ours), ("flax", flax)):
        models = linen_models(space)
        for children in (0, count):
            model = models.Children(children)
            # Several in a row: the first finds caches of the processor full of something else.
            apply = lambda model=model: model.apply({}, 1.0)  # noqa: E731
            contenders[f"{name} {children}"] = _repeated(apply, calls)
    taken = in_turn(contenders, rounds, cpu_time)
    ours_us, flax_us = (
        taken.extra(f"{name} {count}", f"{name} 0") / (calls * count) * 1e6
        for name in ("ours", "flax")
    )
    text = "a submodule that does nothing, made and called"
    return Row(text, 15, ours_us, flax_us, unit="us", detail={"rounds": rounds})


def _eager(ours: Any, flax: Any, rounds: int, calls: int = 5) -> Row:
    x = jnp.ones((8, 16))
    layers = {"ours": ours.Dense(16), "flax": flax.Dense(16)}
    variables = layers["ours"].init(jax.random.key(0), x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    contenders = {
        name: _repeated(lambda layer=layer: layer.apply(variables, x), calls)
        for name, layer in layers.items()
    }
    contenders["raw"] = _repeated(lambda: x @ kernel + bias, calls)
    taken = in_turn(contenders, rounds, cpu_time)
    return Row.of_ratio("eager `Dense.apply`, over `x @ k + b`", 15, taken, over="raw")


def _repeated(fn: Callable[[], Any], calls: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(calls):
            y = fn()
        jax.block_until_ready(y)

    return run


# --- dispatch


class _Around(NamedTuple):
    """The least that a node made by Python can be: what boxes cost is measured beside it."""

    value: Any


def _dispatch(ours: Any, flax: Any, rounds: int, leaves: int = 400) -> list[Row]:
    """A jitted step over a tree of parameters, in boxes, and as plain arrays in a train state."""
    plain = {f"layer_{i}": {"kernel": jnp.ones((4, 4))} for i in range(leaves)}
    raw = {"params": plain, "step": jnp.int32(0)}

    def boxed(box: Any) -> Any:
        return jax.tree.map(lambda x: box(x, ("embed", "mlp")), raw["params"])

    states = {
        "raw": raw,
        "ours": {**raw, "params": boxed(ours.LogicallyPartitioned)},
        "flax": {**raw, "params": boxed(flax.LogicallyPartitioned)},
        "namedtuple": {**raw, "params": jax.tree.map(_Around, raw["params"])},
    }
    with_boxes = in_turn({n: _looped(_step, s) for n, s in states.items()}, rounds, cpu_time)
    state = TrainState(step=raw["step"], apply_fn=_step, params=plain, tx=None, opt_state=())  # pyright: ignore[reportArgumentType]
    loops = {"ours": _copies(_state_step, state)}
    loops |= {name: _copies(_step, raw) for name in ("raw", "again")}  # two that are equal
    without = in_turn(loops, 4 * rounds, cpu_time)  # what there is to find is less than a percent
    text = f"dispatch of a jitted step over {leaves} leaves, over raw dicts"
    beside = f"dispatch over {leaves} leaves in boxes, over leaves in a `NamedTuple` each"
    return [
        Row.of_ratio(f"{text}: boxed", 1.25, with_boxes, over="raw"),
        Row.of_ratio(beside, 1.0, with_boxes, over="namedtuple"),
        _beside_noise(
            Row.of_ratio(f"{text}: a plain `TrainState`", 1.0, without, over="raw"), without
        ),
    ]


def _beside_noise(row: Row, taken: Rounds) -> Row:
    """The row, which says what raw dicts take over raw dicts, too: so much of it is noise."""
    noise = f"{taken.ratio('again', 'raw'):.2f}"
    return replace(row, texts={"ours": f"{row.text('ours')} (raw dicts: {noise})"})


def _step(state: Any) -> Any:
    return jax.tree.map(lambda x: x + 1, state)


def _state_step(state: Any) -> Any:
    return state.replace(step=state.step + 1, params=_step(state.params))


def _copies(step: Callable[[Any], Any], state: Any, copies: int = 8) -> Callable[[], object]:
    """`_looped` on copies of a state: where its arrays lie in memory is worth some percent."""
    loops = [_looped(step, jax.tree.map(jnp.copy, state)) for _ in range(copies)]
    return lambda: [run() for run in loops]


def _looped(step: Callable[[Any], Any], state: Any, steps: int = 3) -> Callable[[], object]:
    """Some steps in a row, each on what the last one gave, as in a train loop."""
    jitted = jax.jit(step)

    def run() -> None:
        now = state
        for _ in range(steps):
            now = jitted(now)
        jax.block_until_ready(now)

    return run
