"""Presets beside one another, by what can be known of them without compiling anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from shardflax.partitioning.at_use import spec_at_use
from shardflax.partitioning.errors import Problem
from shardflax.partitioning.explained import MeshExplained, mesh_of_spec
from shardflax.partitioning.explanation import explain
from shardflax.partitioning.given import check_strict
from shardflax.partitioning.layout import Layout
from shardflax.partitioning.leaf import Leaf
from shardflax.partitioning.paths import Path
from shardflax.partitioning.presets import PRESETS, preset
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.scope import AnyMesh, free_axes
from shardflax.partitioning.spec_check import spec_axes, spec_parts
from shardflax.partitioning.untyped import jx

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "PresetCost", "compare_presets", "costs_on"]

_BESIDE = ("batch", "length")  # the dims over which an activation is spread, and its weight is not
_BESIDE_EXPERTS = ("moe_batch", "length")


@dataclass(frozen=True)
class PresetCost:
    """What a preset costs a device on one mesh, in bytes.

    `presets` are those that mean the same on this mesh.  `params`, `rest` (the optimizer's and all
    other state) and `batch` are held.  `gathered` and `summed` are sent in a train step for weights
    and gradients: weights gathered for the forward pass and again for the backward pass, updates
    gathered where the optimizer's state is spread further, and gradients summed over the axes of
    the batch and the length; `across` is what of it is sent over axes that cross slices.  `idle`
    are mesh axes that nothing uses, `problems` what is wrong with the layout.

    >>> PresetCost(("dp",), "data=8", 4096, 8192, 64, 0, 4096, 0).held
    12352
    """

    presets: tuple[str, ...]
    mesh: str
    params: int
    rest: int
    batch: int
    gathered: int
    summed: int
    across: int
    idle: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def held(self) -> int:
        """The bytes of state and batch on each device."""
        return self.params + self.rest + self.batch

    @property
    def title(self) -> str:
        """What the presets are called."""
        return ", ".join(self.presets)


@dataclass(frozen=True)
class Comparison:
    """Presets beside one another; printed, a table.

    Those of which a device holds least come first; those that leave an axis idle, and then those
    that are wrong, come last.

    >>> large = PresetCost(("dp",), "data=8", 8, 0, 0, 0, 8, 0)
    >>> small = PresetCost(("fsdp",), "fsdp=8", 1, 0, 0, 16, 8, 0)
    >>> [row.title for row in Comparison((large, small)).rows]
    ['fsdp', 'dp']
    """

    rows: tuple[PresetCost, ...]
    title: str = ""

    def __post_init__(self) -> None:
        ordered = sorted(self.rows, key=lambda row: (bool(row.problems), bool(row.idle), row.held))
        object.__setattr__(self, "rows", tuple(ordered))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        rows = [
            {**asdict(replace(row, problems=())), "held": row.held,
             "problems": [str(problem) for problem in row.problems]}
            for row in self.rows
        ]  # fmt: skip
        return {"format": "shardflax.comparison", "version": 1, "title": self.title, "rows": rows}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        from shardflax.partitioning.compare_text import comparison_text

        return comparison_text(self)

    def __rich__(self) -> Table:
        from shardflax.partitioning.compare_text import comparison_table

        return comparison_table(self)


def compare_presets(
    what: Any,
    mesh: AnyMesh | str | Sequence[AnyMesh | str],
    *args: Any,
    presets: Iterable[str | AxisRules] = tuple(PRESETS),
    batch: Any = None,
    batch_names: tuple[str | None, ...] = _BESIDE,
    title: str = "",
    **kwargs: Any,
) -> Comparison:
    """Compares presets for a state, on one mesh or several, and compiles and allocates nothing.

    `what`, `args` and `kwargs` are those of `explain`: a module with its inputs, a function that
    makes a train state, or a state.  `mesh` is one, or a sequence of meshes or specs of any size;
    `presets` are names, sums of names, or rules.  `batch` is a tree of shapes, whose dims have
    `batch_names`.

    What is held is exact.  What is sent is counted from names and specs, for weights and gradients
    alone (a weight whose input needs no gradient is gathered once less, one in a loop that is
    rematerialised as a whole once more).
    What a model sends for its activations, under `tp_sp` above all, and what those hold, is in the
    compiled program: `collectives`, or `shardflax lock`.

    Raises `UnknownPresetError`, and what `explain` raises.

    >>> import jax, jax.numpy as jnp
    >>> import shardflax.nn as nn
    >>> x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    >>> model = nn.Dense(256, use_bias=False)
    >>> for row in compare_presets(model, ["data=8", "fsdp=8"], x, presets=["dp", "fsdp"]).rows:
    ...     print(row.title, row.mesh, row.held, row.gathered, row.summed, row.idle)
    fsdp fsdp=8 8192 131072 65536 ()
    dp, fsdp data=8 65536 0 65536 ()
    dp fsdp=8 65536 0 0 ('fsdp',)
    """
    several = [mesh] if isinstance(mesh, str | Mesh | AbstractMesh) else mesh
    placed = [
        mesh_of_spec(one) if isinstance(one, str) else (one, dict[str, int]()) for one in several
    ]
    about = presets, what, args, kwargs, batch, batch_names
    return Comparison(tuple(row for one in placed for row in costs_on(*one, *about)), title)


def costs_on(
    mesh: AnyMesh,
    dcn: dict[str, int],
    presets: Iterable[str | AxisRules],
    init: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    batch: Any = None,
    batch_names: tuple[str | None, ...] = _BESIDE,
) -> list[PresetCost]:
    """The rows of one mesh, of which `dcn` says the sizes across slices if it has no devices.

    >>> from shardflax.partitioning import make_mesh
    >>> [row.title for row in costs_on(make_mesh("data=8"), {}, ["dp", "fsdp"], lambda: {})]
    ['dp, fsdp']
    """
    alike: dict[Any, list[AxisRules]] = {}
    for one in presets:
        rules = preset(one) if isinstance(one, str) else one
        check_strict(rules)
        alike.setdefault(_meaning(rules, mesh), []).append(rules)
    rows: list[PresetCost] = []
    for same in alike.values():
        layout = explain(init, mesh, same[0], *args, **(kwargs or {})).layout
        titles = tuple(dict.fromkeys(rules.title for rules in same))
        rows.append(_cost(titles, layout, same[0], batch, batch_names, dcn))
    return rows


def _meaning(rules: AxisRules, mesh: AnyMesh) -> Any:
    """All that `rules` say on this mesh: those of one meaning make one layout."""
    large = {axis for axis, size in mesh.shape.items() if size > 1}
    tables = tuple(
        tuple((name, tuple(a for a in axes if a.rstrip("?") in large)) for name, axes in one)
        for one in (rules.stored, rules.compute, rules.optimizer)
    )
    return tables, rules.param_overrides, rules.activation_overrides, rules.min_size


def _cost(
    titles: tuple[str, ...],
    layout: Layout,
    rules: AxisRules,
    batch: Any,
    names: tuple[Any, ...],
    dcn: dict[str, int],
) -> PresetCost:
    """The row of one layout."""
    mesh = MeshExplained.of(layout.mesh, dcn)
    slow = {axis.name for axis in mesh.axes if axis.dcn > 1}
    params = [leaf for leaf in layout.leaves if layout.is_parameter(leaf)]
    spread = _spread_further(layout)
    sent = [_sent(leaf, layout, rules, spread.get(leaf.path, set())) for leaf in params]
    across = sum(one.gathered for one in sent if one.over & slow)
    across += sum(one.summed for one in sent if one.among & slow)
    held = sum(leaf.bytes_per_device for leaf in params)
    rows, wrong = _batch(batch, names, layout, rules)
    idle = tuple(axis for axis in layout.unused_axes if axis not in rules.roles.batch)
    return PresetCost(
        presets=titles,
        mesh=str(mesh),
        params=held,
        rest=layout.bytes_per_device - held,
        batch=rows,
        gathered=sum(one.gathered for one in sent),
        summed=sum(one.summed for one in sent),
        across=across,
        idle=idle,
        problems=(*layout.problems, *wrong),
    )


@dataclass(frozen=True)
class _Sent:
    """What a step sends for one parameter: bytes gathered and summed, and over which axes."""

    gathered: int
    over: set[str]
    summed: int
    among: set[str]


def _spread_further(layout: Layout) -> dict[Path, set[str]]:
    """Of each parameter the axes over which its optimizer state lies, and it does not."""
    params = [leaf for leaf in layout.leaves if layout.is_parameter(leaf)]
    below = {layout.below(leaf): leaf for leaf in params}
    lengths = {len(path) for path in below}
    found: dict[Path, set[str]] = {}
    for leaf in layout.leaves:
        if leaf.rule_set == "optimizer":
            for length in lengths:
                owner = below.get(leaf.path[-length:])
                if owner is not None and owner.shape == leaf.shape:
                    found.setdefault(owner.path, set()).update(_axes(leaf.spec) - _axes(owner.spec))
    return found


def _sent(leaf: Leaf, layout: Layout, rules: AxisRules, updates: set[str]) -> _Sent:
    axes, names = free_axes(layout.mesh), leaf.names or ()
    beside, used = _BESIDE_EXPERTS if "expert" in names else _BESIDE, leaf.spec
    if leaf.dims and not leaf.problems:  # names, and strict rules for them
        found = spec_at_use(names, rules, leaf.shape, axes, beside)
        used = used if found is None else found
    size = math.prod(leaf.shape) * int(leaf.dtype.itemsize)
    at_use = size // spec_parts(used, dict(axes))
    over = _axes(leaf.spec) - _axes(used)
    gathered = (2 * at_use if over else 0) + (leaf.bytes_per_device if updates else 0)
    busy = {axis.rstrip("?") for name in beside for axis in rules.compute.get(name) or ()}
    among = {axis for axis, size in axes if size > 1 and axis in busy} - _axes(used)
    return _Sent(gathered, over | updates, at_use if among else 0, among)


def _axes(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in spec_axes(entry)}


def _batch(
    batch: Any, names: tuple[Any, ...], layout: Layout, rules: AxisRules
) -> tuple[int, tuple[Problem, ...]]:
    """The bytes of a batch on each device, and what is wrong with its names or sizes."""
    axes = free_axes(layout.mesh)
    held, problems = 0, list[Problem]()
    for leaf in jx.tree.leaves(batch):
        shape = tuple(leaf.shape)
        said = names[: len(shape)] + (None,) * (len(shape) - len(names))
        found = resolve(said, rules.compute, shape, axes)
        problems += [replace(p, where="batch") for p in found.problems]
        held += math.prod(shape) * int(leaf.dtype.itemsize) // spec_parts(found.spec, dict(axes))
    return held, tuple(dict.fromkeys(problems))
