"""Tables: what a module is made of, what goes in and out, what is stored and what it costs.

Everything is found out by one abstract run of `init`, without arithmetic or memory for arrays.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from shardflax.core import boxes, run
from shardflax.core.boundary import Lift
from shardflax.core.calls import context, intercept_methods
from shardflax.core.cross import cross
from shardflax.core.names import CollectionFilter
from shardflax.core.staging import jx

__all__ = ["Row", "Sharding", "module_paths", "rows", "show_sharding", "tabulate"]


@dataclass(frozen=True)
class Row:
    """One call of a method of a module: what went in and came out, as shapes, and what it costs.

    `flops` and `vjp_flops` are those of the forward pass, and of forward and backward pass
    together; `None` if they were not asked for.

    >>> Row(("a",), None, "__call__", (1,), {}, 2).title
    'a'
    """

    path: tuple[str, ...]
    module: Any
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Any
    flops: int | None = None
    vjp_flops: int | None = None

    @property
    def title(self) -> str:
        """The path as text; empty for the root."""
        return "/".join(self.path)


def tabulate(
    module: Any,
    rngs: Any,
    depth: int | None = None,
    show_repeated: bool = False,
    mutable: CollectionFilter = run.INIT_MUTABLE,
    console_kwargs: Mapping[str, Any] | None = None,
    table_kwargs: Mapping[str, Any] | None = None,
    column_kwargs: Mapping[str, Any] | None = None,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **kwargs: Any,
) -> Callable[..., str]:
    """A function of the arguments of a module that returns a table of its submodules, as text.

    Arrays among the arguments may be `jax.ShapeDtypeStruct`.  `depth` cuts off submodules, whose
    variables are then counted where they are cut.  `show_repeated` shows every call, not only the
    first of each module.  `console_kwargs`, `table_kwargs` and `column_kwargs` go to rich's
    `Console`, `Table` and `Table.add_column`; `kwargs` go to the module.

    FLOPs are XLA's estimates for one call, also of modules inside of a lifted transform.

    Where a mesh and rules are in scope (`partitioning.use`), or given as `mesh=` and `rules=` to a
    module whose call has no such arguments of its own, there are columns for the names, the spec
    and the bytes per device of each variable.

    >>> import shardflax.nn as nn
    >>> table = tabulate(nn.Dense(2), jax.random.key(0), console_kwargs={"force_terminal": False})
    >>> print(table(jnp.ones((4, 3))))
    <BLANKLINE>
                                   Dense Summary...
    ┏━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━┓
    ┃ path ┃ module ┃ inputs       ┃ outputs      ┃ params               ┃
    ┡━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━┩
    │      │ Dense  │ float32[4,3] │ float32[4,2] │ bias: float32[2]     │
    │      │        │              │              │ kernel: float32[3,2] │
    │      │        │              │              │                      │
    │      │        │              │              │ 8 (32 B)             │
    ├──────┼────────┼──────────────┼──────────────┼──────────────────────┤
    │      │        │              │        Total │ 8 (32 B)             │
    └──────┴────────┴──────────────┴──────────────┴──────────────────────┘
    <BLANKLINE>
                          Total Parameters: 8 (32 B)...
    """
    costs = _Costs(compute_flops, compute_vjp_flops)

    def make(*fn_args: Any, **fn_kwargs: Any) -> str:
        given, sharding = _sharding(module, {**kwargs, **fn_kwargs})
        with sharding.scope() if sharding else contextlib.nullcontext():
            found, variables = rows(module, rngs, fn_args, given, mutable, costs)
        lies = sharding.lies(variables) if sharding else None
        shown = _shown(found, depth, show_repeated)
        title, texts = type(module).__name__, (table_kwargs, column_kwargs)
        table = _table(title, shown, variables, costs, lies, *texts)
        return _render(table, console_kwargs)

    return make


def module_paths(
    module: Any,
    rngs: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    show_repeated: bool = False,
    mutable: CollectionFilter = run.INIT_MUTABLE,
) -> dict[str, Any]:
    """The modules that a run of `init` calls, unbound, by their paths.

    >>> import shardflax.nn as nn
    >>> sorted(module_paths(nn.Dense(2), jax.random.key(0), (jnp.ones((1, 2)),), {}))
    ['']
    """
    found, _ = rows(module, rngs, args, kwargs, mutable, _Costs())
    return {row.title: row.module for row in _shown(found, None, show_repeated)}


# --- how variables lie on a mesh


class Sharding(Protocol):
    """What `partitioning` knows of a mesh and rules.

    >>> hasattr(Sharding, "lies")
    True
    """

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Puts the mesh and the rules in scope."""
        ...

    def lies(self, variables: Any) -> Mapping[tuple[str, ...], tuple[str, str, int]]:
        """Names, spec and bytes per device of each array, by its path with the collection."""
        ...


