"""Arrays that a compiled program holds whole, or more of than was asked, without a word."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardflax.partitioning.errors import SilentReplicationError
from shardflax.partitioning.given import check_program
from shardflax.partitioning.hlo import parse
from shardflax.partitioning.layout import Layout, check_layout
from shardflax.partitioning.leaf import Leaf
from shardflax.partitioning.operations import repeated_operations
from shardflax.partitioning.paths import Path, keys_of, path_text
from shardflax.partitioning.scope import free_axes
from shardflax.partitioning.spec_check import canonical_spec
from shardflax.partitioning.untyped import jx
from shardflax.partitioning.whole_values import WholeValue, whole_values

__all__ = ["Replication", "assert_compiled", "check_compiled"]


@dataclass(frozen=True)
class Replication:
    """One array that lies otherwise than asked, or whole without anybody having said so.

    `what` is `argument`, `result`, `leaf` (of the layout), `operation`, `value` or `donation`;
    `asked` and `found` are specs (None where nothing asks, or no spec says it); `bytes` is what
    each device holds, `wasted` what it need not.

    >>> print(
    ...     Replication("leaf", "params/w", (8, 4), 128, 112, None, jx.P(), "no name", "Name it.")
    ... )
    params/w, leaf (8, 4): 128 B on each device, 112 B of them in vain: no name. Name it.
    """

    what: str
    path: str
    shape: tuple[int, ...]
    bytes: int
    wasted: int
    asked: PartitionSpec | None
    found: PartitionSpec | None
    why: str
    cure: str

    def __str__(self) -> str:
        where = self.path or "outside of all modules"
        specs = "" if self.asked is None else f" Asked: {self.asked}, found: {self.found}."
        size = f"{self.bytes} B on each device, {self.wasted} B of them in vain"
        return f"{where}, {self.what} {self.shape}: {size}: {self.why}.{specs} {self.cure}"


def check_compiled(
    compiled: Any,
    layout: Layout,
    *,
    lowered: Any = None,
    above: int = 1 << 20,
    accept: Sequence[str] = (),
) -> list[Replication]:
    """What a compiled program holds whole that `layout`, or nobody, said; the largest waste first.

    - leaves of the layout among the program's arguments and results (found by path and shape)
      that lie otherwise than the layout says;
    - leaves that nothing names, or whose rules gave up every axis, so that they are replicated;
    - other arguments and results that are replicated on every device;
    - with `lowered` (what was compiled): matrix products and convolutions that several devices
      do in full, though the constraint on the result, or the mesh, would cut them; and other
      values that every device holds whole, if they have not the shape of a leaf;
    - donated buffers that the program does not use again.

    What wastes no more than `above` bytes a device is left out, and so are the paths that a
    pattern in `accept` matches (`"params/*/scale"`).  A leaf that lies otherwise is never left
    out for its size.  Raises nothing of what it finds; see `assert_compiled`.

    >>> import jax, jax.numpy as jnp
    >>> from shardflax.partitioning import LogicallyPartitioned, make_mesh, preset
    >>> state = {"w": LogicallyPartitioned(jnp.ones((8, 8)), ("embed", "mlp"))}
    >>> layout = Layout(state, make_mesh("fsdp=8"), preset("fsdp"))
    >>> compiled = (
    ...     jax.jit(lambda s: s["w"].sum(), in_shardings=jax.NamedSharding(layout.mesh, jax.P()))
    ...     .lower({"w": jnp.ones((8, 8))})
    ...     .compile()
    ... )
    >>> [(f.path, f.asked, f.found, f.wasted) for f in check_compiled(compiled, layout)]
    [('w', P('fsdp',), P(), 224)]
    """
    check_layout(layout)
    check_program(compiled)
    found = [
        *_placed(compiled, layout),
        *(one for leaf in layout.leaves for one in _unsaid(leaf, layout)),
        *_donated(compiled),
    ]
    if lowered is not None:
        text = lowered.as_text(debug_info=True)
        program = parse(compiled.as_text())
        for one in repeated_operations(program, text, layout.mesh):
            found.append(_operation(one, layout))
        known = {shape for leaf in layout.leaves for shape in (leaf.shape, leaf.shape[1:])}
        for value in whole_values(program, text, known, above):
            found.append(_value(value, layout))
    kept = [one for one in found if one.wasted > above or one.why == _OTHERWISE]
    accept = (accept,) if isinstance(accept, str) else accept
    kept = [one for one in kept if not any(fnmatch.fnmatch(one.path, p) for p in accept)]
    return sorted(kept, key=lambda one: -one.wasted)


def assert_compiled(
    compiled: Any,
    layout: Layout,
    *,
    lowered: Any = None,
    above: int = 1 << 20,
    accept: Sequence[str] = (),
) -> None:
    """Raises `SilentReplicationError` with everything that `check_compiled` finds, if anything.

    >>> import jax, jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh, preset
    >>> layout = Layout({}, make_mesh("fsdp=8"), preset("fsdp"))
    >>> assert_compiled(jax.jit(lambda x: x + 1).lower(1.0).compile(), layout)
    """
    found = check_compiled(compiled, layout, lowered=lowered, above=above, accept=accept)
    if found:
        wasted = sum(one.wasted for one in found)
        number = "one array" if len(found) == 1 else f"{len(found)} arrays"
        head = f"the program holds {number} otherwise than was said, {wasted} B a device in vain"
        lines = [f"{head}:", *(f"- {one}" for one in found)]
        raise SilentReplicationError("\n".join(lines), found)


_OTHERWISE = "it lies otherwise than the layout says"


def _placed(compiled: Any, layout: Layout) -> Iterator[Replication]:
    """Arguments and results that lie otherwise than their leaf, or are nobody's and replicated."""
    leaves = {leaf.path: leaf for leaf in layout.leaves}
    for what, path, value, sharding in _arrays(compiled):
        shape, itemsize = tuple(value.shape), np.dtype(_plain(value.dtype)).itemsize
        held = math.prod(sharding.shard_shape(shape)) * itemsize
        leaf = _leaf_at(path, shape, leaves)
        spec = _spec(sharding, layout)
        if leaf is not None:
            wanted = NamedSharding(layout.mesh, leaf.spec)
            if not sharding.is_equivalent_to(wanted, len(shape)):
                yield Replication(
                    what=what,
                    path=leaf.where,
                    shape=shape,
                    bytes=held,
                    wasted=max(held - leaf.bytes_per_device, 0),
                    asked=leaf.spec,
                    found=spec,
                    why=_OTHERWISE,
                    cure=_PLACE[what],
                )
        elif sharding.is_fully_replicated and len(sharding.device_set) > 1 < value.size:
            yield Replication(
                what=what,
                path=path_text(path),
                shape=shape,
                bytes=held,
                wasted=held - held // len(sharding.device_set),
                asked=None,
                found=spec,
                why="it is replicated, and the layout knows nothing of it",
                cure=_LAY_OUT[what],
            )


