"""Runs: `init` and `apply` as one thing, a module bound for a while to the state of one run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from shardflax.core.calls import context, intercept_methods
from shardflax.core.cross import Crossable
from shardflax.core.functional import bind, changeable, known_variables
from shardflax.core.module_errors import ApplyModuleInvalidMethodError, InvalidInstanceModuleError
from shardflax.core.names import CollectionFilter, DenyList, Names
from shardflax.core.scope import Scope

__all__ = ["INIT_MUTABLE", "apply", "init", "init_with_output", "lazy_init", "method_of"]

INIT_MUTABLE = DenyList("intermediates")  # what may change in init unless said otherwise


def method_of(module: Any, method: Any) -> Callable[..., Any]:
    """The function of a module that `method` means: a name, a method, a function, `None`.

    Raises `ApplyModuleInvalidMethodError` for anything else, `AttributeError` for a name that the
    module does not have.

    >>> import shardflax.nn as nn
    >>> method_of(nn.Dense(2), "__call__") is nn.Dense.__call__
    True
    """
    if not isinstance(module, Crossable):
        raise InvalidInstanceModuleError(module)
    if method is None:
        return _method_named(module, "__call__")
    if isinstance(method, str):
        return _method_named(module, method)
    if not callable(method):
        raise ApplyModuleInvalidMethodError(method, module)
    return getattr(method, "__func__", method)


def _method_named(module: Any, name: str) -> Callable[..., Any]:
    found = getattr(module.__class__, name, None)
    if callable(found):
        return found
    if not callable(getattr(module, name)):
        raise ApplyModuleInvalidMethodError(name, module)

    # A submodule in a field: that of the module which is bound.
    def call(bound: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(bound, name)(*args, **kwargs)

    return call


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _running(module: Any, scope: Scope, capture: Any) -> Generator[Any]:
    """The module, bound to `scope` for the length of a run.

    A context, not a function that calls: that would be one frame more in the traceback that JAX
    takes of each operation.
    """
    # Runs may be nested: the module of this one is no child of a module that is running outside.
    outer, context.stack = context.stack, []
    try:
        bound = module._bind_root(scope)
        keep = _is_call if capture is True else capture
        with intercept_methods(_Capture(keep)) if capture else _NOTHING:
            bound._prepare()
            yield bound
    finally:
        context.stack = outer
        scope.store.end()


def _is_call(module: Any, method_name: str) -> bool:
    return method_name == "__call__"


@dataclass(frozen=True)
class _Capture:
    """The interceptor that stores results: equal ones share what `jit` compiled."""

    keep: Callable[..., bool]

    def __call__(self, call: Any, args: Any, kwargs: Any, told: Any) -> Any:
        result = call(*args, **kwargs)
        if self.keep(told.module, told.method_name):
            told.module.sow("intermediates", told.method_name, result)
        return result


def apply(
    fn: Callable[..., Any],
    module: Any,
    mutable: CollectionFilter = False,
    capture_intermediates: Any = False,
) -> Callable[..., Any]:
    """`fn(module, *args)` as a pure function of `(variables, *args, rngs=None)`.

    Returns what `fn` returns; with `mutable`, also the collections that may change.
    `capture_intermediates` stores what methods return in the collection `intermediates`, which may
    then change: `True` for every `__call__`, or a predicate of module and method name.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> dense = nn.Dense(2)
    >>> variables = dense.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> apply(lambda m, x: m(x) + 1, dense)(variables, jnp.ones((1, 3))).shape
    (1, 2)
    """

    def call(variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        names = Names.of(mutable)
        if capture_intermediates:
            names = names | Names.of("intermediates")
        scope = bind(variables, rngs, names)
        with _running(module, scope, capture_intermediates) as bound:
            result = fn(bound, *args, **kwargs)
        returned = mutable is not False or capture_intermediates
        return (result, changeable(scope)) if returned else result

    return call


def init_with_output(
    fn: Callable[..., Any],
    module: Any,
    mutable: CollectionFilter = INIT_MUTABLE,
    capture_intermediates: Any = False,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`fn(module, *args)` as a pure function of `(rngs, *args)`: its result and the variables.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> make = init_with_output(lambda m, x: m(x), nn.Dense(2))
    >>> y, variables = make(jax.random.key(0), jnp.ones((1, 3)))
    """

    def call(rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        names = Names.of(mutable)
        if capture_intermediates:
            names = names | Names.of("intermediates")
        scope = bind({}, rngs, names, {"initializing": True})
        with _running(module, scope, capture_intermediates) as bound:
            result = fn(bound, *args, **kwargs)
        return result, changeable(scope)

    return call


def init(
    fn: Callable[..., Any],
    module: Any,
    mutable: CollectionFilter = INIT_MUTABLE,
    capture_intermediates: Any = False,
) -> Callable[..., dict[str, Any]]:
    """`init_with_output` without the output.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> make = init(lambda m, x: m(x), nn.Dense(2))
    >>> sorted(make(jax.random.key(0), jnp.ones((1, 3)))["params"])
    ['bias', 'kernel']
    """
    both = init_with_output(fn, module, mutable, capture_intermediates)

    def call(rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return both(rngs, *args, **kwargs)[1]

    return call


def lazy_init(
    fn: Callable[..., Any], module: Any, mutable: CollectionFilter = INIT_MUTABLE
) -> Callable[..., dict[str, Any]]:
    """`init` for arguments of which only the shapes need to be known.

    Arrays among the arguments may be given as `jax.ShapeDtypeStruct`; what only the output needs
    is not computed.  Raises `LazyInitError` if a variable depends on the values of such an
    argument.

    >>> import jax, shardflax.nn as nn
    >>> make = lazy_init(lambda m, x: m(x), nn.Dense(2))
    >>> variables = make(jax.random.key(0), jax.ShapeDtypeStruct((10**9, 3), "float32"))
    >>> variables["params"]["kernel"].shape
    (3, 2)
    """
    make = init(fn, module, mutable)

    def call(rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return known_variables(functools.partial(make, rngs), *args, **kwargs)

    return call
