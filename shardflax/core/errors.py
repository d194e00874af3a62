"""Errors: one class per cause.

Inner code raises short.  Each message says where, what was expected, what was found, and what to
write instead.  The names are those of Linen's catalogue.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax

_jax: Any = jax  # half typed

__all__ = [
    "ApplyModuleInvalidMethodError",
    "ApplyScopeInvalidVariablesStructureError",
    "ApplyScopeInvalidVariablesTypeError",
    "AssignSubModuleError",
    "BranchVariablesError",
    "CallCompactUnboundModuleError",
    "CallSetupUnboundModuleError",
    "CallShareScopeOnUnboundModuleError",
    "CallUnbindOnUnboundModuleError",
    "DeclareOutsideOfCompactError",
    "DescriptorAttributeError",
    "FlaxError",
    "HashBoundModuleError",
    "IncorrectPostInitOverrideError",
    "InvalidFilterError",
    "InvalidInstanceModuleError",
    "InvalidParentError",
    "InvalidRngError",
    "InvalidScopeError",
    "JaxTransformError",
    "LazyInitError",
    "LoopVariantBroadcastError",
    "ModifyScopeVariableError",
    "MultipleMethodsCompactError",
    "NameInUseError",
    "PerturbationNotFoundError",
    "RematNameError",
    "RematPolicyError",
    "ReservedModuleAttributeError",
    "ScopeCollectionNotFound",
    "ScopeParamNotFoundError",
    "ScopeParamShapeError",
    "ScopeVariableNotFoundError",
    "SetAttributeFrozenModuleError",
    "SetAttributeInModuleSetupError",
    "TransformAxisError",
    "TransformTargetError",
    "TransformedMethodReturnValueError",
    "did_you_mean",
]


class FlaxError(Exception):
    """The base class of every error that this library raises on purpose.

    >>> issubclass(ScopeParamNotFoundError, FlaxError)
    True
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of `known`, or lists them all.

    >>> did_you_mean("emebd", ["embed", "mlp"])
    "did you mean 'embed'?"
    >>> did_you_mean("zzz", ["embed", "mlp"])
    'known: embed, mlp.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}."


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


# --- filters and streams


class InvalidFilterError(FlaxError):
    """A collection or stream filter is none of bool, str, collection of str, `DenyList`.

    >>> str(InvalidFilterError(3))
    'a filter is a bool, a name, a collection of names or DenyList(...); got int: 3.'
    """

    def __init__(self, spec: Any) -> None:
        super().__init__(
            f"a filter is a bool, a name, a collection of names or DenyList(...); "
            f"got {type(spec).__name__}: {spec!r}."
        )


class InvalidRngError(FlaxError, ValueError):
    """A key is needed from a stream that the run does not have, or a seed is no key.

    >>> print(InvalidRngError("at /drop: no stream"))
    at /drop: no stream
    """


# --- scopes and their variables


class InvalidScopeError(FlaxError):
    """A module or variable is used after its run, or the transform it was made in, has ended.

    >>> print(InvalidScopeError(("block",)))
    at /block: this module belongs to an init, apply or transform that has ended. ...
    """

    def __init__(self, path: tuple[str, ...]) -> None:
        super().__init__(
            f"at /{'/'.join(path)}: this module belongs to an init, apply or transform that has "
            f"ended. Use the module inside of it, or make one that stays with "
            f"module.bind(variables)."
        )


class JaxTransformError(FlaxError):
    """A module is used inside of a JAX transform that it was not made in.

    >>> print(JaxTransformError(("block",)))
    below /block: a module is used inside of a JAX transform ...
    """

    def __init__(self, path: tuple[str, ...]) -> None:
        super().__init__(
            f"below /{'/'.join(path)}: a module is used inside of a JAX transform (jax.jit, "
            f"jax.vmap, jax.lax.scan, ...) that was entered after the module was bound, so its "
            f"state would leak out of the trace. Use the lifted transform of the same name "
            f"(nn.jit, nn.vmap, nn.scan, ...), or call module.init and module.apply inside of "
            f"the JAX transform."
        )


class NameInUseError(FlaxError, ValueError):
    """A submodule or variable has a name that its module uses already.

    >>> print(NameInUseError("submodule", "out", "/block"))
    at /block: the name 'out' of this submodule is in use in the same module. ...
    """

    def __init__(self, kind: str, name: str, where: str) -> None:
        super().__init__(
            f"at {where}: the name {name!r} of this {kind} is in use in the same module. Give it "
            f"another name, or share one submodule by calling it twice."
        )


