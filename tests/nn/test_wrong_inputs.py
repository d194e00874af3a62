"""Whatever a layer is fed with: it computes, or says in which module what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import shardflax.nn as nn
from shardflax.core.errors import FlaxError
from tests.nn.matrix import rows
from tests.nn.row import Row, arguments_of

WRONG: dict[str, Callable[[Any], Any]] = {
    "no dims": lambda x: x.reshape(-1)[0],
    "one dim": lambda x: x.reshape(-1)[: x.shape[-1]] if x.ndim else x,
    "a dim less": lambda x: x[0] if x.ndim else x,
    "a dim more": lambda x: x[None],
    "a wider last dim": lambda x: jnp.concatenate([x, x[..., :1]], axis=-1),
    "a longer first dim": lambda x: jnp.concatenate([x, x[:2]], axis=0),
}


class Model(nn.Module):
    """Calls a layer by the name `inner`, so that errors have a path to name."""

    inner: Any
    row: Row

    def __call__(self, *inputs: Any) -> Any:
        args, arrays = arguments_of(inputs)
        return self.inner(*args, **arrays, **self.row.call)


def wrong_inputs(inputs: Any) -> Iterator[tuple[str, Any]]:
    """The inputs with one array at a time made wrong in each way."""
    leaves, shape = jax.tree.flatten(inputs)
    for place, leaf in enumerate(leaves):
        for how, change in WRONG.items():
            changed = [*leaves[:place], change(jnp.asarray(leaf)), *leaves[place + 1 :]]
            yield f"array {place}: {how}", jax.tree.unflatten(shape, changed)


@rows()
def test_what_does_not_fit_is_said_with_the_module(row: Row) -> None:
    """With the parameters of the right inputs; of one row of each layer, with fresh ones too."""
    model = Model(row.build(), row)
    variables = jax.eval_shape(lambda: model.init(row.rngs(), *row.inputs()))

    def anew(variables: Any, *inputs: Any) -> Any:
        return model.init_with_output(row.rngs(), *inputs)[0]

    def known(variables: Any, *inputs: Any) -> Any:
        return model.apply(variables, *inputs, mutable=list(row.writes), rngs=row.drawn())[0]

    wrong = list(wrong_inputs(row.inputs()))
    raw = [
        f"{how}: {said}"
        for call in ([known] if row.further else [known, anew])
        for how, inputs in wrong
        if (said := unclear(call, (variables, *inputs))) is not None
    ]
    assert not raw, "\n".join(raw)


def unclear(call: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
    """What went wrong, where it is no error of ours that names the module."""
    try:
        jax.eval_shape(call, *args)
    except FlaxError as error:
        return None if "inner" in str(error) else f"without the path: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None
