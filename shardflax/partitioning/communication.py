"""The communication of a compiled program: what is sent, how often, over which mesh axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import CollectivesError, MeshScopeError
from shardflax.partitioning.given import check_mesh, check_program
from shardflax.partitioning.hlo import Instruction, Program, parse
from shardflax.partitioning.megascale import crossings, in_mesh
from shardflax.partitioning.origin import mesh_of, module_path, shapes_of, source_line, type_bytes
from shardflax.partitioning.replica_groups import instruction_groups, mesh_axes
from shardflax.partitioning.slices import slices_of
from shardflax.partitioning.vocabulary import KNOWN_AXES

__all__ = ["Collective", "assert_collectives", "collectives"]

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled program.

    `kind` is HLO's name of it; `axes` are the mesh axes that its devices differ along; `network` is
    `ICI`, or `DCN` if they lie in several slices; `bytes` is the larger of what one device puts in
    and gets out, each time; `count` is how often it runs in one call of the program, `exact` false
    if it lies in a loop whose length the compiler does not know (which counts as one step).
    `path` is the module path, `source` the file and line outside of this library, as far as the
    compiler kept them; `backward` is true for what only the backward pass does.  `shape` is that of
    the result on one device, of the first array if there are several.

    >>> c = Collective("all-gather", ("fsdp",), "ICI", 256, 3, True, "layers/up", "model.py:4")
    >>> print(c)
    all-gather over fsdp: 3 x 256 B, layers/up, model.py:4
    """

    kind: str
    axes: tuple[str, ...]
    network: str
    bytes: int
    count: int
    exact: bool = True
    path: str = ""
    source: str = ""
    backward: bool = False
    shape: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """The bytes of all times that it runs in one call."""
        return self.bytes * self.count

    @property
    def what(self) -> str:
        """Kind and axes, as `assert_collectives` names them: `all-gather over fsdp`."""
        return f"{self.kind} over {','.join(self.axes)}"

    def __str__(self) -> str:
        times = f"{self.count} x " if self.exact else "each step "
        where = ", ".join(part for part in (self.path, self.source) if part)
        return f"{self.what}: {times}{self.bytes} B" + (f", {where}" if where else "")


def collectives(compiled: Any, mesh: Mesh | None = None) -> list[Collective]:
    """The collectives of a program that `jax.jit(...).lower(...).compile()` gave.

    `mesh` defaults to that of the program's arguments.  Raises `MeshScopeError` if there is none,
    or for one that is not the program's: abstract, or of another size.

    >>> import jax, jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh
    >>> mesh = make_mesh("data=8")
    >>> x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P("data")))
    >>> compiled = jax.jit(lambda x: x.sum()).lower(x).compile()
    >>> [(c.kind, c.axes, c.bytes, c.count) for c in collectives(compiled)]
    [('all-reduce', ('data',), 4, 1)]
    """
    mesh = _mesh(compiled, mesh)
    program = parse(compiled.as_text())
    if mesh.size % (program.partitions or 1):
        raise MeshScopeError(
            f"the program is for {program.partitions} devices, and the mesh has {mesh.size}. Pass "
            f"the mesh that it was compiled for, or none: that of its arguments counts then."
        )
    return [*_found(program, mesh)]


def _mesh(compiled: Any, mesh: Any) -> Mesh:
    """The mesh that is given, or that of the program."""
    if mesh is not None:
        check_mesh(mesh)
    if isinstance(mesh, AbstractMesh):
        raise MeshScopeError("an abstract mesh does not say which device is where: make_mesh(...).")
    check_program(compiled)
    if mesh is None:
        mesh = mesh_of(compiled)
    if mesh is None:
        raise MeshScopeError("no argument of the program is laid out over a mesh: pass mesh=.")
    return mesh


def _found(program: Program, mesh: Mesh) -> Iterator[Collective]:
    endless, fused = program.endless(), program.fused()
    size = program.partitions or mesh.size
    begun: set[str] = set()
    for name, count in program.counts().items():
        instructions = program.computations.get(name, [])
        types = {i.name: i.type for i in instructions}
        for instruction in instructions:
            kind = instruction.op.removesuffix("-start")
            if kind not in _KINDS or _goes_on(instruction, name in fused, begun):
                continue
            said = instruction if instruction.op_name else fused.get(name, instruction)
            if name.startswith("all-reduce-scatter"):  # TPUs: fused with the slice of it
                kind = "reduce-scatter"
            groups = in_mesh(instruction_groups(instruction, size), mesh, size)
            groups = [g for g in groups if len(g) > 1]
            if not groups:
                continue
            inputs = sum(type_bytes(types.get(o, "")) for o in instruction.operands)
            arrays, outputs = _outputs(instruction, inputs)
            if kind == "ragged-all-to-all":  # besides what is sent: what it goes into, and where
                inputs = type_bytes(types.get(instruction.operands[0], ""))
            yield Collective(
                kind=kind,
                axes=mesh_axes(groups, mesh),
                network=_network(groups, mesh),
                bytes=max(inputs, outputs),
                count=count,
                exact=name not in endless,
                path=module_path(said.op_name),
                source=source_line(program, said),
                backward="transpose(" in said.op_name,
                shape=arrays[0],
            )
        for instruction, found in crossings(instructions, mesh):
            yield Collective(
                kind=found.kind,
                axes=mesh_axes(found.groups, mesh),
                network=_network(found.groups, mesh),
                bytes=found.bytes,
                count=count,
                exact=name not in endless,
                path=module_path(instruction.op_name),
                source=source_line(program, instruction),
                backward="transpose(" in instruction.op_name,
                shape=found.shape,
            )