class ScopeParamNotFoundError(FlaxError):
    """A parameter is missing from the variables passed to `apply`.

    >>> print(ScopeParamNotFoundError("kernel", "/block", ["kernal"]))
    at /block: the variables have no parameter 'kernel'; did you mean 'kernal'? ...
    """

    def __init__(self, name: str, where: str, found: Iterable[str]) -> None:
        super().__init__(
            f"at {where}: the variables have no parameter {name!r}; {did_you_mean(name, found)} "
            f"The module declares it, so the variables are those of another model, or of this one "
            f"with other options."
        )


class ScopeCollectionNotFound(FlaxError):
    """A whole collection is missing from the variables passed to `apply`.

    >>> print(ScopeCollectionNotFound("state", "count", "/"))
    at /: the variable 'count' is looked for in the collection 'state', ...
    """

    def __init__(self, col: str, name: str, where: str) -> None:
        super().__init__(
            f"at {where}: the variable {name!r} is looked for in the collection {col!r}, and the "
            f"variables have no such collection. Pass it to apply ({{{col!r}: ..., ...}}), or let "
            f"apply make it with mutable=[{col!r}]."
        )


class ScopeVariableNotFoundError(FlaxError):
    """A variable is missing from a collection that may not change.

    >>> print(ScopeVariableNotFoundError("count", "state", "/", []))
    at /: the collection 'state' has no variable 'count'; known: none. ...
    """

    def __init__(self, name: str, col: str, where: str, found: Iterable[str]) -> None:
        super().__init__(
            f"at {where}: the collection {col!r} has no variable {name!r}; "
            f"{did_you_mean(name, found)} Pass it to apply, or let apply make it with "
            f"mutable=[{col!r}]."
        )


class ScopeParamShapeError(FlaxError):
    """A parameter passed to `apply` has another shape than the module declares.

    >>> print(ScopeParamShapeError("kernel", "/", [(3, 4)], [(5, 4)]))
    at /: the parameter 'kernel' is declared as 3x4 and the variables hold 5x4 (dim 0: ...
    """

    def __init__(self, name: str, where: str, expected: list[Any], found: list[Any]) -> None:
        want, got = (", ".join(map(_shape, shapes)) for shapes in (expected, found))
        dims = ""
        if len(expected) == len(found) == 1 and len(expected[0]) == len(found[0]):
            pairs = enumerate(zip(expected[0], found[0], strict=True))
            dims = ", ".join(f"dim {i}: {a} against {b}" for i, (a, b) in pairs if a != b)
            dims = f" ({dims})"
        super().__init__(
            f"at {where}: the parameter {name!r} is declared as {want} and the variables hold "
            f"{got}{dims}. Either the input or an option of the module differs from what the "
            f"variables were made with."
        )


class ModifyScopeVariableError(FlaxError):
    """A variable is written whose collection may not change in this run.

    >>> print(ModifyScopeVariableError("state", "count", "/"))
    at /: cannot write the variable 'count': ...
    """

    def __init__(self, col: str, name: str, where: str) -> None:
        super().__init__(
            f"at {where}: cannot write the variable {name!r}: the collection {col!r} may not "
            f"change here. Call apply with mutable=[{col!r}]; inside of a transform, list the "
            f"collection among those that it carries out."
        )


class ApplyScopeInvalidVariablesTypeError(FlaxError):
    """The variables passed to `apply` are no dict of collections.

    >>> print(ApplyScopeInvalidVariablesTypeError([1]))
    apply takes a dict of collections, {'params': {...}}; got list.
    >>> print(ApplyScopeInvalidVariablesTypeError({"params": 3}))
    apply takes a dict of collections, {'params': {...}}; got int for the collection 'params'.
    """

    def __init__(self, variables: Any) -> None:
        found = type(variables).__name__
        if isinstance(variables, Mapping):
            items = cast("Mapping[str, Any]", variables).items()
            col, value = next((c, v) for c, v in items if not isinstance(v, Mapping))
            found = f"{type(value).__name__} for the collection {col!r}"
        super().__init__(f"apply takes a dict of collections, {{'params': {{...}}}}; got {found}.")


class ApplyScopeInvalidVariablesStructureError(FlaxError):
    """The variables passed to `apply` hold a collection `params` inside of `params`.

    >>> print(ApplyScopeInvalidVariablesStructureError({"params": {"params": {}}}))
    apply got {'params': {'params': ...}}...
    """

    def __init__(self, variables: Any) -> None:
        super().__init__(
            f"apply got {{'params': {{'params': ...}}}} (collections: {sorted(variables)}): the "
            f"variables are wrapped once too often. Pass what init returned as it is."
        )


