"""Module: a dataclass of hyperparameters whose methods compute with the state of a run.

A module is *unbound* until `init`, `apply` or `bind` gives it a scope.  Submodules are named by
where they are made: after the attribute they are assigned to in `setup`, automatically in a
compact method, after the field when they are passed in.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform

import jax

from shardflax.core import run
from shardflax.core.calls import context, run_setup, wrap_method
from shardflax.core.cross import Crossable
from shardflax.core.errors import (
    AssignSubModuleError,
    CallCompactUnboundModuleError,
    CallUnbindOnUnboundModuleError,
    DeclareOutsideOfCompactError,
    IncorrectPostInitOverrideError,
    MultipleMethodsCompactError,
    NameInUseError,
    ReservedModuleAttributeError,
    SetAttributeFrozenModuleError,
    SetAttributeInModuleSetupError,
)
from shardflax.core.functional import bind
from shardflax.core.names import CollectionFilter
from shardflax.core.scope import Scope, Variable

__all__ = ["Module", "compact", "nowrap"]

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound="Module")


class _Unset:
    def __repr__(self) -> str:
        return "<the module being run>"


_UNSET = _Unset()


def compact(fun: F) -> F:
    """Marks the method of a module that may make its submodules where they are used.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class MLP(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))
    >>> sorted(MLP().init(jax.random.key(0), jnp.ones((1, 3)))["params"])
    ['Dense_0', 'Dense_1']
    """
    fun.compact = True  # pyright: ignore[reportFunctionMemberAccess]
    return fun


def nowrap(fun: F) -> F:
    """Marks a method that needs nothing of what happens around calls of a module's methods.

    >>> import shardflax.nn as nn
    >>> class Scaled(nn.Module):
    ...     width: int
    ...
    ...     @nn.nowrap
    ...     def double(self):
    ...         return 2 * self.width
    >>> Scaled(3).double()
    6
    """
    fun.nowrap = True  # pyright: ignore[reportFunctionMemberAccess]
    return fun


class _Progress:
    """How far a module has got: the rest of its Python-side state is in the node of its scope."""

    __slots__ = ("compact", "ready", "setup")

    def __init__(self, compact: bool = False) -> None:
        self.ready = False  # fields adopted and setup run
        self.setup = False  # in setup
        self.compact = compact  # in a compact method


@dataclass_transform(kw_only_default=False, field_specifiers=(dataclasses.field,))
class _Typed:
    """Makes type checkers see modules as dataclasses."""


class Module(Crossable, _Typed):
    """The base class of all layers and models.

    Subclasses are dataclasses: their annotated attributes are hyperparameters.  They compute in
    `__call__` (or any method), and get parameters and submodules in `setup` or in a method marked
    `compact`.  `parent` and `name` are fields of every module, given by keyword; a module made in
    a method of another is its child, and `parent=None` makes it nobody's.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Scale(nn.Module):
    ...     features: int
    ...
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return x * self.param("scale", nn.initializers.ones, (self.features,))
    >>> model = Scale(features=3)
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> model.apply(variables, jnp.ones((2, 3))).shape
    (2, 3)
    """

    parent: Any = dataclasses.field(default=_UNSET, kw_only=True, repr=False, compare=False)
    name: str | None = dataclasses.field(default=None, kw_only=True)

    scope = None
    _progress: ClassVar[_Progress]

    # --- classes

    def __init_subclass__(cls, kw_only: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for reserved in ("parent", "name"):
            if reserved in inspect.get_annotations(cls):
                raise ReservedModuleAttributeError(cls.__name__, reserved)
        _check_compact(cls)
        fields = {*inspect.get_annotations(cls), *getattr(cls, "__dataclass_fields__", ())}
        for name, value in list(cls.__dict__.items()):
            if name not in fields and _is_method(name, value):
                setattr(cls, name, wrap_method(value))
        own_hash = "__hash__" in cls.__dict__
        own_repr = "__repr__" in cls.__dict__
        make = dataclasses.dataclass(repr=False, unsafe_hash=not own_hash, kw_only=kw_only)
        make(cls)
        if not own_repr:
            cls.__repr__ = _repr

    # --- construction

    def __post_init__(self) -> None:
        parent = self.parent
        if type(parent) is _Unset:
            parent = context.stack[-1] if context.stack else None
            self.__dict__["parent"] = parent
        self.__dict__["_progress"] = _Progress()
        if isinstance(parent, Module):
            parent._adopt_new(self)
        elif isinstance(parent, Scope):
            self.__dict__["scope"] = parent

    def _adopt_new(self, child: Module) -> None:
        """Takes a submodule that is being made in one of this module's methods."""
        progress = self._progress
        if child.name is not None and isinstance(self.__dict__.get(child.name), Module):
            raise NameInUseError("submodule", child.name, type(self).__name__)
        if progress.setup:
            if child.name is not None:
                self._bind_child(child, child.name)
        elif progress.compact:
            assert self.scope is not None
            self._bind_child(child, child.name or self.scope.auto_name(type(child).__name__))
        else:
            where = self.scope.path_text if self.scope is not None else type(self).__name__
            raise AssignSubModuleError(type(child).__name__, where)

    def _bind_child(self, child: Module, name: str) -> None:
        attrs = child.__dict__
        attrs["parent"], attrs["name"] = self, name
        if self.scope is None:
            return
        scope = self.scope
        scope.reserve(name)
        attrs["scope"] = scope.at(name)

    # --- preparation: fields are adopted, then setup runs, at the first call of a method

    def _prepare(self) -> None:
        """Adopts the modules in fields, and runs `setup` if the module is bound."""
        progress = self.__dict__.get("_progress")
        if progress is None:
            raise IncorrectPostInitOverrideError(type(self).__name__)
        if self.scope is None or progress.ready or progress.setup:
            return
        self._adopt_fields()
        if type(self).setup is not Module.setup:
            progress.setup = True
            try:
                run_setup(self)
            finally:
                progress.setup = False
        progress.ready = True

    def _adopt_fields(self) -> None:
        attrs = self.__dict__
        for name in _field_names(type(self)):
            value = attrs[name]
            if isinstance(value, _HOLDERS) and _holds_module(value):
                attrs[name] = self._adopt(name, value)

    def _adopt(self, name: str, value: Any) -> Any:
        """`value` with each unbound module in it made a child, named after its place."""
        if isinstance(value, Module):
            return self._adopt_module(name, value)
        return _map_items(value, lambda key, item: self._adopt(f"{name}_{key}", item))

    def _adopt_module(self, name: str, module: Module) -> Module:
        if module.scope is not None or self.scope is None:
            return module
        if module.parent is self:
            self._bind_child(module, name)
            return module
        # Made outside of any module: the run gets a copy, one for all places that share it.
        adopted = self.scope.store.adopted
        if id(module) not in adopted:
            copy = module.clone(parent=None, name=None)
            adopted[id(module)] = (module, copy)
            self._bind_child(copy, name)
        return adopted[id(module)][1]

    def setup(self) -> None:
        """Makes parameters and submodules of a module that is not compact; for subclasses."""

    # --- attributes

    def __setattr__(self, name: str, value: Any) -> None:
        progress = self.__dict__.get("_progress")
        if progress is None or self.scope is None:
            object.__setattr__(self, name, value)
        elif not progress.setup:
            raise SetAttributeFrozenModuleError(type(self).__name__, name)
        elif name in _field_names(type(self)):
            raise SetAttributeInModuleSetupError(type(self).__name__, name)
        else:
            value = self._adopt(name, value)
            object.__setattr__(self, name, _frozen_list(value))

    def __getattr__(self, name: str) -> Any:
        # Only called for what is not there: setup may be about to make it.
        progress = self.__dict__.get("_progress")
        if progress is not None and not name.startswith("__") and not progress.ready:
            self._prepare()
            if name in self.__dict__:
                return self.__dict__[name]
        hint = " If setup defines it: the module is not bound, see module.bind(variables)."
        hint = hint if self.scope is None else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.{hint}")

    def clone(self: M, *, parent: Any = None, **updates: Any) -> M:
        """A copy of the module, unbound unless `parent` says otherwise, with some fields replaced.

        >>> import shardflax.nn as nn
        >>> nn.Dense(2).clone(features=3).features
        3
        """
        fields = {name: self.__dict__[name] for name in _init_field_names(type(self))}
        return type(self)(**{**fields, **updates, "parent": parent})

    def copy(self: M, *, parent: Any = _UNSET, name: str | None = None, **updates: Any) -> M:
        """A copy of the module that becomes a child of the module being run.

        >>> import shardflax.nn as nn
        >>> nn.Dense(2).copy(name="out").name
        'out'
        """
        return self.clone(parent=parent, name=name, **updates)

    # --- where

    def _bound(self) -> Scope:
        if self.scope is None:
            raise CallCompactUnboundModuleError(type(self).__name__)
        return self.scope

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the root of the run to this module."""
        return self._bound().full_path

    @property
    def variables(self) -> dict[str, Any]:
        """The collections of variables at and below this module."""
        scope = self._bound()
        found = {col: scope.collection(col) for col in scope.store.collections}
        return {col: dict(tree) for col, tree in found.items() if tree}

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
        scope = self._bound()
        if not (self._progress.compact or self._progress.setup):
            raise DeclareOutsideOfCompactError(name, scope.path_text)
        if isinstance(self.__dict__.get(name), Module):
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
        reduce_fn: Callable[[Any, Any], Any] = lambda old, new: (*old, new),
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

    # --- runs

    def init_with_output(
        self,
        rngs: Any,
        *args: Any,
        method: Any = None,
        mutable: CollectionFilter = run.INIT_MUTABLE,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """What the module returns on `args`, and the variables that it made meanwhile."""
        fn = run.method_of(self, method)
        call = run.init_with_output(fn, self, mutable, capture_intermediates)
        return call(rngs, *args, **kwargs)

    def init(
        self,
        rngs: Any,
        *args: Any,
        method: Any = None,
        mutable: CollectionFilter = run.INIT_MUTABLE,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The variables of the module for inputs like `args`; `rngs` is a key or a dict of keys."""
        fn = run.method_of(self, method)
        return run.init(fn, self, mutable, capture_intermediates)(rngs, *args, **kwargs)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: CollectionFilter = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """What the module returns on `args`; with `mutable`, also the collections named there.

        `variables` are never changed.  Raises `ModifyScopeVariableError` if the module writes a
        collection that `mutable` does not name.
        """
        fn = run.method_of(self, method)
        call = run.apply(fn, self, mutable, capture_intermediates)
        return call(variables, *args, rngs=rngs, **kwargs)

    def bind(
        self: M,
        variables: Mapping[str, Any],
        *,
        rngs: Any = None,
        mutable: CollectionFilter = False,
    ) -> M:
        """The module with its variables, for interactive use: call its methods as they are."""
        module = self._bind_root(bind(variables, rngs, mutable))
        module._prepare()
        return module

    def _bind_root(self: M, scope: Scope) -> M:
        """The module of a new run; what is in its fields takes no part in any other run."""
        memo: dict[int, Any] = {}
        fields = {n: self.__dict__[n] for n in _init_field_names(type(self))}
        updates = {n: _detach(v, memo) for n, v in fields.items() if isinstance(v, _HOLDERS)}
        return self.clone(parent=scope, **updates)

    def unbind(self: M) -> tuple[M, dict[str, Any]]:
        """The module without its variables, and its variables.

        Raises `CallUnbindOnUnboundModuleError` if it has none.
        """
        if self.scope is None:
            raise CallUnbindOnUnboundModuleError(type(self).__name__)
        return self._detached({}), self.variables

    def _detached(self: M, memo: dict[int, Any]) -> M:
        """A nameless copy that belongs to no run, and so do the modules in its fields."""
        if id(self) not in memo:
            fields = {n: self.__dict__[n] for n in _init_field_names(type(self)) if n != "name"}
            updates = {n: _detach(value, memo) for n, value in fields.items()}
            memo[id(self)] = self.clone(name=None, **updates)
        return memo[id(self)]

    # --- crossing a lift

    def _before_crossing(self) -> None:
        if not self._progress.ready:
            self._adopt_fields()

    def _recipe(self) -> tuple[dict[str, Any], Any]:
        return {n: self.__dict__[n] for n in _init_field_names(type(self))}, self._progress.compact

    @classmethod
    def _rebuild(cls, fields: dict[str, Any], scope: Scope, progress: Any) -> Any:
        module = cls(**fields, parent=scope)
        module._progress.compact = progress
        return module

    @classmethod
    def _inner_call(cls, fn: Callable[..., Any], outer: Any) -> Callable[..., Any]:
        if getattr(fn, "wrapped", False):
            return fn
        is_method = getattr(cls, getattr(fn, "__name__", ""), None) is outer
        return wrap_method(fn, function_target=not is_method)


