"""Classes of modules: what becomes of the methods, properties and fields that a user writes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from shardflax.core.calls import wrap_method
from shardflax.core.construct import direct_init
from shardflax.core.module_errors import (
    CallSetupUnboundModuleError,
    DescriptorAttributeError,
    HashBoundModuleError,
    MultipleMethodsCompactError,
    ReservedModuleAttributeError,
    UnhashableFieldError,
)

__all__ = ["field_names", "init_field_names", "make_module_class", "represent"]

_RESERVED = ("parent", "name")
_TYPES_OF_NAME = (str, "str", str | None)  # a field of this type may be declared, to no effect


def make_module_class(cls: type, kw_only: bool, assigning: Callable[..., None]) -> None:
    """Makes a class a dataclass and wraps its methods; `assigning` is `Module.__setattr__`.

    Raises `ReservedModuleAttributeError` and `MultipleMethodsCompactError`.

    >>> import shardflax.nn as nn
    >>> class Scale(nn.Module):
    ...     factor: int = 2
    >>> field_names(Scale)
    ('factor', 'name')
    """
    annotations = inspect.get_annotations(cls)
    if "name" in annotations and annotations["name"] in _TYPES_OF_NAME:
        cls.name = dataclasses.field(default=None, kw_only=True)  # as it is anyway
        annotations.pop("name")
    for reserved in _RESERVED:
        if reserved in annotations or isinstance(cls.__dict__.get(reserved), property):
            raise ReservedModuleAttributeError(cls.__name__, reserved)
    _check_compact(cls)
    fields = {*annotations, *getattr(cls, "__dataclass_fields__", ())}
    for name, value in list(cls.__dict__.items()):
        if name not in fields:
            wrapped = _wrapped(name, value)
            if wrapped is not value:
                setattr(cls, name, wrapped)
    own = {name: name in cls.__dict__ for name in ("__hash__", "__eq__", "__init__")}
    dataclasses.dataclass(repr=False, unsafe_hash=not own["__hash__"], kw_only=kw_only)(cls)
    every: dict[str, Any] = cls.__dict__["__dataclass_fields__"]
    # Inherited, so they came first; whoever lists fields finds them last.
    for reserved in _RESERVED:
        every[reserved] = every.pop(reserved)
    if not own["__init__"]:
        setattr(cls, "__init__", direct_init(cls, assigning))  # noqa: B010
    if not own["__hash__"]:
        setattr(cls, "__hash__", _hash_of_unbound(cls.__dict__["__hash__"]))  # noqa: B010
    if not own["__eq__"]:
        setattr(cls, "__eq__", _equal_in_place(cls.__dict__["__eq__"]))  # noqa: B010


def _wrapped(name: str, value: Any) -> Any:
    if isinstance(value, FunctionType):
        if name == "setup":
            return _guarded_setup(value)
        return wrap_method(value) if _is_method(name, value) else value
    if type(value) is property and value.fget is not None:
        return property(_explained(value.fget), value.fset, value.fdel, value.__doc__)
    kind: Any = value.__class__
    if name.startswith("__") or isinstance(value, _OF_PYTHON) or not hasattr(kind, "__get__"):
        return value
    sets = hasattr(kind, "__set__") or hasattr(kind, "__delete__")
    return (_DataDescriptor if sets else _Descriptor)(name, value)


_OF_PYTHON: Any = (staticmethod, classmethod, type, functools.partialmethod)


def _is_method(name: str, value: FunctionType) -> bool:
    """True for what is to be wrapped: plain functions, but dunder methods other than `__call__`."""
    if any(getattr(value, mark, False) for mark in ("nowrap", "lifted", "wrapped")):
        return False
    return name == "__call__" or not name.startswith("__")


def _check_compact(cls: type) -> None:
    found = ((n, getattr(cls, n, None)) for n in dir(cls))
    # A wrapper of a compact method carries its mark, and is no other method.
    marked = {n: inspect.unwrap(f) for n, f in found if f and getattr(f, "compact", False)}
    if len({id(f) for f in marked.values()}) > 1:
        raise MultipleMethodsCompactError(cls.__name__, sorted(marked))


# --- descriptors: an AttributeError in one must not look as if the descriptor were missing


def _explained(get: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get)
    def fget(self: Any, *args: Any) -> Any:
        try:
            return get(self, *args)
        except AttributeError as error:
            raise DescriptorAttributeError(type(self).__name__, get.__name__, error) from error

    return fget


class _Descriptor:
    """A descriptor that cannot be set, such as a cached property."""

    def __init__(self, name: str, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.name = name
        self.__doc__ = getattr(wrapped, "__doc__", None)
        self.__isabstractmethod__ = getattr(wrapped, "__isabstractmethod__", False)

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.wrapped.__get__(None, owner)
        try:
            return self.wrapped.__get__(module, owner)
        except AttributeError as error:
            raise DescriptorAttributeError(type(module).__name__, self.name, error) from error


class _DataDescriptor(_Descriptor):
    """One that can, such as what is derived from `property`."""

    def __set__(self, module: Any, value: Any) -> None:
        self.wrapped.__set__(module, value)

    def __delete__(self, module: Any) -> None:
        self.wrapped.__delete__(module)


# --- methods that every class gets


def _guarded_setup(setup: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(setup)
    def guarded(self: Any) -> None:
        if self._progress.setup:
            setup(self)
        elif self.scope is None:
            raise CallSetupUnboundModuleError(type(self).__name__)
        else:
            self._prepare()

    return guarded


def _hash_of_unbound(hash_of: Callable[[Any], int]) -> Callable[[Any], int]:
    def __hash__(self: Any) -> int:
        if self.scope is not None:
            raise HashBoundModuleError(type(self).__name__)
        try:
            return hash_of(self)
        except TypeError:
            for name in field_names(self.__class__):
                _hash_field(self, name)
            raise

    return __hash__


def _hash_field(module: Any, name: str) -> None:
    try:
        hash(module.__dict__[name])
    except (HashBoundModuleError, UnhashableFieldError):
        raise  # of a module inside
    except TypeError as error:
        raise UnhashableFieldError(type(module).__name__, name, error) from error


def _equal_in_place(equal: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def __eq__(self: Any, other: Any) -> Any:
        if type(self) is type(other) and self.scope != other.scope:
            return False
        return equal(self, other)

    return __eq__


# --- fields

_FIELDS: dict[type, tuple[str, ...]] = {}
_INIT_FIELDS: dict[type, tuple[str, ...]] = {}


def field_names(cls: type) -> tuple[str, ...]:
    """The hyperparameters of a module class, with `name`, without `parent`.

    >>> import shardflax.nn as nn
    >>> "features" in field_names(nn.Dense)
    True
    """
    names = _FIELDS.get(cls)
    if names is None:
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        # In this order: another thread that finds the one finds the other.
        _INIT_FIELDS[cls] = tuple(f.name for f in fields if f.init and f.name != "parent")
        names = _FIELDS[cls] = tuple(f.name for f in fields if f.name != "parent")
    return names


def init_field_names(cls: type) -> tuple[str, ...]:
    """Those of `field_names` that are arguments of the class.

    >>> import shardflax.nn as nn
    >>> init_field_names(nn.Module)
    ('name',)
    """
    field_names(cls)
    return _INIT_FIELDS[cls]


def represent(module: Any, children: Mapping[str, Any]) -> str:
    """The text of a module: its hyperparameters and the submodules that it has by now.

    >>> import shardflax.nn as nn
    >>> print(represent(nn.Dropout(0.1), {}).partition("deterministic")[0].rstrip())
    Dropout(
        # attributes
        rate = 0.1
        broadcast_dims = ()
    """
    fields = [f.name for f in dataclasses.fields(module) if f.repr and f.name != "name"]
    attributes: dict[str, Any] = {name: module.__dict__.get(name) for name in fields}
    rows = [*_rows("attributes", attributes), *_rows("children", children)]
    head = f"{type(module).__name__}("
    return "\n".join([head, *rows, ")"]) if rows else head + ")"


def _rows(title: str, values: Mapping[str, Any]) -> list[str]:
    texts = {name: _text(value).replace("\n", "\n    ") for name, value in values.items()}
    rows = [f"    {name} = {text}" for name, text in texts.items()]
    return [f"    # {title}", *rows] if rows else []


def _text(value: Any) -> str:
    """Functions and classes by their names, everything else as it says itself."""
    name = getattr(value, "__name__", None) if callable(value) else None
    return name if isinstance(name, str) else repr(value)
