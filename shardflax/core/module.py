"""Module: a dataclass of hyperparameters whose methods compute with the state of a run.

A module is *unbound* until `init`, `apply` or `bind` gives it a scope.  Submodules are named by
where they are made: after the attribute they are assigned to in `setup`, automatically in a
compact method, after the field when they are passed in.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

from shardflax.core import holders, run, summary
from shardflax.core.calls import context, run_setup, wrap_method
from shardflax.core.classes import (
    field_names,
    init_field_names,
    make_module_class,
    represent,
)
from shardflax.core.copies import deep_copies, detached, is_module
from shardflax.core.errors import NameInUseError
from shardflax.core.functional import bind
from shardflax.core.marks import compact, compact_name_scope, nowrap
from shardflax.core.module_errors import (
    AssignSubModuleError,
    CallUnbindOnUnboundModuleError,
    IncorrectPostInitOverrideError,
    InvalidInstanceModuleError,
    InvalidNameError,
    InvalidParentError,
    SetAttributeFrozenModuleError,
    SetAttributeInModuleSetupError,
)
from shardflax.core.names import CollectionFilter
from shardflax.core.scope import Scope, Turns
from shardflax.core.stateful import Progress, Stateful

__all__ = ["Module", "compact", "compact_name_scope", "nowrap"]

M = TypeVar("M", bound="Module")


class _Unset:
    def __repr__(self) -> str:
        return "<the module being run>"


_UNSET = _Unset()


class _Parent:
    """Reads `parent`: a child does not keep its parent alive, or each run would be a cycle.

    Runs hold arrays, and cycles are found only when Python's collector next looks for them.
    """

    def __get__(self, module: Any, owner: Any = None) -> Any:
        parent = None if module is None else module.__dict__.get("_parent")
        return _UNSET if parent is None else parent()


@dataclass_transform(kw_only_default=False, field_specifiers=(dataclasses.field,))
class _Typed:
    """Makes type checkers see modules as dataclasses."""


class Module(Stateful, _Typed):
    """The base class of all layers and models.

    Subclasses are dataclasses: their annotated attributes are hyperparameters.  They compute in
    `__call__` (or any method), and get parameters and submodules in `setup` or in a method marked
    `compact`.  `parent` and `name` are fields of every module, given by keyword; a module made in
    a method of another is its child, and `parent=None` makes it nobody's.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
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

    # --- classes

    def __init_subclass__(cls, kw_only: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        make_module_class(cls, kw_only, Module.__setattr__)

    def __repr__(self) -> str:
        children = self._progress.children or {}
        shown = {n: c for n, c in children.items() if not isinstance(c, _NameScope)}
        return represent(self, shown)

    # --- construction

    def __post_init__(self) -> None:
        parent = self.parent
        if type(parent) is _Unset:
            parent = context.stack[-1] if context.stack else None
            self.__dict__["parent"] = parent
        self.__dict__["_progress"] = Progress()
        if isinstance(parent, Module):
            self.__dict__.pop("parent", None)
            self.__dict__["_parent"] = weakref.ref(parent)
            parent._adopt_new(self)
        elif isinstance(parent, Scope):
            self.__dict__["scope"] = parent
            self._adopt_fields()
        elif parent is not None:
            raise InvalidParentError(type(self).__name__, parent)

    def _adopt_new(self, child: Module) -> None:
        """Takes a submodule that is being made in one of this module's methods."""
        progress = self._progress
        name = child.name
        if name is not None:
            if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidNameError(type(child).__name__, name)
            if isinstance(self.__dict__.get(name), Module):
                raise NameInUseError("submodule", name, type(self).__name__)
        if progress.setup:
            if name is not None:
                self._bind_child(child, name)
        elif progress.compact:
            assert self.scope is not None
            if name is None:
                name = self.scope.auto_name(type(child).__name__)
            self._bind_child(child, name)
        else:
            where = self.scope.path_text if self.scope is not None else type(self).__name__
            raise AssignSubModuleError(type(child).__name__, where)

    def _bind_child(self, child: Module, name: str) -> None:
        attrs = child.__dict__
        attrs.pop("parent", None)
        attrs["_parent"], attrs["name"] = weakref.ref(self), name
        if self.scope is None:
            return
        attrs["scope"] = self.scope.take(name)
        progress = self._progress
        if progress.children is None:
            progress.children = {}
        progress.children[name] = child
        child._adopt_fields()

    # --- fields are adopted when the module is bound, setup runs at the first call of a method

    def _prepare(self) -> None:
        """Runs `setup` if the module is bound."""
        progress = self.__dict__.get("_progress")
        if progress is None:
            raise IncorrectPostInitOverrideError(type(self).__name__)
        if self.scope is None or progress.ready:
            return
        turns = self.scope.store.lock
        if turns is None:
            self._set_up(self.scope, progress)
        else:
            with turns:
                self._set_up(self.scope, progress)

    def _set_up(self, scope: Scope, progress: Progress) -> None:
        if progress.ready or progress.setup:
            return
        if self.__class__.setup is not Module.setup:
            progress.setup = True
            reserved = scope.node.names()
            try:
                run_setup(self)
            except BaseException:
                # It runs anew at the next call, and shall fail then for the same reason.
                scope.node.reserved = reserved
                raise
            finally:
                progress.setup = False
        progress.ready = True

    def _adopt_fields(self) -> None:
        attrs = self.__dict__
        if _LEAVES.issuperset(map(type, attrs.values())):  # seldom not so
            return
        for name in field_names(type(self)):
            value: Any = attrs.get(name)
            kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
            # Most fields are leaves, or tuples of them (sizes, names): nothing to adopt.
            leaves = kind in _LEAVES or (kind is tuple and _LEAVES.issuperset(map(type, value)))
            if not leaves and not _is_leaf(value):
                attrs[name] = self._adopt(name, value)

    def _adopt(self, name: str, value: Any) -> Any:
        """`value` with each unbound module in it made a child, named after its place."""
        return holders.frozen(holders.replace(value, is_module, self._adopt_module, name))

    def _adopt_module(self, name: str, module: Module) -> Module:
        if module.scope is not None or self.scope is None:
            return module
        if module.parent is self:
            self._bind_child(module, name)
            return module
        # Made outside of any module: the run gets a copy, one for all places that share it.
        adopted = self.scope.store.adopted
        if id(module) not in adopted:
            copy = module.clone(name=None)
            adopted[id(module)] = (module, copy)
            self._bind_child(copy, name)
        return adopted[id(module)][1]

    def _name_scope(self, name: str) -> Module:
        """The parent of what a method marked `compact_name_scope` makes."""
        self._bound()
        place = (self._progress.children or {}).get(name)
        if not isinstance(place, _NameScope):
            place = _NameScope(parent=None)
            self._bind_child(place, name)
        return place

    def _move(self, scope: Scope) -> None:
        """Takes another place, and its submodules with it."""
        self.__dict__["scope"] = scope
        for name, child in (self._progress.children or {}).items():
            scope.reserve(name)
            child._move(scope.at(name))

    def setup(self) -> None:
        """Makes parameters and submodules of a module that is not compact; for subclasses."""

    # --- attributes

    def __setattr__(self, name: str, value: Any) -> None:
        progress = self.__dict__.get("_progress")
        if progress is None or self.scope is None:
            object.__setattr__(self, name, value)
        elif not progress.setup:
            raise SetAttributeFrozenModuleError(type(self).__name__, name)
        elif name in field_names(type(self)) or name in ("parent", "scope"):
            raise SetAttributeInModuleSetupError(type(self).__name__, name)
        else:
            object.__setattr__(self, name, self._adopt(name, value))

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

    def clone(
        self: M,
        *,
        parent: Any = None,
        _deep_clone: bool = False,
        _reset_names: bool = False,
        **updates: Any,
    ) -> M:
        """A copy of the module, unbound unless `parent` says otherwise, with some fields replaced.

        Modules in fields are shared with the copy, unless `_deep_clone` asks for copies of them
        too; `_reset_names` then leaves those without names.

        >>> import shardflax.nn as nn
        >>> nn.Dense(2).clone(features=3).features
        3
        """
        fields = {name: self.__dict__[name] for name in init_field_names(type(self))}
        if _deep_clone:
            fields = deep_copies(fields, _reset_names, {})
        return type(self)(**{**fields, **updates, "parent": parent})

    def copy(self: M, *, parent: Any = _UNSET, name: str | None = None, **updates: Any) -> M:
        """A copy of the module that becomes a child of the module being run.

        It shares nothing: modules in fields are copied too.

        >>> import shardflax.nn as nn
        >>> nn.Dense(2).copy(name="out").name
        'out'
        """
        return self.clone(parent=parent, _deep_clone=True, name=name, **updates)

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

    def lazy_init(
        self,
        rngs: Any,
        *args: Any,
        method: Any = None,
        mutable: CollectionFilter = run.INIT_MUTABLE,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """`init` without the forward pass; arrays among `args` may be `jax.ShapeDtypeStruct`.

        Raises `LazyInitError` if a variable depends on the values of such an argument.

        >>> import jax, shardflax.nn as nn
        >>> shape = jax.ShapeDtypeStruct((10**9, 3), "float32")
        >>> nn.Dense(2).lazy_init(jax.random.key(0), shape)["params"]["kernel"].shape
        (3, 2)
        """
        fn = run.method_of(self, method)
        return run.lazy_init(fn, self, mutable)(rngs, *args, **kwargs)

    def bind(
        self: M,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        mutable: CollectionFilter = False,
    ) -> M:
        """The module with its variables, for interactive use: call its methods as they are.

        `args` are ignored.  `setup` runs when its results are first needed.  Threads that call one
        bound module wait for one another.
        """
        if not is_module(self):
            raise InvalidInstanceModuleError(self)
        scope = bind(variables, rngs, mutable)
        scope.store.lock = Turns()
        return self._bind_root(scope)

    def _bind_root(self: M, scope: Scope) -> M:
        """The module of a new run; what is in its fields takes no part in any other run."""
        memo: dict[int, Any] = {}
        fields = {n: self.__dict__[n] for n in init_field_names(type(self))}
        updates = {n: detached(v, memo) for n, v in fields.items() if not _is_leaf(v)}
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
            fields = {n: self.__dict__[n] for n in init_field_names(type(self)) if n != "name"}
            updates = {n: detached(value, memo) for n, value in fields.items()}
            memo[id(self)] = self.clone(name=None, **updates)
        return memo[id(self)]

    # --- tables

    def tabulate(
        self,
        rngs: Any,
        *args: Any,
        depth: int | None = None,
        show_repeated: bool = False,
        mutable: CollectionFilter = run.INIT_MUTABLE,
        console_kwargs: Mapping[str, Any] | None = None,
        table_kwargs: Mapping[str, Any] | None = None,
        column_kwargs: Mapping[str, Any] | None = None,
        compute_flops: bool = False,
        compute_vjp_flops: bool = False,
        **kwargs: Any,
    ) -> str:
        """A table of the submodules that `init` would make: see `shardflax.core.summary`."""
        texts = (console_kwargs, table_kwargs, column_kwargs)
        costs = (compute_flops, compute_vjp_flops)
        make = summary.tabulate(self, rngs, depth, show_repeated, mutable, *texts, *costs)
        return make(*args, **kwargs)

    def module_paths(
        self,
        rngs: Any,
        *args: Any,
        show_repeated: bool = False,
        mutable: CollectionFilter = run.INIT_MUTABLE,
        **kwargs: Any,
    ) -> dict[str, Module]:
        """The modules that `init` would call, unbound, by their paths; `""` is the module itself.

        With `show_repeated`, modules that are called in other ways than by `__call__` count too.

        >>> import jax, jax.numpy as jnp, shardflax.nn as nn
        >>> sorted(nn.Sequential([nn.Dense(2)]).module_paths(jax.random.key(0), jnp.ones((1, 2))))
        ['', 'layers_0']
        """
        return summary.module_paths(self, rngs, args, kwargs, show_repeated, mutable)

    # --- crossing a lift

    def _recipe(self) -> tuple[dict[str, Any], Any]:
        return {n: self.__dict__[n] for n in init_field_names(type(self))}, self._progress.compact

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


dataclasses.dataclass(repr=False, unsafe_hash=True)(Module)
setattr(Module, "parent", _Parent())  # noqa: B010


class _NameScope(Module):
    """The parent of what a method marked `compact_name_scope` makes."""


_LEAVES: set[type] = {int, float, bool, str, type(None), Progress, Scope, weakref.ref}


def _is_leaf(value: Any) -> bool:
    """True for what neither is a module nor can hold one; its type is known from then on."""
    if isinstance(value, Module) or holders.is_holder(value):
        return False
    _LEAVES.add(value.__class__)
    return True
