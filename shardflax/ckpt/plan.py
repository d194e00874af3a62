"""What each process writes of a state: made once for each structure and layout, then reused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from shardflax.ckpt.errors import CheckpointLeafError
from shardflax.ckpt.leaves import LeafSpec, describe, is_key, key_words
from shardflax.ckpt.packing import Kind, kinds
from shardflax.ckpt.paths import Names, Path, Tree, show, storage_names, tree_and_leaves
from shardflax.ckpt.regions import SMALL_BYTES, Box, Part, boxes_of, chunk_shape
from shardflax.ckpt.zarr import storable

__all__ = ["GROUP_BYTES", "Lot", "Piece", "Plan", "Stored", "make_plan", "with_codec"]

GROUP_BYTES = 128 << 20
"""Arrays of about this size are written at once, and are a file."""
_BATCH_BYTES = 32 << 20
"""Small leaves up to this size in all are written at once."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A leaf as it is stored: where, and in chunks of which shape.

    `public` says that other readers find it under its name; `names` are those of its dims, `spec`
    is the mesh axes it was sharded over, and `codec` compresses its chunks.
    """

    path: Path
    leaf: LeafSpec
    name: str
    public: bool
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]
    names: Names = None
    spec: tuple[Any, ...] | None = None
    codec: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a leaf on one device of this process; position -1 is the host value itself."""

    box: Box
    position: int


@dataclasses.dataclass(frozen=True)
class Lot:
    """A box of one leaf that this process writes, put together from pieces.

    `kind` is that of the leaf, if it is one of many that are alike.
    """

    leaf: int
    box: Box
    pieces: tuple[Piece, ...]
    nbytes: int
    small: bool
    kind: Kind | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a state is stored.

    `specs` are those of all leaves (of Python numbers, the values of the state that was planned
    first); `stored` has None for what is not an array with elements.  `parcels` are this process's
    lots, in the groups in which they are written; `mesh` is the sizes of the mesh axes, if there
    is one; `digest` is equal in all processes; `kinds` are those of leaves that are many.
    """

    tree: Tree
    specs: tuple[LeafSpec, ...]
    stored: tuple[Stored | None, ...]
    parcels: tuple[tuple[Lot, ...], ...]
    mesh: dict[str, int]
    digest: str
    kinds: tuple[Kind, ...] = ()

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each parcel."""
        return tuple(sum(lot.nbytes for lot in parcel) for parcel in self.parcels)

    def prepare(self) -> None:
        """Makes the programs that shorten the next save, if this was not the only one so far."""
        for kind in self.kinds:
            if kind.often:
                kind.compile()


def make_plan(state: Any, codec: str | None = None) -> tuple[Plan, list[Any]]:
    """The plan of a state, and its leaves; `codec` compresses large ones.

    Raises CheckpointLeafError for leaves that cannot be stored.

    >>> plan, leaves = make_plan({"w": np.ones((2, 3)), "step": 3})
    >>> [stored and stored.name for stored in plan.stored], len(plan.parcels)
    ([None, 'w'], 1)
    """
    tree, leaves = tree_and_leaves(state)
    forms = tuple(map(_form, tree.paths, leaves))
    key = (tree.treedef, forms, jax.process_index(), jax.process_count(), codec)
    with _LOCK:
        plan = _PLANS.get(key)
        if plan is not None:
            for kind in plan.kinds:
                kind.often = True
        else:
            plan = _PLANS[key] = with_codec(_plan(tree, leaves), codec)
            while len(_PLANS) > 8:
                _PLANS.popitem(last=False)
    return plan, leaves


def with_codec(plan: Plan, codec: str | None) -> Plan:
    """The plan with its large leaves compressed.

    >>> plan, _ = make_plan({"small": np.ones(2), "large": np.ones((1024, 256))})
    >>> [leaf.codec for leaf in with_codec(plan, "zstd").stored]
    ['zstd', None]
    """
    if codec is None:
        return plan
    stored = tuple(
        leaf if leaf is None or leaf.leaf.nbytes <= SMALL_BYTES
        else dataclasses.replace(leaf, codec=codec)
        for leaf in plan.stored
    )  # fmt: skip
    return dataclasses.replace(plan, stored=stored, digest=f"{plan.digest}-{codec}")


_PLANS: collections.OrderedDict[Any, Plan] = collections.OrderedDict()
_LOCK = threading.Lock()