_show: list[Callable[[Any, Any], Sharding | None]] = []


def show_sharding(make: Callable[[Any, Any], Sharding | None]) -> None:
    """Tells tables how to find out: `make(mesh, rules)`, each None for the one in scope.

    >>> import shardflax.partitioning  # does so
    >>> len(_show)
    1
    """
    _show[:] = [make]


def _sharding(module: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Sharding | None]:
    """The arguments that are the module's, and how its variables lie, if anything says so."""
    own = inspect.signature(type(module).__call__).parameters
    takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in own.values())
    names = [] if takes_any else [n for n in ("mesh", "rules") if n in kwargs and n not in own]
    said = {name: kwargs.pop(name) for name in names}
    return kwargs, _show[0](said.get("mesh"), said.get("rules")) if _show else None


# --- finding out


@dataclass(frozen=True)
class _Costs:
    """Which costs are asked for."""

    flops: bool = False
    vjp_flops: bool = False


def rows(
    module: Any,
    rngs: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mutable: CollectionFilter,
    costs: _Costs,
) -> tuple[list[Row], dict[str, Any]]:
    """The calls of a run of `init`, each before those made in it, and the variables as shapes.

    >>> import shardflax.nn as nn
    >>> found, _ = rows(nn.Dense(2), jax.random.key(0), (jnp.ones((1, 2)),), {}, True, _Costs())
    >>> [row.method for row in found]
    ['__call__']
    """
    found: list[Row | None] = []

    def record(call: Any, call_args: Any, call_kwargs: Any, told: Any) -> Any:
        if told.method_name == "setup":
            return call(*call_args, **call_kwargs)
        place = len(found)
        found.append(None)
        result = call(*call_args, **call_kwargs)
        counted = _count(told, call_args, call_kwargs, costs)
        found[place] = Row(
            told.module.path,
            told.module.clone(_deep_clone=True, _reset_names=True, name=None),
            told.method_name,
            _abstract(call_args),
            _abstract(call_kwargs),
            _abstract(result),
            *counted,
        )
        return result

    leaves, tree = jx.tree.flatten((args, dict(kwargs)))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if _is_array(leaf)}

    def init(rngs: Any, arrays: Any) -> Any:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        init_args, init_kwargs = jx.tree.unflatten(tree, filled)
        with intercept_methods(record):
            return module.init(rngs, *init_args, mutable=mutable, **init_kwargs)

    variables = jx.eval_shape(init, rngs, arrays)
    return [row for row in found if row is not None], variables


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _abstract(tree: Any) -> Any:
    """`tree` with shapes for arrays."""

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x

    return jx.tree.map(shape, tree, is_leaf=_is_array)


