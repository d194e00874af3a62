"""Errors of modules: see `shardflax.core.errors`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shardflax.core.errors import FlaxError, did_you_mean

__all__ = [
    "ApplyModuleInvalidMethodError",
    "AssignSubModuleError",
    "CallCompactUnboundModuleError",
    "CallSetupUnboundModuleError",
    "CallShareScopeOnUnboundModuleError",
    "CallUnbindOnUnboundModuleError",
    "DeclareOutsideOfCompactError",
    "DescriptorAttributeError",
    "HashBoundModuleError",
    "IncorrectPostInitOverrideError",
    "InvalidInstanceModuleError",
    "InvalidNameError",
    "InvalidParentError",
    "MultipleMethodsCompactError",
    "PerturbationNotFoundError",
    "ReservedModuleAttributeError",
    "SetAttributeFrozenModuleError",
    "SetAttributeInModuleSetupError",
    "UnboundModuleError",
    "UnhashableFieldError",
]


class ApplyModuleInvalidMethodError(FlaxError):
    """`method=` names or holds nothing that can be called on the module.

    >>> print(ApplyModuleInvalidMethodError(3, "model"))
    method=3 cannot be called on str. ...
    """

    def __init__(self, method: Any, module: Any) -> None:
        super().__init__(
            f"method={method!r} cannot be called on {type(module).__name__}. Pass the name of a "
            f"method, a method of the class, or a function of the module."
        )


class AssignSubModuleError(FlaxError):
    """A submodule is made in a method that is neither `setup` nor compact.

    >>> print(AssignSubModuleError("Dense", "/block"))
    at /block: a submodule Dense is made outside of setup and of a compact method. ...
    """

    def __init__(self, cls: str, where: str) -> None:
        super().__init__(
            f"at {where}: a submodule {cls} is made outside of setup and of a compact method. "
            f"Decorate the method with @nn.compact, or make the submodule in setup."
        )


class CallCompactUnboundModuleError(FlaxError):
    """A compact method is called on a module that is bound to no run.

    >>> print(CallCompactUnboundModuleError("Dense"))
    Dense is bound to no variables, ...
    """

    def __init__(self, cls: str) -> None:
        super().__init__(
            f"{cls} is bound to no variables, so its compact method cannot be called. Write "
            f"module.init(key, x), module.apply(variables, x) or module.bind(variables)."
        )


class UnboundModuleError(CallCompactUnboundModuleError, ValueError):
    """State, keys or the place of a module are asked for that is bound to no run.

    >>> print(UnboundModuleError("Dense"))
    Dense is bound to no variables, so it has no state, no keys and no path. Write ...
    """

    def __init__(self, cls: str) -> None:
        FlaxError.__init__(
            self,
            f"{cls} is bound to no variables, so it has no state, no keys and no path. Write "
            f"module.init(key, x), module.apply(variables, x) or module.bind(variables).",
        )


class CallUnbindOnUnboundModuleError(FlaxError):
    """`unbind` is called on a module that is bound to no run.

    >>> print(CallUnbindOnUnboundModuleError("Dense"))
    Dense is not bound: ...
    """

    def __init__(self, cls: str) -> None:
        super().__init__(f"{cls} is not bound: only what module.bind(variables) gave has unbind().")


class DeclareOutsideOfCompactError(FlaxError, ValueError):
    """A parameter or variable is declared in a method that is neither `setup` nor compact.

    >>> print(DeclareOutsideOfCompactError("kernel", "/Dense_0"))
    at /Dense_0: 'kernel' is declared outside of setup and of a compact method. Decorate ...
    """

    def __init__(self, name: str, where: str) -> None:
        super().__init__(
            f"at {where}: {name!r} is declared outside of setup and of a compact method. Decorate "
            f"the method with @nn.compact, or declare it in setup and keep it as an attribute."
        )


class IncorrectPostInitOverrideError(FlaxError):
    """A module overrides `__post_init__` and does not call that of its base class.

    >>> print(IncorrectPostInitOverrideError("MLP"))
    MLP.__post_init__ must call super().__post_init__().
    """

    def __init__(self, cls: str) -> None:
        super().__init__(f"{cls}.__post_init__ must call super().__post_init__().")


class InvalidInstanceModuleError(FlaxError):
    """`init` or `apply` is called on a class where an instance is needed.

    >>> print(InvalidInstanceModuleError(3))
    init, init_with_output and apply are methods of an instance; got int: 3. Make an ...
    """

    def __init__(self, found: Any) -> None:
        super().__init__(
            f"init, init_with_output and apply are methods of an instance; got "
            f"{type(found).__name__}: {found!r}. Make an instance first: "
            f"Model(...).init(key, x), not Model.init(key, x)."
        )


class MultipleMethodsCompactError(FlaxError):
    """A class has more than one compact method.

    >>> print(MultipleMethodsCompactError("MLP", ["encode", "decode"]))
    MLP has the compact methods encode, decode: ...
    """

    def __init__(self, cls: str, methods: list[str]) -> None:
        super().__init__(
            f"{cls} has the compact methods {', '.join(methods)}: only one method of a class may "
            f"be compact, since both would number their submodules from 0. Make the shared "
            f"submodules in setup."
        )


class ReservedModuleAttributeError(FlaxError):
    """A module declares a field with a name that every module has.

    >>> print(ReservedModuleAttributeError("MLP", "name"))
    MLP declares a field 'name'; ...
    """

    def __init__(self, cls: str, name: str) -> None:
        super().__init__(
            f"{cls} declares a field {name!r}; 'name' and 'parent' are fields of every module. "
            f"Give it another name."
        )


class SetAttributeFrozenModuleError(FlaxError):
    """An attribute of a module is set outside of `setup`.

    >>> print(SetAttributeFrozenModuleError("MLP", "width"))
    MLP.width cannot be set: ...
    """

    def __init__(self, cls: str, name: str) -> None:
        super().__init__(
            f"{cls}.{name} cannot be set: modules do not change outside of setup. Set it in setup, "
            f"use module.clone({name}=...), or keep state in self.variable(...)."
        )


class SetAttributeInModuleSetupError(FlaxError):
    """`setup` overwrites a field of the module.

    >>> print(SetAttributeInModuleSetupError("MLP", "width"))
    MLP.setup sets 'width', a field of the module. ...
    """

    def __init__(self, cls: str, name: str) -> None:
        super().__init__(
            f"{cls}.setup sets {name!r}, a field of the module. Set it under another name."
        )


class CallSetupUnboundModuleError(FlaxError):
    """`setup` is called by hand on a module that is bound to no run.

    >>> print(CallSetupUnboundModuleError("MLP"))
    MLP is bound to no variables, so its setup cannot be called. ...
    """

    def __init__(self, cls: str) -> None:
        super().__init__(
            f"{cls} is bound to no variables, so its setup cannot be called. It runs by itself "
            f"before the first method does; to look at what it makes, write "
            f"nn.apply(lambda m: m.submodule.clone(), module)({{}}) or module.bind(variables)."
        )


class CallShareScopeOnUnboundModuleError(FlaxError):
    """`share_scope` is called on modules that are bound to no run.

    >>> print(CallShareScopeOnUnboundModuleError("Dense"))
    Dense is not bound, so there is no scope to share. ...
    """

    def __init__(self, cls: str) -> None:
        super().__init__(
            f"{cls} is not bound, so there is no scope to share. Call nn.share_scope in setup: "
            f"nn.share_scope(self, self.inner)."
        )


class DescriptorAttributeError(FlaxError):
    """A property of a module looks for an attribute that does not exist.

    >>> print(DescriptorAttributeError("MLP", "width", AttributeError("MLP has no attribute 'w'")))
    MLP.width looks for an attribute that does not exist: MLP has no attribute 'w'
    """

    def __init__(self, cls: str, name: str, cause: AttributeError) -> None:
        super().__init__(f"{cls}.{name} looks for an attribute that does not exist: {cause}")


class HashBoundModuleError(FlaxError, TypeError):
    """A module is hashed that is bound to a run: it holds arrays.

    >>> print(HashBoundModuleError("MLP"))
    MLP is bound to variables and cannot be hashed. ...
    """

    def __init__(self, cls: str) -> None:
        super().__init__(
            f"{cls} is bound to variables and cannot be hashed. Use module.unbind() or "
            f"module.clone(), which are its hyperparameters alone."
        )


class UnhashableFieldError(FlaxError, TypeError):
    """A module is hashed, as an argument in `static_argnums` is, and a field of it cannot be.

    >>> print(UnhashableFieldError("Sequential", "layers", TypeError("unhashable type: 'list'")))
    Sequential cannot be hashed, for its field 'layers' cannot: unhashable type: 'list'. ...
    """

    def __init__(self, cls: str, name: str, cause: TypeError) -> None:
        super().__init__(
            f"{cls} cannot be hashed, for its field {name!r} cannot: {cause}. Make the module with "
            f"tuples for lists, and FrozenDicts for dicts."
        )


class InvalidNameError(FlaxError, TypeError):
    """`name=` is no text.

    >>> print(InvalidNameError("Dense", 3))
    Dense got name=3; expected a text such as 'out', or None (the default) for a name by its ...
    """

    def __init__(self, cls: str, name: Any) -> None:
        super().__init__(
            f"{cls} got name={name!r}; expected a text such as 'out', or None (the default) for a "
            f"name by its class."
        )


class InvalidParentError(FlaxError, ValueError):
    """`parent=` is neither a module that is being run, nor a scope, nor `None`.

    >>> print(InvalidParentError("Dense", "block"))
    Dense got parent='block'; expected ...
    """

    def __init__(self, cls: str, parent: Any) -> None:
        super().__init__(
            f"{cls} got parent={parent!r}; expected the module whose setup or compact method is "
            f"running (the default), None for a module of its own, or a scope."
        )


class PerturbationNotFoundError(FlaxError, ValueError):
    """A perturbation is missing from the collection that `apply` was given.

    >>> print(PerturbationNotFoundError("hidden", "perturbations", "/", ["hiden"]))
    at /: the collection 'perturbations' has no 'hidden'; did you mean 'hiden'? ...
    """

    def __init__(self, name: str, col: str, where: str, found: Iterable[str]) -> None:
        super().__init__(
            f"at {where}: the collection {col!r} has no {name!r}; {did_you_mean(name, found)} "
            f"Pass all of what init returned for it, or leave the collection out."
        )