def _frozen_list(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if type(value) is list else value


def _holds_module(value: Any) -> bool:
    """True for a module, and a container with one in it at any depth."""
    if isinstance(value, Module):
        return True
    items: Any = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else value
    return any(isinstance(item, _HOLDERS) and _holds_module(item) for item in items)


def _detach(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with a copy that belongs to no run in the place of each bound module in it."""
    if isinstance(value, Module):
        return value if value.scope is None else value._detached(memo)  # pyright: ignore[reportPrivateUsage]
    return _map_items(value, lambda _, item: _detach(item, memo))


def _map_items(value: Any, fn: Callable[[Any, Any], Any]) -> Any:
    """Applies `fn(key, item)` to the items of a list, tuple or dict; leaves other values alone."""
    if isinstance(value, dict):
        return {k: fn(k, v) for k, v in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        items = [fn(i, v) for i, v in enumerate(cast("list[Any]", value))]
        cls: Any = cast("Any", value).__class__
        return cls(*items) if hasattr(cls, "_fields") else cls(items)
    return value


def _is_method(name: str, value: Any) -> bool:
    """True for what is to be wrapped: plain functions, but dunder methods other than `__call__`."""
    if not isinstance(value, FunctionType) or name == "setup":
        return False
    if any(getattr(value, mark, False) for mark in ("nowrap", "lifted", "wrapped")):
        return False
    return name == "__call__" or not name.startswith("__")


def _check_compact(cls: type) -> None:
    names = [n for n in dir(cls) if getattr(getattr(cls, n, None), "compact", False)]
    if len(names) > 1:
        raise MultipleMethodsCompactError(cls.__name__, names)


_HOLDERS = (Module, list, tuple, dict)  # values that may be or hold modules
_FIELDS: dict[type, tuple[str, ...]] = {}
_INIT_FIELDS: dict[type, tuple[str, ...]] = {}


def _field_names(cls: type) -> tuple[str, ...]:
    """The hyperparameters of a module class, with `name`, without `parent`."""
    names = _FIELDS.get(cls)
    if names is None:
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        names = _FIELDS[cls] = tuple(f.name for f in fields if f.name != "parent")
        _INIT_FIELDS[cls] = tuple(f.name for f in fields if f.init and f.name != "parent")
    return names


def _init_field_names(cls: type) -> tuple[str, ...]:
    _field_names(cls)
    return _INIT_FIELDS[cls]


def _repr(self: Module) -> str:
    rows = [f"    {n} = {_indent(self.__dict__.get(n))}" for n in _field_names(type(self))]
    rows = [r for r in rows if not r.startswith("    name = ")]
    head = f"{type(self).__name__}("
    return "\n".join([head, "    # attributes", *rows, ")"]) if rows else head + ")"


def _indent(value: Any) -> str:
    return repr(value).replace("\n", "\n    ")


dataclasses.dataclass(repr=False, unsafe_hash=True)(Module)
Module.__repr__ = _repr