def _goes_on(instruction: Instruction, in_fusion: bool, begun: set[str]) -> bool:
    """True for a part of a collective that has been met.

    TPUs cut one into a start, a done, and pieces fused with what runs meanwhile; each of these
    fusions shows the whole, and all have one channel.
    """
    channel = instruction.attribute(r"channel_id=(\d+)")
    if not in_fusion or channel is None:
        return False
    met = channel in begun
    begun.add(channel)
    return met


def _outputs(instruction: Instruction, inputs: int) -> tuple[list[tuple[int, ...]], int]:
    """Shapes and bytes of what a collective gives.

    The start of an asynchronous one lists its operands before its results, and counters of the
    hardware after them; that of an all-reduce lists its results alone.
    """
    shapes, size = shapes_of(instruction.type), type_bytes(instruction.type)
    number = len(instruction.operands)
    if not instruction.op.endswith("-start") or len(shapes) < 2 * number:
        return shapes, size
    counters = sum(4 for shape in shapes[2 * number :] if not shape)
    return shapes[number : 2 * number], size - inputs - counters


def _network(groups: Sequence[Sequence[int]], mesh: Mesh) -> str:
    """DCN if the devices of some group lie in different slices."""
    slices = slices_of(mesh).ravel()
    return "DCN" if any(len({int(slices[i]) for i in group}) > 1 for group in groups) else "ICI"


def assert_collectives(
    compiled: Any,
    expected: Mapping[str, int | None] | Iterable[str],
    mesh: Mesh | None = None,
    *,
    across_dcn: Iterable[str] | None = None,
    most_bytes: int | None = None,
) -> None:
    """Checks that a program communicates as `expected`, and in no other way.

    `expected` maps what is sent over which axes (`"all-gather over fsdp"`) to how many times in one
    call, or to None for any number; a plain list allows any number of each.  `across_dcn` says
    which of them may cross slices (default: all), `most_bytes` how much a device may send or get
    in one call.  Raises `CollectivesError` with every difference, and where in the model it comes
    from.

    >>> import jax, jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh
    >>> mesh = make_mesh("data=8")
    >>> x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P("data")))
    >>> compiled = jax.jit(lambda x: x.sum()).lower(x).compile()
    >>> assert_collectives(compiled, {"all-reduce over data": 1})
    """
    mesh = _mesh(compiled, mesh)
    found = collectives(compiled, mesh)
    expected, across_dcn = _several(expected), _several(across_dcn)
    wanted: dict[str, int | None] = {}
    for what in expected:
        wanted[what] = expected[what] if isinstance(expected, Mapping) else None
    counts: Counter[str] = Counter()
    for one in found:
        counts[one.what] += one.count
    wrong = [w for w in counts if w not in wanted or wanted[w] not in (None, counts[w])]
    missing = [w for w, n in wanted.items() if n and w not in counts]
    lines = [f"{w}: expected {wanted.get(w, 0)}, found {counts[w]}" for w in wrong + missing]
    lines += [f"  {one}" for one in found if one.what in wrong]
    lines += _slips([*wanted, *(across_dcn or ())], mesh)
    if across_dcn is not None:
        slow = [one for one in found if one.network == "DCN" and one.what not in set(across_dcn)]
        lines += [f"across slices (DCN), which was not allowed: {one}" for one in slow]
    total = sum(one.total for one in found)
    if most_bytes is not None and total > most_bytes:
        most = sorted(found, key=lambda one: -one.total)[:5]
        lines += [f"{total} B in one call, allowed {most_bytes}; the most:"]
        lines += [f"  {one}" for one in most]
    if lines:
        raise CollectivesError(lines)


def _several(what: Any) -> Any:
    """One that is said alone, as a list."""
    return [what] if isinstance(what, str) else what


def _slips(expected: Iterable[str], mesh: Mesh) -> Iterator[str]:
    """What no program could send: a slip in "none of these" would hold for ever."""
    known = [axis for axis in KNOWN_AXES if axis not in mesh.axis_names]
    order = [*mesh.axis_names, *known]
    for what in expected:
        kind, _, over = what.partition(" over ")
        axes = over.split(",")
        if kind not in _KINDS:
            yield f"{what!r}: no collective is called {kind!r}: {did_you_mean(kind, _KINDS)}"
        for axis in axes:
            if axis not in order:
                hint = did_you_mean(axis, mesh.axis_names)
                yield f"{what!r}: the mesh has no axis {axis!r}: {hint}"
        if set(axes) <= set(mesh.axis_names) and axes != sorted(axes, key=order.index):
            yield f"{what!r}: axes come in the order of the mesh, {','.join(mesh.axis_names)}."
