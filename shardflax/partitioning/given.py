"""What callers give for rules and for a mesh, looked at before anything is done with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from jax.sharding import AbstractMesh, Mesh

from shardflax.core.module import Module
from shardflax.partitioning.errors import (
    InvalidRuleError,
    LayoutError,
    MeshSpecError,
    NamesRankError,
    kind_of,
)
from shardflax.partitioning.rules import AxisRules

__all__ = ["as_names", "check_init", "check_mesh", "check_program", "check_rules", "check_strict"]


def as_names(names: Any) -> tuple[Any, ...]:
    """Names as a tuple, several axes of one dim too, so that they can be compared and looked up.

    Raises `NamesRankError` for one string, which would be taken by letters.

    >>> as_names(["embed", None]), as_names([["data", "fsdp"], None])
    (('embed', None), (('data', 'fsdp'), None))
    """
    if isinstance(names, str):
        raise NamesRankError(f"names are a tuple, one for each dim: write ({names!r},).")
    if not isinstance(names, Iterable):
        raise NamesRankError(f"names are a tuple, one for each dim, not {kind_of(names)}.")
    every = cast(Iterable[Any], names)
    return tuple([tuple(cast(list[Any], n)) if isinstance(n, list) else n for n in every])


def check_rules(rules: Any, or_none: bool = False) -> None:
    """Raises `InvalidRuleError` unless `rules` are `AxisRules` or a sequence of pairs.

    >>> check_rules([("batch", "data")])
    """
    if isinstance(rules, AxisRules) or (or_none and rules is None):
        return
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        odd = next((one for one in cast(Sequence[Any], rules) if not _is_pair(one)), None)
        if odd is None:
            return
        raise _no_rules(f"{odd!r}. A pair is a name and its axes, ('batch', 'data')")
    raise _no_rules(_found(rules))


def check_strict(rules: Any) -> None:
    """Raises `InvalidRuleError` unless `rules` are `AxisRules`.

    >>> check_strict(AxisRules({}))
    """
    check_rules(rules)
    if not isinstance(rules, AxisRules):
        raise _no_rules("plain pairs, which have no sets. Write AxisRules(...)", "")


def check_mesh(mesh: Any) -> None:
    """Raises `MeshSpecError` unless `mesh` is one, with devices or abstract.

    >>> check_mesh(AbstractMesh((), ()))
    """
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        spec = isinstance(mesh, (str, Mapping))
        found = f"{mesh!r}. Write make_mesh({mesh!r})" if spec else kind_of(mesh)
        raise MeshSpecError(f"a mesh is expected, not {found}.")


def check_program(program: Any) -> None:
    """Raises `LayoutError` unless `program` is compiled.

    >>> import jax
    >>> check_program(jax.jit(lambda x: x).lower(1.0).compile())
    """
    if hasattr(program, "as_text") and not hasattr(program, "compile"):
        return
    how = "compile()" if hasattr(program, "compile") else "jax.jit(fn).lower(...).compile()"
    raise LayoutError(f"a compiled program is expected, not {kind_of(program)}. Write {how}.")


def check_init(init_fn: Any, what: str) -> None:
    """Raises `LayoutError` for a module in the place of a function that makes a state.

    >>> check_init(lambda key: {}, "init_sharded")
    """
    if isinstance(init_fn, Module):
        raise LayoutError(
            f"{what}: {type(init_fn).__name__} is a module, and a function that makes a state is "
            f"expected. Write {what}(model.init, key, x, ...)."
        )


def _is_pair(one: Any) -> bool:
    """True for a rule of Linen's: a name and what it takes."""
    return isinstance(one, (tuple, list)) and len(cast(Sequence[Any], one)) == 2


def _found(rules: Any) -> str:
    """What was given for rules, and what to write."""
    if isinstance(rules, str):
        return f"{rules!r}. Write preset({rules!r})"
    if rules is None:
        return "None. Write () if none are wanted"
    if hasattr(rules, "rules"):
        return f"{kind_of(rules)}. Write the `rules` of it"  # an import, or a layout
    return "a dict. Write AxisRules({...})" if isinstance(rules, Mapping) else kind_of(rules)


def _no_rules(found: str, pairs: str = ", or pairs") -> InvalidRuleError:
    return InvalidRuleError(f"rules are AxisRules{pairs}, not {found}.")
