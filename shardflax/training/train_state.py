"""The state of a training run with one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import optax

from shardflax import struct
from shardflax.core.boxes import is_box, rebox, unbox
from shardflax.core.frozen_dict import FrozenDict, freeze
from shardflax.training.errors import GradientShapeError

__all__ = ["OVERWRITE_WITH_GRADIENT", "TrainState", "join", "separate"]

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer state and step count, updated together by `apply_gradients`.

    `step` counts the updates; `apply_fn` (usually `model.apply`) and `tx` (an optax gradient
    transformation) are static.  Subclass it to add fields.

    `params` may hold boxes.  What the optimizer makes of them, leaf by leaf, is boxed as they are,
    so that moments have the names of their parameters.

    A collection named `"_overwrite_with_gradient"` beside `"params"` is not optimized: its
    "gradient" is its next value (quantisation scales are kept so).

    >>> import jax.numpy as jnp
    >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5))
    >>> state = state.apply_gradients(grads={"w": jnp.ones(2)})
    >>> state.step, state.params["w"].tolist()
    (1, [0.5, 0.5])
    """

    step: int | jax.Array
    apply_fn: Callable[..., Any] | None = struct.field(pytree_node=False)
    params: Any = struct.field(pytree_node=True)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    opt_state: Any = struct.field(pytree_node=True)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """The state after one update, with `step` one higher.

        `grads` has the structure of `params`, boxed or not; `opt_state` may be one that was made
        from plain parameters.  `kwargs` replace further fields.  Raises `GradientShapeError` where
        a gradient would change the shape of its parameter.

        >>> import jax.numpy as jnp
        >>> state = TrainState.create(apply_fn=None, params=jnp.ones(()), tx=optax.sgd(0.5))
        >>> float(state.apply_gradients(grads=jnp.ones(())).params)
        0.5
        """
        params = self.params
        if not _has_boxes(self.opt_state):
            params, grads = unbox(params), unbox(grads)
        elif not _has_boxes(grads):
            grads = rebox(params, grads)
        (trained, _), (updates, overwritten) = separate(params), separate(grads)
        updates, opt_state = self.tx.update(updates, self.opt_state, trained)
        updated = optax.apply_updates(trained, updates)
        _check_shapes(trained, updated)
        new = join(params, updated, overwritten)
        if params is not self.params:
            new = rebox(self.params, new)
        return self.replace(step=self.step + 1, params=new, opt_state=opt_state, **kwargs)

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any] | None,
        params: Any,
        tx: optax.GradientTransformation,
        **kwargs: Any,
    ) -> Self:
        """A state at step 0, with the optimizer state of the parameters.

        Boxes stay on both, so that their names can still be read.

        >>> import jax.numpy as jnp
        >>> TrainState.create(apply_fn=None, params=jnp.ones(2), tx=optax.sgd(0.1)).step
        0
        """
        trained, _ = separate(params)
        return cls(
            step=0, apply_fn=apply_fn, params=params, tx=tx, opt_state=tx.init(trained), **kwargs
        )


def _has_boxes(tree: Any) -> bool:
    """True if a leaf of the tree is in a box."""
    return any(is_box(x) for x in jax.tree.leaves(tree, is_leaf=is_box))


def _check_shapes(before: Any, after: Any) -> None:
    """Raises for a parameter whose shape has changed: optimizers broadcast."""
    others = jax.tree.leaves(after)
    for (path, x), y in zip(jax.tree.leaves_with_path(before), others, strict=True):
        if jnp.shape(x) != jnp.shape(y):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise GradientShapeError(where, jnp.shape(x), jnp.shape(y))


def separate(params: Any) -> tuple[Any, Any]:
    """Parameters, or gradients, as what is optimized and what is overwritten (None if nothing is).

    >>> separate({"params": 1, "_overwrite_with_gradient": 2}), separate({"w": 1})
    ((1, 2), ({'w': 1}, None))
    """
    if isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params:
        collections = cast("Mapping[str, Any]", params)
        return collections["params"], collections[OVERWRITE_WITH_GRADIENT]
    return params, None


def join(like: Any, trained: Any, overwritten: Any) -> Any:
    """What `separate` gave, as parameters like `like`: in a dict, or a FrozenDict.

    >>> join({}, 1, 2)
    {'params': 1, '_overwrite_with_gradient': 2}
    """
    if overwritten is None:
        return trained
    whole = {"params": trained, OVERWRITE_WITH_GRADIENT: overwritten}
    return freeze(whole) if isinstance(like, FrozenDict) else whole
