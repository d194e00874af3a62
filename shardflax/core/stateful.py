"""What a module does with the state of its run: the part of `Module` that needs a scope alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from shardflax.core.cross import Crossable
from shardflax.core.errors import NameInUseError
from shardflax.core.frozen_dict import given_out
from shardflax.core.module_errors import (
    DeclareOutsideOfCompactError,
    PerturbationNotFoundError,
    UnboundModuleError,
)
from shardflax.core.scope import Scope
from shardflax.core.staging import jx
from shardflax.core.variable import Variable

__all__ = ["Progress", "Stateful"]


class Progress:
    """How far a module has got: the rest of its Python-side state is in the node of its scope.

    >>> Progress().ready
    False
    """

    # Of the class until they change: to make one then calls no function of Python.
    ready = False  # fields adopted and setup run
    setup = False  # in setup
    compact = False  # in a compact method
    children: dict[str, Any] | None = None


class Stateful(Crossable):
    """Methods that read and write variables, and draw keys, at the place of a module.

    >>> import shardflax.nn as nn
    >>> issubclass(nn.Module, Stateful)
    True
    """

    _progress: Progress

    # --- where

    def _bound(self) -> Scope:
        if self.scope is None:
            raise UnboundModuleError(type(self).__name__)
        return self.scope

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the root of the run to this module."""
        return self._bound().path

    @property
    def variables(self) -> dict[str, Any]:
        """The collections of variables at and below this module."""
        scope = self._bound()
        found = {col: scope.collection(col) for col in scope.store.collections}
        return given_out({col: dict(tree) for col, tree in found.items() if tree})

    # --- state

    def param(
        self,
        name: str,
        init_fn: Callable[..., Any],
        *init_args: Any,
        unbox: bool = True,
        **init_kwargs: Any,
    ) -> Any:
        """The parameter `name`, made by `init_fn(key, *init_args, **init_kwargs)` at `init`.

        `unbox` takes it out of its box, if `init_fn` put it in one.  Raises
        `ScopeParamNotFoundError` or `ScopeParamShapeError` if the variables passed to `apply` do
        not fit.
        """
        return self._declares(name).param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)

    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., Any] | None = None,
        *init_args: Any,
        unbox: bool = True,
        **init_kwargs: Any,
    ) -> Variable:
        """The variable `name` of the collection `col`, made by `init_fn(*init_args)` if missing."""
        scope = self._declares(name)
        return scope.variable(col, name, init_fn, *init_args, unbox=unbox, **init_kwargs)

    def _declares(self, name: str) -> Scope:
        scope = self.scope or self._bound()
        if not (self._progress.compact or self._progress.setup):
            raise DeclareOutsideOfCompactError(name, scope.path_text)
        if isinstance(self.__dict__.get(name), Crossable):
            raise NameInUseError("variable", name, scope.path_text)
        return scope

    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        """The value of a variable, or `default`."""
        return self._bound().get_variable(col, name, default)

    def put_variable(self, col: str, name: str, value: Any) -> None:
        """Writes a variable."""
        self._bound().put_variable(col, name, value)

    def has_variable(self, col: str, name: str) -> bool:
        """True if the variable exists."""
        return self._bound().has_variable(col, name)

    def is_mutable_collection(self, col: str) -> bool:
        """True if variables of `col` may be written in this run."""
        return self._bound().is_mutable_collection(col)

    def is_initializing(self) -> bool:
        """True within `init`."""
        return bool(self._bound().store.flags.get("initializing", False))

    def has_rng(self, name: str) -> bool:
        """True if the run has the RNG stream `name`."""
        return self._bound().has_rng(name)

    def make_rng(self, name: str = "params") -> jax.Array:
        """A new key from the RNG stream `name`, or from `params` where the run has no such stream.

        Keys depend on the module's path and on how many were drawn there before.
        """
        return self._bound().make_rng(name)

    def sow(
        self,
        col: str,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = lambda old, new: old + (new,),  # noqa: RUF005
        init_fn: Callable[[], Any] = tuple,
    ) -> bool:
        """Stores `value` in a collection if that may change; tells whether it did.

        By default, values stored under one name form a tuple.
        """
        scope = self._bound()
        if not scope.is_mutable_collection(col):
            return False
        if scope.has_variable(col, name):
            old = scope.get_variable(col, name)
        else:
            scope.reserve(name, col)
            old = init_fn()
        scope.put_variable(col, name, reduce_fn(old, value))
        return True

    def perturb(self, name: str, value: Any, collection: str = "perturbations") -> Any:
        """`value`, plus a variable of zeros whose gradient is that of `value`.

        The variable is made at `init`.  Where `apply` gets no `collection`, nothing is added.
        Raises `PerturbationNotFoundError` if it gets one that does not have `name`.

        >>> import jax.numpy as jnp, shardflax.nn as nn
        >>> class Square(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return self.perturb("root", x) ** 2
        >>> variables = Square().init(jax.random.key(0), 3.0)
        >>> jax.grad(Square().apply)(variables, 3.0)["perturbations"]["root"].item()
        6.0
        """
        scope = self._bound()
        if not scope.has_variable(collection, name):
            if scope.is_mutable_collection(collection):
                scope.reserve(name, collection)
                scope.put_variable(collection, name, jx.tree.map(jx.numpy.zeros_like, value))
            elif collection not in scope.store.collections:
                return value
            else:
                found = scope.collection(collection)
                raise PerturbationNotFoundError(name, collection, scope.path_text, found)
        return jx.tree.map(jx.numpy.add, value, scope.get_variable(collection, name))
