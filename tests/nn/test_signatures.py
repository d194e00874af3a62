"""What Flax takes we take: every public class and function, with the same parameters and defaults.

Flax is a black box here: its signatures alone are compared, as they are installed.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen
import jax.numpy as jnp

import shardflax.nn as nn

MODULES = ("activation", "dtypes", "fp8_ops", "initializers", "recurrent")

RULES = "a derivative of a function that is there"
INSIDE = "a part of Flax that its documentation does not name"
NOT_OURS = {
    "LogicallyPartitioned.from_nnx_metadata": "there is no other namespace to convert from",
    "LogicallyPartitioned.to_nnx_metadata": "there is no other namespace to convert to",
    "recurrent.DenseParams": INSIDE,
    "recurrent.RNNBase": INSIDE,
    **{
        f"fp8_ops.{fn}_{way}": RULES
        for fn in ("in_q", "in_qdq", "out_dq", "out_qdq", "quantized_dot")
        for way in ("fwd", "bwd")
    },
    "fp8_ops.dot_general_with_precision_jvp": RULES,
    "fp8_ops.dot_general_transpose_lhs": RULES,
    "fp8_ops.dot_general_transpose_rhs": RULES,
    "fp8_ops.Fp8MetaTyRules": INSIDE,
    "fp8_ops.fp8_meta_dtype": INSIDE,
    "fp8_ops.fp8_meta_dtype_wrapper": INSIDE,
    "fp8_ops.fp8_scaled_dot_general": INSIDE,
    "fp8_ops.quantize_dequantize_update": INSIDE,
    "fp8_ops.update_fp8_meta": INSIDE,
}
"""What Flax has and we have not, and why; everything else is there, with all of its parameters."""


def modules() -> Iterator[tuple[str, Any, Any]]:
    """The namespace and its modules: name, ours, Flax's."""
    yield "", nn, flax.linen
    for name in MODULES:
        yield name, getattr(nn, name), getattr(flax.linen, name)


def public(module: types.ModuleType) -> dict[str, Any]:
    """The classes and functions of Flax that are a module's own; of the namespace, all."""
    found = {n: getattr(module, n) for n in dir(module) if not n.startswith("_")}
    return {
        n: v
        for n, v in found.items()
        if callable(v) and str(getattr(v, "__module__", "")).startswith(module.__name__)
    }


def parameters(fn: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return {}


def plain(default: Any) -> Any:
    """A default as something that compares: functions alike, mappings as dicts, no sentinels."""
    if isinstance(default, Mapping):
        return {str(k): plain(v) for k, v in default.items()} or None
    if isinstance(default, list | tuple):
        return [plain(v) for v in default]
    if default is tuple or (callable(default) and not isinstance(default, type)):
        return "a function"  # that initializers draw the same numbers is seen in the matrix
    if type(default).__module__.startswith(("flax.", "shardflax.")):
        return "an object of the library"
    return default


def differences(name: str, ours: Any, theirs: Any) -> Iterator[str]:
    found = parameters(ours)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in found.values())
    for parameter, expected in parameters(theirs).items():
        if expected.kind in (expected.VAR_POSITIONAL, expected.VAR_KEYWORD) or parameter == "self":
            continue
        if parameter not in found:
            if not takes_all:
                yield f"{name}.{parameter}: missing"
            continue
        default = found[parameter].default
        if repr(plain(default)) != repr(plain(expected.default)):
            yield f"{name}.{parameter}: {default!r} instead of {expected.default!r}"


def methods(cls: Any) -> Iterator[str]:
    """The methods of a class that its users call, without those that all modules have."""
    for name in dir(cls):
        if (name == "__call__" or not name.startswith("_")) and callable(getattr(cls, name)):
            inherited = cls is not flax.linen.Module and hasattr(flax.linen.Module, name)
            if not inherited or getattr(cls, name) is not getattr(flax.linen.Module, name):
                yield name


def compared() -> Iterator[str]:
    """Everything that differs, over all modules."""
    for module, ours, theirs in modules():
        for name, value in public(theirs).items():
            dotted = f"{module}.{name}" if module else name
            if not hasattr(ours, name):
                yield f"{dotted}: missing"
                continue
            yield from differences(dotted, getattr(ours, name), value)
            for method in methods(value) if isinstance(value, type) else ():
                where = f"{dotted}.{method}"
                if hasattr(getattr(ours, name), method):
                    own = getattr(getattr(ours, name), method)
                    yield from differences(where, own, getattr(value, method))
                else:
                    yield f"{where}: missing"


def test_everything_that_flax_takes() -> None:
    found = sorted(compared())
    assert [line for line in found if line.partition(":")[0] not in NOT_OURS] == []
    assert NOT_OURS.keys() <= {line.partition(":")[0] for line in found}, "some are there by now"


def test_a_missing_parameter_and_another_default_are_found() -> None:
    def ours(x: Any, *, dtype: Any = None) -> None: ...

    def theirs(x: Any, features: int, dtype: Any = jnp.float32) -> None: ...

    found = list(differences("layer", ours, theirs))
    assert [line.partition(":")[0] for line in found] == ["layer.features", "layer.dtype"]