def _count(told: Any, args: Any, kwargs: Any, costs: _Costs) -> tuple[int | None, int | None]:
    """What a call costs: it is lowered once more, as it is inside of any transform around it."""
    if not (costs.flops or costs.vjp_flops):
        return None, None
    counted: list[int | None] = [None, None]

    def measure(pure: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        forward = _Forward(_applied(pure), state, args, kwargs)
        if costs.flops:
            counted[0] = _flops(forward.output, forward.arrays)
        if costs.vjp_flops:
            counted[1] = _flops(forward.both, forward.arrays, forward.shapes())
        pure.traced(tuple(entry.node for entry in pure.entries))
        nothing: dict[str, Any] = {}
        return None, (tuple(nothing for _ in pure.entries),)

    node = told.module.scope.node
    cursor, node.cursor = node.cursor, {}  # the method has not ended: names are numbered anew
    interceptors, context.interceptors = context.interceptors, []
    fn = getattr(told.module.__class__, told.method_name)
    try:
        cross(Lift(measure), [fn], (told.module, *args), kwargs, fn)
    finally:
        node.cursor, context.interceptors = cursor, interceptors
    return counted[0], counted[1]


def _applied(pure: Any) -> Any:
    """The same, as in `apply`, and leaving no trace."""
    entries = tuple(replace(entry, flags=()) for entry in pure.entries)
    return replace(pure, entries=entries, traced=_forget)


def _forget(nodes: Any) -> None:
    """Takes no note of names and keys used."""


class _Forward:
    """The inside of a boundary as a function of its arrays."""

    def __init__(self, pure: Any, state: Any, args: Any, kwargs: Any) -> None:
        self.pure = pure
        self.leaves, self.tree = jx.tree.flatten((state, args, kwargs))
        shapes = _abstract(self.leaves)
        self.arrays = {i: x for i, x in enumerate(shapes) if _is_array(x)}

    def output(self, arrays: dict[int, Any]) -> Any:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        state, args, kwargs = jx.tree.unflatten(self.tree, filled)
        result = self.pure(state, *args, **kwargs)[0]
        return [x for x in jx.tree.leaves(result) if _is_array(x)]

    def shapes(self) -> list[Any]:
        return jx.eval_shape(self.output, self.arrays)

    def both(self, arrays: dict[int, Any], cotangents: list[Any]) -> Any:
        """The output, and what comes back to the floating point arrays that went in."""
        moved = {i: x for i, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
        fixed = {i: x for i, x in arrays.items() if i not in moved}

        def outputs(moved: dict[int, Any]) -> Any:
            out = self.output({**fixed, **moved})
            return [x for x in out if jnp.issubdtype(x.dtype, jnp.inexact)]

        out, pull = jx.vjp(outputs, moved)
        return out, pull([x for x in cotangents if jnp.issubdtype(x.dtype, jnp.inexact)])


def _flops(fn: Callable[..., Any], *shapes: Any) -> int:
    analysis: Any = jx.jit(fn).lower(*shapes).cost_analysis()
    return int(analysis["flops"]) if analysis and "flops" in analysis else 0


def _shown(found: list[Row], depth: int | None, show_repeated: bool) -> list[Row]:
    """The rows to show: all, or the first of each path."""
    if depth is not None:
        found = [row for row in found if len(row.path) <= depth]
    if show_repeated:
        return found
    first: dict[tuple[str, ...], Row] = {}
    for row in found:
        first.setdefault(row.path, row)
    return list(first.values())


# --- the table


def _table(
    title: str,
    found: list[Row],
    variables: Mapping[str, Any],
    costs: _Costs,
    lies: Mapping[tuple[str, ...], tuple[str, str, int]] | None,
    table_kwargs: Mapping[str, Any] | None,
    column_kwargs: Mapping[str, Any] | None,
) -> Any:
    # Here, not above: rich takes longer to import than the core, and few programs print tables.
    from rich.table import Table
    from rich.text import Text

    cols = sorted(variables, key=lambda col: (col == "params", col))
    asked = {"flops": costs.flops, "vjp_flops": costs.vjp_flops}
    heads = ["path", "module", "inputs", "outputs", *(n for n, wanted in asked.items() if wanted)]
    options: dict[str, Any] = {
        "show_header": True,
        "show_lines": True,
        "show_footer": True,
        "title": f"{title} Summary",
        **(table_kwargs or {}),
    }
    table = Table(**options)
    total = {col: _Size.of(variables[col]) for col in cols}
    footers: dict[str, Any] = dict.fromkeys(heads, "")
    footers[heads[-1]] = Text.from_markup("Total", justify="right")
    footers |= {col: total[col].markup() for col in cols}
    if lies is not None:
        variables = boxes.unbox(variables)  # names have a column of their own
        held = sum(size for _, _, size in lies.values())
        footers |= {"names": "", "spec": "", "bytes / device": f"[bold]{_human(held)}[/bold]"}
    for head, footer in footers.items():
        column: dict[str, Any] = {"footer": footer, **(column_kwargs or {})}
        table.add_column(head, **column)
    shown = {row.path for row in found}
    seen: set[tuple[str, ...]] = set()
    for row in found:
        fresh = row.path not in seen
        seen.add(row.path)
        cells = [_own(row.path, variables[col], shown) if fresh else "" for col in cols]
        if lies is not None:
            cells += _own_sharding(row.path, lies, shown) if fresh else ("", "", "")
        counts = [c for c in (row.flops, row.vjp_flops) if c is not None]
        table.add_row(row.title, *_call_cells(row), *map(str, counts), *cells)
    everything = functools.reduce(_Size.__add__, total.values(), _Size(0, 0))
    table.caption_style = "bold"
    table.caption = f"\nTotal Parameters: {everything.markup()}"
    return table


def _call_cells(row: Row) -> tuple[str, str, str]:
    name = type(row.module).__name__
    title = name if row.method == "__call__" else f"{name} [dim]({row.method})[/dim]"
    given = [*row.args, *([dict(row.kwargs)] if row.kwargs else [])]
    inputs = given[0] if len(given) == 1 else given
    return title, _text(inputs), _text(row.outputs)


def _own(path: tuple[str, ...], tree: Any, shown: set[tuple[str, ...]]) -> str:
    """What a module has in a collection: its own variables, and the size with hidden ones."""
    for name in path:
        tree = cast("Any", tree).get(name, {}) if isinstance(tree, Mapping) else {}
    if not isinstance(tree, Mapping):
        return ""
    items = cast("Mapping[str, Any]", tree).items()
    own = {name: value for name, value in items if not isinstance(value, Mapping)}
    size = _hidden(path, tree, shown)
    if not size.count and not own:
        return ""
    lines = _lines(own) if own else []
    return "\n".join([*lines, *([""] if lines else []), f"[bold]{size.markup()}[/bold]"])


def _own_sharding(
    path: tuple[str, ...],
    lies: Mapping[tuple[str, ...], tuple[str, str, int]],
    shown: set[tuple[str, ...]],
) -> tuple[str, str, str]:
    """How a module's own variables lie, a line each, and the bytes with those of hidden modules."""
    own = {where: one for where, one in lies.items() if where[1:-1] == path}
    depth = len(path) + 1
    held = sum(
        size
        for where, (_, _, size) in lies.items()
        if where[1:depth] == path
        and not any(where[1:n] in shown for n in range(depth + 1, len(where)))
    )
    texts = {where[-1]: (names, spec, _human(size)) for where, (names, spec, size) in own.items()}
    columns = ["\n".join(f"{name}: {text[i]}" for name, text in texts.items()) for i in range(3)]
    gap = "\n\n" if own else ""
    return columns[0], columns[1], f"{columns[2]}{gap}[bold]{_human(held)}[/bold]" if held else ""


def _hidden(path: tuple[str, ...], tree: Any, shown: set[tuple[str, ...]]) -> _Size:
    """The size of the variables at a path, and below where no module is shown."""
    size = _Size(0, 0)
    for name, value in cast("Mapping[str, Any]", tree).items():
        below = (*path, name)
        if not isinstance(value, Mapping):
            size = size + _Size.of(value)
        elif below not in shown:
            size = size + _hidden(below, value, shown)
    return size


@dataclass(frozen=True)
class _Size:
    count: int
    nbytes: int

    @classmethod
    def of(cls, tree: Any) -> _Size:
        leaves = [x for x in jx.tree.leaves(boxes.unbox(tree)) if _is_array(x)]
        counts = [math.prod(x.shape) for x in leaves]
        widths = [getattr(x.dtype, "itemsize", 0) for x in leaves]
        return cls(sum(counts), sum(c * w for c, w in zip(counts, widths, strict=True)))

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.count + other.count, self.nbytes + other.nbytes)

    def markup(self) -> str:
        return f"{self.count:,} [dim]({_human(self.nbytes)})[/dim]"


def _human(nbytes: float) -> str:
    units = ["B", "KB", "MB", "GB", "TB"]
    power = min(int(math.log(nbytes, 1000)), len(units) - 1) if nbytes else 0
    number = nbytes / 1000**power
    return f"{number:.1f} {units[power]}" if power else f"{int(nbytes)} B"


# --- values as text: nested like YAML


def _text(value: Any) -> str:
    return "\n".join(_lines(value))


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return [line for name, item in items for line in _entry(f"{name}:", item)]
    if isinstance(value, list | tuple) and not _fields(value):
        items = cast("Iterable[Any]", value)
        return [line for item in items for line in _dashed(_lines(item))]
    fields = _fields(value)
    return _lines(fields) if fields else [_leaf(value)]


def _entry(head: str, item: Any) -> list[str]:
    lines = _lines(item)
    if len(lines) == 1 and not _nests(item):
        return [f"{head} {lines[0]}"]
    indent = "" if isinstance(item, list | tuple) and not _fields(item) else "  "
    return [head, *(indent + line for line in lines)]


def _dashed(lines: list[str]) -> list[str]:
    return [("- " if i == 0 else "  ") + line for i, line in enumerate(lines)] or ["- "]


def _nests(item: Any) -> bool:
    return isinstance(item, Mapping | list | tuple) or bool(_fields(item))


def _fields(value: Any) -> dict[str, Any]:
    """The items of a named tuple."""
    return dict(value._asdict()) if hasattr(value, "_asdict") else {}


def _leaf(value: Any) -> str:
    if boxes.is_box(value):
        names = getattr(value, "names", None)
        held = _leaf(value.unbox())
        return held if names is None else f"{held} [dim]P[/dim]({', '.join(map(str, names))})"
    if _is_array(value):
        shape = ",".join(map(str, value.shape))
        return (
            f"[dim]{jnp.dtype(value.dtype).name if _plain(value) else value.dtype}[/dim][{shape}]"
        )
    if isinstance(value, type) or callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)


def _plain(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jax.dtypes.extended)


def _render(table: Any, console_kwargs: Mapping[str, Any] | None) -> str:
    from rich.console import Console

    options: dict[str, Any] = {
        "force_terminal": True,
        "force_jupyter": False,
        "file": io.StringIO(),
    }
    console = Console(**{**options, **(console_kwargs or {})})
    with console.capture() as capture:
        console.print(table)
    return f"\n{capture.get()}\n"