class LazyInitError(FlaxError):
    """A variable depends on the values of an argument of which only the shape is known.

    >>> print(LazyInitError("params/kernel"))
    lazy_init: 'params/kernel' depends on the values of an argument ...
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"lazy_init: {path!r} depends on the values of an argument that was given as a shape "
            f"(jax.ShapeDtypeStruct). Pass an array for it, or let the initializer use only its "
            f"shape and dtype."
        )


# --- modules


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


# --- transforms


class TransformTargetError(FlaxError):
    """The target of a lifted transform is neither a module class nor a function of a module.

    >>> print(TransformTargetError(3))
    a lifted transform takes a Module class, ...
    """

    def __init__(self, target: Any) -> None:
        super().__init__(
            f"a lifted transform takes a Module class, or a function with a module as its first "
            f"argument; got {target!r}. For an instance, lift a function that calls it."
        )


class TransformAxisError(FlaxError):
    """The size of a mapped or scanned dim cannot be found out, or sizes differ.

    >>> print(TransformAxisError("vmap: axis 2 does not exist"))
    vmap: axis 2 does not exist
    """


class BranchVariablesError(FlaxError, TypeError):
    """The branches of a lifted `cond` or `switch` write different variables.

    >>> print(BranchVariablesError(("gate",), {0: ({},), 1: ({"state": {"n": 1}},)}))
    at /gate: the branches of a cond or switch write different variables: ...
    """

    def __init__(self, path: tuple[str, ...], written: Mapping[int, Any]) -> None:
        found = [f"branch {i} writes {_described(w)}" for i, w in sorted(written.items())]
        super().__init__(
            f"at /{'/'.join(path)}: the branches of a cond or switch write different variables: "
            f"{'; '.join(found)}. Make variables and submodules before the branches (call each "
            f"branch once at init), or in every branch, under the same names and shapes."
        )


def _described(tree: Any) -> str:
    """The variables in a tree of groups, of scopes, of collections."""
    leaves = _jax.tree.leaves_with_path(tree)
    named = [f"{_jax.tree_util.keystr(p[2:], simple=True, separator='/')}: {x}" for p, x in leaves]
    return ", ".join(named) or "nothing"


class LoopVariantBroadcastError(FlaxError):
    """A broadcast variable or output of `scan` depends on what the loop changes.

    >>> print(LoopVariantBroadcastError(["['mean']"]))
    scan: these broadcast values depend on the carry or on a scanned input, ...
    """

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"scan: these broadcast values depend on the carry or on a scanned input, so they "
            f"differ from step to step: {', '.join(paths)}. Scan them (variable_axes, out_axes) "
            f"or carry them (variable_carry)."
        )


class RematNameError(FlaxError):
    """A rematerialisation policy names values that nothing inside carries.

    >>> print(RematNameError(("block",), {"qvk"}, {"qkv", "out"}))
    at /block: the policy of remat names 'qvk', but ...; did you mean 'qkv'?
    """

    def __init__(
        self, path: tuple[str, ...], missing: Iterable[str], carried: Iterable[str]
    ) -> None:
        names = sorted(missing)
        hint = did_you_mean(names[0], carried) if carried else "no value carries a name."
        super().__init__(
            f"at /{'/'.join(path)}: the policy of remat names {', '.join(map(repr, names))}, but "
            f"no value computed inside carries it (jax.ad_checkpoint.checkpoint_name(x, name)), "
            f"so it would have no effect; {hint}"
        )


class RematPolicyError(FlaxError):
    """A rematerialisation policy has a name that does not exist.

    >>> print(RematPolicyError("dots_savable", ["dots_saveable"]))
    remat has no policy 'dots_savable'; did you mean 'dots_saveable'?
    """

    def __init__(self, policy: str, known: Iterable[str]) -> None:
        super().__init__(f"remat has no policy {policy!r}; {did_you_mean(policy, known)}")


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


class TransformedMethodReturnValueError(FlaxError):
    """A lifted method returns a module or a variable, which ends with the transform.

    >>> print(TransformedMethodReturnValueError("encode", "Dense"))
    the lifted method encode returns a Dense, ...
    """

    def __init__(self, method: str, found: str) -> None:
        super().__init__(
            f"the lifted method {method} returns a {found}, which belongs to the inside of the "
            f"transform. Return arrays: call the module, or take the value of the variable."
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
