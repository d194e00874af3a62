"""Default logical names: which name a dim has when the user said nothing.

A layer has a name for each dim of each parameter and of its output.  The defaults follow one
another: a bias has the names of the kernel's output dims, and an output has the activation names
of the same dims, so that naming the kernel is enough.

Default names of parameters are as strict as written ones: a parameter's layout is decided once,
and an error says what to write.  Default names of *outputs* are advice: the layer guesses what
the dims of its input mean, so where the guess does not fit (a rule that does not exist, a size
that does not divide) that dim is left to the compiler.  What the user writes is never overruled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import PartitionSpec

from shardflax import partitioning
from shardflax.nn.types import Names
from shardflax.partitioning import default_names
from shardflax.partitioning.defaults import DefaultNames, in_force
from shardflax.partitioning.override_lookup import is_overridden
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.scope import free_axes, mesh_in_scope, rules_in_scope

FOLLOW = default_names("batch", ..., "act_mlp")
"""The output names of a linear layer that was given none: they follow its kernel."""

RESIDUAL = default_names("batch", "norm_length", "act_embed")
"""The residual stream, whose length has a name of its own: sequence parallelism shards it."""

_ACTIVATIONS = {
    "embed": "act_embed",
    "vocab_embed": "act_embed",
    "mlp": "act_mlp",
    "heads": "act_heads",
    "kv_heads": "act_kv_heads",
    "head_dim": "act_head_dim",
    "vocab": "act_vocab",
    None: None,
}


def is_default(names: Names | None) -> bool:
    """True for names that nobody wrote: a layer's own guess."""
    return isinstance(names, DefaultNames)


def silent(names: Names | None) -> bool:
    """True for names of which nothing comes: none, or default ones where no rules are in scope."""
    return names is None or (isinstance(names, DefaultNames) and rules_in_scope() is None)


def kernel_names(n_in: int, n_out: int, n_batch: int = 0) -> Names:
    """Default names of a kernel of `n_batch + n_in + n_out` dims.

    One input dim is the model's width, `embed`.  Several (heads and their depth) are the inner
    side of a projection back, whose output is `embed`.
    """
    back = n_in > 1 and n_out == 1
    first, then = ("mlp", "embed") if back else ("embed", "mlp")
    ins = [first, *[None] * (n_in - 1)][:n_in]
    outs = [then, *[None] * (n_out - 1)][:n_out]
    return default_names(*[None] * n_batch, *ins, *outs)


def like_kernel(names: Names | None, kernel: Names, dims: Sequence[int]) -> Names:
    """The names of a bias: its own, or by default those of `dims` of the kernel."""
    if names is not None and not is_default(names):
        return names
    # Names of the wrong rank are the kernel's problem, which is told by its path.
    picked = [kernel[d] if -len(kernel) <= d < len(kernel) else None for d in dims]
    return default_names(*picked) if is_default(kernel) else tuple(picked)


def activation_names(ndim: int, features: Sequence[Any]) -> Names | None:
    """Default names of an activation of `ndim` dims that ends in dims of kernel names `features`.

    Before the features stand nothing, a batch dim, or batch and length; anything else is not
    guessed at.
    """
    return _activation_names(ndim, tuple(features))


@lru_cache(maxsize=1024)
def _activation_names(ndim: int, features: tuple[Any, ...]) -> Names | None:
    if any(f not in _ACTIVATIONS for f in features):
        return None
    acts = [_ACTIVATIONS[f] for f in features]
    length = "norm_length" if acts == ["act_embed"] else "length"
    leading = {1: ["batch"], 2: ["batch", length]}.get(ndim - len(acts))
    return None if leading is None else default_names(*leading, *acts)


def output(x: jax.Array, names: Names | None, features: Sequence[Any] | None = None) -> jax.Array:
    """`x` laid out as `names` say.

    `features` are the kernel's names of the last dims of `x`; they are what `FOLLOW` follows.
    """
    return x if silent(names) else partitioning.constrain(x, said(x.shape, names, features))


def said(
    shape: tuple[int, ...], names: Names | None, features: Sequence[Any] | None = None
) -> Names | None:
    """What `names` say of an output of `shape`, None if nothing: see `output`."""
    if names is None or not is_default(names):
        return names
    rules = rules_in_scope()
    if not isinstance(rules, AxisRules) or is_overridden(rules):
        return None  # a guess yields to what is said by path
    if features is not None and names == FOLLOW:
        names = activation_names(len(shape), features)
    found = in_force(names, len(shape), rules)
    if found is None:
        return None
    fitting = _fitting(found, rules, shape)
    return None if all(n is PartitionSpec.UNCONSTRAINED for n in fitting) else fitting


def _fitting(names: tuple[Any, ...], rules: AxisRules, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """`names` with every dim that cannot have its name left to the compiler."""
    mesh = mesh_in_scope()
    axes = None if mesh is None else free_axes(mesh)
    while problems := resolve(names, rules, shape, axes).problems:
        bad = {p.dim for p in problems}
        if None in bad:
            return (PartitionSpec.UNCONSTRAINED,) * len(names)
        names = tuple(
            PartitionSpec.UNCONSTRAINED if dim in bad else name for dim, name in enumerate(names)
        )
    return names