def _form(path: Path, leaf: Any) -> Any:
    """What of a leaf the plan depends on."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        _check_alive(path, leaf)
        return leaf.shape, leaf.dtype, leaf.sharding
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise CheckpointLeafError(
            show(path), "it is a ShapeDtypeStruct, without values", "Save the state itself."
        )
    spec = describe(path, leaf)
    return spec.dtype if spec.kind == "python" else spec


def _plan(tree: Tree, leaves: Sequence[Any]) -> Plan:
    """The plan, from scratch."""
    names = storage_names(tree.paths)
    loads: collections.Counter[int] = collections.Counter()
    cache: dict[Any, tuple[Part, ...]] = {}
    stored: list[Stored | None] = []
    lots: list[Lot] = []
    mesh: dict[str, int] = {}
    found = kinds(leaves)
    specs = tuple(map(describe, tree.paths, leaves))
    for index, (path, leaf) in enumerate(zip(tree.paths, leaves, strict=True)):
        spec = specs[index]
        if spec.kind == "python" or not spec.on_disk:
            stored.append(None)
            continue
        shape, dtype = spec.stored
        parts = _parts(leaf, shape, cache)
        # What not all processes see alike must not change who of them writes the rest.
        counted = loads.copy() if jax.process_count() > 1 and _apart(leaf) else loads
        owned, chunk = _share(parts, shape, dtype.itemsize, counted)
        sharding = getattr(leaf, "sharding", None)
        mesh = mesh or dict(getattr(getattr(sharding, "mesh", None), "shape", {}))
        stored.append(
            Stored(path, spec, *names[path], shape, storable(dtype), chunk,
                   _plain(tree.names[index]), _axes(sharding))
        )  # fmt: skip
        lots.extend(_lots(index, owned, dtype.itemsize, math.prod(shape), found[index]))
    parcels, often = tuple(_pack(lots)), tuple({kind: 0 for kind in found if kind is not None})
    return Plan(tree, specs, tuple(stored), parcels, mesh, _digest(tree, stored), often)


def _parts(leaf: Any, shape: tuple[int, ...], cache: dict[Any, tuple[Part, ...]]) -> Any:
    """The parts of a leaf; a value of the host, or of one device, is process 0's."""
    if isinstance(leaf, jax.Array):
        key = (leaf.shape, leaf.sharding)
        if key not in cache:
            cache[key] = boxes_of(leaf)
        parts = cache[key]
        if is_key(leaf):
            words = key_words(str(jax.random.key_impl(leaf)))
            parts = tuple(dataclasses.replace(p, box=_with(p.box, words)) for p in parts)
        if jax.process_count() > 1 and leaf.is_fully_addressable and not _apart(leaf):
            parts = tuple(dataclasses.replace(p, holders=(0,)) for p in parts)
        return parts
    return (Part(Box.whole(shape), (0,), (-1,)),)


def _apart(leaf: Any) -> bool:
    """True for an array on a mesh of one process's devices.

    That process cannot tell whether the others have one of their own, of which process 0's counts
    (`merge_indices`), or know that it alone has this one.  So it writes it in any case.
    """
    if not isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding):
        return False
    return len({device.process_index for device in leaf.sharding.device_set}) == 1


def _with(box: Box, words: tuple[int, ...]) -> Box:
    """A box of keys as a box of their data."""
    return Box(box.start + (0,) * len(words), box.stop + words)


def _share(
    parts: Sequence[Part], shape: tuple[int, ...], itemsize: int, loads: collections.Counter[int]
) -> tuple[dict[Box, list[Part]], tuple[int, ...]]:
    """This process's boxes and what they are made of, and the shape of chunks.

    Of the holders of a part, the one with the least to do writes it.
    """
    owners: dict[int, list[Part]] = {}
    for part in parts:
        owner = min(part.holders, key=lambda p: (loads[p], p))
        loads[owner] += part.box.size * itemsize
        owners.setdefault(owner, []).append(part)
    boxes = [part.box for part in parts]
    own = owners.get(jax.process_index(), [])
    if math.prod(shape) * itemsize <= SMALL_BYTES:
        joined = {p: functools.reduce(Box.join, (x.box for x in found))
                  for p, found in owners.items()}  # fmt: skip
        if sum(box.size for box in joined.values()) == math.prod(shape):
            mine = {joined[jax.process_index()]: own} if own else {}
            return mine, chunk_shape(shape, itemsize, [*joined.values()])
    return {part.box: [part] for part in own}, chunk_shape(shape, itemsize, boxes)


def _lots(
    leaf: int, owned: dict[Box, list[Part]], itemsize: int, size: int, kind: Kind | None
) -> Iterable[Lot]:
    for box, parts in owned.items():
        pieces = tuple(Piece(part.box, part.positions[0]) for part in parts)
        yield Lot(leaf, box, pieces, box.size * itemsize, size * itemsize <= SMALL_BYTES, kind)


def _pack(lots: Iterable[Lot]) -> Iterable[tuple[Lot, ...]]:
    """Groups of lots, the small ones first; one that is larger than a group is a group."""
    for small, limit in ((True, _BATCH_BYTES), (False, GROUP_BYTES)):
        group, size = list[Lot](), 0
        for lot in lots:
            if lot.small is not small:
                continue
            if group and size + lot.nbytes > limit:
                yield tuple(group)
                group, size = [], 0
            group.append(lot)
            size += lot.nbytes
        if group:
            yield tuple(group)


def _axes(sharding: Any) -> tuple[Any, ...] | None:
    """The mesh axes of each dim, for the record."""
    spec = getattr(sharding, "spec", None)
    return None if spec is None else tuple(map(_plain, spec))


def _plain(part: Any) -> Any:
    """A name or axis as JSON has it, or several."""
    if isinstance(part, tuple | list):
        return tuple(map(_plain, part))
    return part if part is None or isinstance(part, str) else str(part)


def _digest(tree: Tree, stored: Sequence[Stored | None]) -> str:
    """What must be equal in all processes that save together."""
    seen = hashlib.sha256()
    for path, leaf in zip(tree.paths, stored, strict=True):
        seen.update(repr((path, leaf and (leaf.shape, leaf.dtype.name, leaf.chunk))).encode())
    return seen.hexdigest()[:16]


def _check_alive(path: Path, leaf: Any) -> None:
    """Raises CheckpointLeafError for an array whose buffer is gone."""
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise CheckpointLeafError(
            show(path),
            "its buffer was deleted, most likely donated to a jitted function",
            "Save the state that the function returned.",
        )
