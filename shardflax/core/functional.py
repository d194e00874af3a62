"""The functional core: `init`, `apply` and `bind` for plain functions of a scope.

Modules are built on the same runs; see `shardflax.core.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from shardflax.core import staging
from shardflax.core.errors import LazyInitError
from shardflax.core.frozen_dict import given_out
from shardflax.core.names import CollectionFilter, Names
from shardflax.core.scope import Scope, open_store

__all__ = ["apply", "bind", "changeable", "init", "known_variables", "lazy_init"]


def bind(
    variables: Mapping[str, Any],
    rngs: Any = None,
    mutable: CollectionFilter | Names = False,
    flags: Mapping[str, Any] | None = None,
) -> Scope:
    """The root scope of a new run, which goes on until it is invalidated.

    `rngs` is one key (the stream `params`) or a dict of streams to keys.  Collections that are
    `mutable` are copied (their dicts, not their arrays), the others shared.  `flags` are seen by
    every scope of the run.

    Raises `ApplyScopeInvalidVariablesTypeError` or `ApplyScopeInvalidVariablesStructureError`
    if `variables` is no dict of collections, `InvalidRngError` if `rngs` holds something else
    than keys.

    >>> bind({"params": {"w": 1.0}}).get_variable("params", "w")
    1.0
    """
    return Scope(open_store(variables, rngs, mutable, flags))


def changeable(scope: Scope) -> Any:
    """The collections that may change: also those that were passed in empty.

    >>> changeable(bind({"params": {"w": 1.0}, "state": {}}, mutable="state"))
    {'state': {}}
    """
    store = scope.store
    return given_out({c: t for c, t in store.collections.items() if c in store.mutable})


def apply(
    fn: Callable[..., Any],
    mutable: CollectionFilter = False,
    flags: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`fn(scope, *args)` as a pure function of `(variables, *args, rngs=None)`.

    Returns what `fn` returns; with `mutable`, also the collections that may change.

    >>> def scale(scope, x):
    ...     return x * scope.param("scale", lambda key: 2.0)
    >>> apply(scale)({"params": {"scale": 3.0}}, 2.0)
    6.0
    """

    def call(variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        with bind(variables, rngs, mutable, flags).temporary() as root:
            result = fn(root, *args, **kwargs)
            return (result, changeable(root)) if mutable is not False else result

    return call


def init(
    fn: Callable[..., Any],
    mutable: CollectionFilter = True,
    flags: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`fn(scope, *args)` as a pure function of `(rngs, *args)`: its result and the variables.

    >>> import jax
    >>> def scale(scope, x):
    ...     return x * scope.param("scale", lambda key: 2.0)
    >>> init(scale)(jax.random.key(0), 3.0)
    (6.0, {'params': {'scale': 2.0}})
    """

    def call(rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        with bind({}, rngs, mutable, {"initializing": True, **(flags or {})}).temporary() as root:
            return fn(root, *args, **kwargs), changeable(root)

    return call


def lazy_init(
    fn: Callable[..., Any],
    mutable: CollectionFilter = True,
    flags: Mapping[str, Any] | None = None,
) -> Callable[..., dict[str, Any]]:
    """`init` without the output, for arguments of which only the shapes need to be known.

    Arrays among the arguments may be given as `jax.ShapeDtypeStruct`; what only the output needs
    is not computed.  Raises `LazyInitError` if a variable depends on the values of such an
    argument.

    >>> import jax.numpy as jnp
    >>> def shift(scope, x):
    ...     return x + scope.param("shift", lambda key: jnp.zeros(x.shape))
    >>> variables = lazy_init(shift)(jax.random.key(0), jax.ShapeDtypeStruct((2,), "float32"))
    >>> variables["params"]["shift"].tolist()
    [0.0, 0.0]
    """
    both = init(fn, mutable, flags)

    def call(rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        def variables(*args: Any, **kwargs: Any) -> Any:
            return both(rngs, *args, **kwargs)[1]

        return known_variables(variables, *args, **kwargs)

    return call


def known_variables(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The variables that `fn` makes, some arrays of whose arguments are `jax.ShapeDtypeStruct`.

    Raises `LazyInitError` if a variable depends on the values of such an argument.

    >>> x = jax.ShapeDtypeStruct((2,), "float32")
    >>> known_variables(lambda x: {"params": {"n": jax.numpy.full((), x.ndim)}}, x)
    {'params': {'n': Array(1, dtype=int32, weak_type=True)}}
    """
    found = staging.known(fn, *args, **kwargs)
    for path, leaf in staging.jx.tree.leaves_with_path(found):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            keystr = staging.jx.tree_util.keystr
            raise LazyInitError(keystr(path, simple=True, separator="/"))
    return found