_PLACE = {
    "argument": "Place the state by the layout (init_sharded, or jax.device_put(state, "
    "layout.shardings)) before lowering, or pass in_shardings=layout.shardings.",
    "result": "Pass out_shardings=layout.shardings for this result.",
}
_LAY_OUT = {
    "argument": "Lay it out before it is passed: batch_sharding(mesh, rules) for a batch.",
    "result": "Constrain it by its names (with_logical_constraint) before it is returned.",
}


def _arrays(compiled: Any) -> Iterator[tuple[str, Path, Any, Any]]:
    """Arguments and results with their paths, shapes and shardings."""
    sides = (
        ("argument", compiled.in_avals, compiled.input_shardings),
        ("result", compiled.out_info, compiled.output_shardings),
    )
    for what, values, shardings in sides:
        placed = dict(jx.tree_util.tree_leaves_with_path(shardings))
        for path, value in jx.tree_util.tree_leaves_with_path(values):
            sharding = placed.get(path)
            if hasattr(sharding, "shard_shape"):
                yield what, _named_path(what, keys_of(path)), value, sharding


def _named_path(what: str, path: Path) -> Path:
    """The path with a word for what its first number is."""
    side = "kwargs" if path and path[0] == 1 else "args"
    return (side, *path[1:]) if what == "argument" else (what, *path)


