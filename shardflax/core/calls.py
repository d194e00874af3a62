"""Calls: what happens around each call of a module's method.

The module is put on a stack, so that submodules made meanwhile find their parent; names used by a
compact method are given back at its end; and every call goes through one chain of interceptors.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import jax

from shardflax.core.module_errors import CallCompactUnboundModuleError
from shardflax.core.staging import is_tracing

__all__ = [
    "InterceptorContext",
    "context",
    "current_module",
    "disable_named_call",
    "enable_named_call",
    "intercept_methods",
    "override_named_call",
    "run_setup",
    "trace_key",
    "wrap_method",
]


class _Context(threading.local):
    """The only thread-local state of the core."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.interceptors: list[Callable[..., Any]] = []
        self.named: bool | None = None  # what override_named_call says, if anything

    def __reduce__(self) -> str:
        return "context"  # wrapped methods that are pickled by value refer to the one that is here


context = _Context()


class _Defaults:
    """What holds for all threads."""

    named = True


def enable_named_call() -> None:
    """Lets the names of modules appear in profiles and in compiled programs: the default.

    Each operation is then compiled under a `jax.named_scope` per module around it.

    >>> enable_named_call()
    """
    _Defaults.named = True


def disable_named_call() -> None:
    """Leaves the names of modules out of profiles and compiled programs, in all threads.

    >>> disable_named_call()
    >>> enable_named_call()
    """
    _Defaults.named = False


@contextlib.contextmanager
def override_named_call(enable: bool = True) -> Generator[None]:
    """Within this context, and in this thread, names of modules appear in profiles or do not.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> def is_named():
    ...     call = jax.jit(
    ...         lambda k: nn.Dense(2, use_bias=False).apply({"params": {"kernel": k}}, k)
    ...     )
    ...     return "/Dense/dot_general" in call.lower(jnp.ones((2, 2))).compile().as_text()
    >>> with override_named_call(False):
    ...     print(is_named())
    False
    >>> is_named()
    True
    """
    outer, context.named = context.named, enable
    try:
        yield
    finally:
        context.named = outer


def current_module() -> Any:
    """The module whose method is running, or `None`.

    >>> print(current_module())
    None
    """
    return context.stack[-1] if context.stack else None


@dataclass(frozen=True)
class InterceptorContext:
    """What an interceptor is told of a call: the module, the method's name, the bound method.

    >>> InterceptorContext(None, "__call__", print).method_name
    '__call__'
    """

    module: Any
    method_name: str
    orig_method: Callable[..., Any]


@contextlib.contextmanager
def intercept_methods(interceptor: Callable[..., Any]) -> Generator[None]:
    """Within this context, method calls of modules go through `interceptor`.

    `interceptor(next_fun, args, kwargs, context)` returns what the call returns;
    `next_fun(*args, **kwargs)` goes on with the call, through interceptors set after this one.
    Calls of `setup` count.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> def shout(next_fun, args, kwargs, context):
    ...     print(type(context.module).__name__, context.method_name)
    ...     return next_fun(*args, **kwargs)
    >>> with intercept_methods(shout):
    ...     variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 2)))
    Dense __call__
    """
    context.interceptors.append(interceptor)
    try:
        yield
    finally:
        context.interceptors.pop()


def trace_key() -> Any:
    """What the tracing of a method depends on besides the module, to be compared by equality.

    >>> with intercept_methods(print):
    ...     trace_key() == trace_key(), trace_key()[0] == (print,)
    (True, True)
    """
    named = context.named
    return tuple(context.interceptors), _Defaults.named if named is None else named


def _intercepted(fn: Callable[..., Any], module: Any, /, *args: Any, **kwargs: Any) -> Any:
    call = functools.partial(fn, module)
    told = InterceptorContext(module, fn.__name__, call)
    for interceptor in reversed(context.interceptors):
        call = _link(interceptor, call, told)
    return call(*args, **kwargs)


def _link(
    interceptor: Callable[..., Any], call: Callable[..., Any], told: InterceptorContext
) -> Callable[..., Any]:
    return lambda *args, **kwargs: interceptor(call, args, kwargs, told)


def run_setup(module: Any) -> None:
    """Calls `setup`: the modules made in it find `module` on the stack, interceptors see it.

    >>> import shardflax.nn as nn
    >>> class Hello(nn.Module):
    ...     def setup(self):
    ...         print("in", type(current_module()).__name__)
    >>> nn.apply(lambda module: None, Hello())({})  # calls run_setup first
    in Hello
    """
    context.stack.append(module)
    try:
        if context.interceptors:
            _intercepted(module.__class__.setup, module)
        else:
            module.setup()
    finally:
        context.stack.pop()


def wrap_method(fn: Callable[..., Any], function_target: bool = False) -> Callable[..., Any]:
    """A method as modules have it; with `function_target`, a function that runs on a module."""
    compact = getattr(fn, "compact", False)
    name = getattr(fn, "__name__", "call")
    suffix = "" if name == "__call__" else f".{name}"
    if getattr(fn, "compact_name_scope", False):
        fn = _in_name_scope(fn, name)

    @functools.wraps(fn)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        local = context.__dict__  # this thread's, looked up once
        stack = local["stack"]
        if not stack:
            scope: Any = self.scope
            if scope is not None and scope.store.lock is not None:
                return _in_turn(method, self, args, kwargs)
        progress = self._progress
        if not progress.ready:
            self._prepare()
        outermost = compact and not progress.compact
        if outermost:
            if self.scope is None:
                raise CallCompactUnboundModuleError(type(self).__name__)
            progress.compact = True
        stack.append(self)
        call = fn
        if local["interceptors"] and not function_target:
            call = functools.partial(_intercepted, fn)
        named = local["named"]
        # One frame a call: each frame more is in the traceback that JAX takes of each operation.
        try:
            # Outside of any trace there is no program yet that could carry names.
            if (
                function_target
                or not is_tracing()
                or not (_Defaults.named if named is None else named)
            ):
                return call(self, *args, **kwargs)
            with jax.named_scope((self.name or self.__class__.__name__) + suffix):
                return call(self, *args, **kwargs)
        finally:
            stack.pop()
            if outermost:
                progress.compact = False
                node = self.scope.node
                if node.reserved or node.cursor:  # something to forget
                    node.rewind()

    vars(method)["wrapped"] = True
    return method


def _in_turn(method: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
    """A call from outside of a module that threads may share."""
    with module.scope.store.lock:
        context.stack.append(None)  # from now on it is one from inside
        try:
            return method(module, *args, **kwargs)
        finally:
            context.stack.pop()


def _in_name_scope(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`fn` with the submodules that it makes below `name`."""

    @functools.wraps(fn)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = self._name_scope(name)
        progress = place._progress
        outermost = not progress.compact
        progress.compact = True
        context.stack.append(place)
        try:
            return fn(self, *args, **kwargs)
        finally:
            context.stack.pop()
            if outermost:
                progress.compact = False
                place.scope.node.rewind()

    return inner