def _leaf_at(path: Path, shape: tuple[int, ...], leaves: dict[Path, Leaf]) -> Leaf | None:
    """The leaf whose path ends `path`, the longest first; only one of that shape can be it."""
    for start in range(len(path)):
        leaf = leaves.get(path[start:])
        if leaf is not None and leaf.shape == shape:
            return leaf
    return None


def _plain(dtype: Any) -> Any:
    """A dtype that has a size: of the numbers in a key, for one."""
    return "uint32" if "key<" in str(dtype) else dtype


def _spec(sharding: Any, layout: Layout) -> PartitionSpec | None:
    if isinstance(sharding, NamedSharding):
        return canonical_spec(sharding.spec, dict(free_axes(layout.mesh)))
    return PartitionSpec() if sharding.is_fully_replicated else None


def _unsaid(leaf: Leaf, layout: Layout) -> Iterator[Replication]:
    """A leaf that is replicated though no name and no rule says so."""
    gave_up = {f"{axis} ({why})": None for dim in leaf.dims for axis, why in dim.given_up}
    if leaf.spec != PartitionSpec() or layout.mesh.size == 1 or leaf.problems:
        return
    if leaf.names is None:
        why = "nothing names its dims, so it is replicated"
        cure = "Give its parameter names (kernel_axes=..., named(init, names)); None for a dim "
        cure += "that is replicated."
    elif gave_up:
        why = f"its names {leaf.names!r} resolve to nothing: given up {', '.join(gave_up)}"
        cure = "Name an axis of this mesh in a rule of one of them, or say None."
    else:
        return
    size = leaf.bytes_per_device
    yield Replication(
        what="leaf",
        path=leaf.where,
        shape=leaf.shape,
        bytes=size,
        wasted=size - size // layout.mesh.size,
        asked=None,
        found=leaf.spec,
        why=why,
        cure=cure,
    )


def _operation(one: Any, layout: Layout) -> Replication:
    again = f"{one.times} devices each do the same part of this {one.operation} ({one.source})"
    return Replication(
        what="operation",
        path=one.path,
        shape=one.shape,
        bytes=one.bytes,
        wasted=one.bytes - one.bytes // one.times,
        asked=None if one.asked is None else canonical_spec(one.asked, dict(layout.mesh.shape)),
        found=None,
        why=again,
        cure="Constrain what goes in by its names, so that the axes cut it before.",
    )


def _value(value: WholeValue, layout: Layout) -> Replication:
    return Replication(
        what="value",
        path=value.path,
        shape=value.shape,
        bytes=value.bytes,
        wasted=value.bytes - value.bytes // layout.mesh.size,
        asked=None,
        found=PartitionSpec(),
        why=f"every device holds the whole result of this {value.operation} ({value.source})",
        cure="Constrain it by its names, here or where it comes from.",
    )


def _donated(compiled: Any) -> Iterator[Replication]:
    """Donated arguments that no result takes the place of."""
    infos = jx.tree_util.tree_leaves_with_path(compiled.args_info)
    placed = dict(jx.tree_util.tree_leaves_with_path(compiled.input_shardings))
    head = compiled.as_text().partition("\n")[0]
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", head)
    used = {int(n) for n in re.findall(r": \((\d+),", aliased[1])} if aliased else set[int]()
    kept = [(path, info) for path, info in infos if hasattr(placed.get(path), "shard_shape")]
    if len(re.findall(r"\[", head.partition("->")[0].partition("layout={(")[2])) != len(kept):
        return  # some argument is no parameter of the program: numbers mean nothing
    for number, (path, info) in enumerate(kept):
        if info.donated and number not in used:
            part = placed[path].shard_shape(tuple(info.shape))
            size = math.prod(part) * np.dtype(_plain(info.dtype)).itemsize
            yield Replication(
                what="donation",
                path=path_text(_named_path("argument", keys_of(path))),
                shape=tuple(info.shape),
                bytes=size,
                wasted=size,
                asked=None,
                found=None,
                why="it is donated, and no result takes its place",
                cure="Return a result of its shape, dtype and layout, or do not donate it.",
            )
