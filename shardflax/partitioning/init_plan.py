"""The plan of an init: what will be made, where it will lie, and by how many programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from shardflax.partitioning.errors import MeshScopeError
from shardflax.partitioning.given import check_init
from shardflax.partitioning.init_graph import graph_of
from shardflax.partitioning.init_programs import Programs
from shardflax.partitioning.init_progress import progress_line
from shardflax.partitioning.layout import Layout
from shardflax.partitioning.leaf import Leaf
from shardflax.partitioning.override_outputs import unmatched_outputs
from shardflax.partitioning.rules import LogicalRules
from shardflax.partitioning.scope import InitTrace, init_tracing, use
from shardflax.partitioning.table import bytes_text
from shardflax.partitioning.untyped import jx

__all__ = ["InitPlan", "plan_init"]

_SHOWN = 5


class InitPlan:
    """An init that is traced, laid out and checked, and has allocated nothing yet.

    `layout` is that of the state; `programs` the number of programs that make it, of which equal
    parameters share one, in `steps` runs.  `str` of a plan says bytes per device, the biggest
    arrays, and those that are whole on every device.  Made by `plan_init`.
    """

    def __init__(self, layout: Layout, programs: Programs) -> None:
        self.layout = layout
        self._programs = programs

    @property
    def programs(self) -> int:
        """How many different programs are compiled."""
        return self._programs.count

    @property
    def steps(self) -> int:
        """How many runs of them make the state."""
        return len(self._programs.steps)

    def run(self, progress: bool | None = None) -> Any:
        """The state, laid out; `progress` is that of `init_sharded`."""
        if isinstance(self.layout.mesh, AbstractMesh):
            raise MeshScopeError(
                "init_sharded: an abstract mesh has no devices to make arrays on. Give "
                "make_mesh(...); abstract_layout and plan_init allocate nothing."
            )
        leaves: list[Any] = [None] * len(self.layout.leaves)
        self._programs.make_keys()
        with self._scope(), progress_line(self.layout, progress) as tell:
            for step in self._programs.steps:
                # One at a time: what an initializer works with is freed before the next one.
                arrays = jx.block_until_ready(self._programs.run(step))
                for number, array in zip(step.arrays, arrays, strict=True):
                    leaves[number] = array
                tell(step.arrays)
        return self.layout.rebuild(leaves)

    def compiled(self) -> Iterator[Any]:
        """Each program, compiled: `memory_analysis()` says what it works in, on a device.

        >>> import jax
        >>> from shardflax.partitioning import make_mesh, preset
        >>> plan = plan_init(
        ...     lambda: jax.numpy.ones(8), mesh=make_mesh("data=8"), rules=preset("dp")
        ... )
        >>> [one.memory_analysis().output_size_in_bytes for one in plan.compiled()]
        [32]
        """
        self._programs.make_keys()
        with self._scope():
            steps = {id(step.program): step for step in self._programs.steps}
            for step in steps.values():
                yield self._programs.lower(step).compile()

    def _scope(self) -> Any:
        return use(self.layout.mesh, self.layout.rules)

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.layout.mesh.shape.items())
        leaves = self.layout.leaves
        whole = sum(leaf.bytes_per_device * leaf.parts for leaf in leaves)
        lines = [
            f"Plan of an init on {mesh}",
            f"{bytes_text(self.layout.bytes_per_device)} a device, {bytes_text(whole)} in all; "
            f"{len(leaves)} arrays, {self.steps} runs of {self.programs} programs.",
        ]
        lines += _lines("biggest on a device", leaves)
        alike = [leaf for leaf in leaves if leaf.parts == 1 and leaf.shape]
        return "\n".join([*lines, *_lines("whole on every device", alike)])

    def __repr__(self) -> str:
        return f"<InitPlan of {self.layout!r}: {self.programs} programs>"


def plan_init(
    init_fn: Callable[..., Any],
    *args: Any,
    mesh: Mesh,
    rules: LogicalRules,
    names: Mapping[str, tuple[Any, ...]] | None = None,
) -> InitPlan:
    """Everything that `init_sharded` does before it allocates, as a plan to look at and to run.

    Raises a `LayoutError` that lists everything wrong, by path.

    >>> import jax
    >>> from shardflax.partitioning import make_mesh, named, preset
    >>> kernel = named(jax.nn.initializers.lecun_normal(), ("embed", "mlp"))
    >>> def init(key):
    ...     return {i: kernel(jax.random.fold_in(key, i), (16, 64)) for i in range(4)}
    >>> key, mesh = jax.random.key(0), make_mesh("fsdp=4,tensor=2")
    >>> plan = plan_init(init, key, mesh=mesh, rules=preset("fsdp_tp"))
    >>> print(plan)
    Plan of an init on fsdp=4, tensor=2
    2.0 KiB a device, 16.0 KiB in all; 4 arrays, 4 runs of 1 programs.
    biggest on a device:
      512 B  0  float32(16, 64) fsdp,tensor
      ...
    >>> plan.run()[0].sharding.spec
    P('fsdp', 'tensor')
    """
    check_init(init_fn, "init_sharded")
    with use(mesh, rules), init_tracing(InitTrace()) as trace:
        closed, boxed = jx.make_jaxpr(init_fn, return_shape=True)(*args)
    trace.problems.extend(unmatched_outputs(rules, trace))
    layout = Layout(boxed, mesh, rules, trace, names=names)
    layout.check()
    shardings = jx.tree.leaves(layout.shardings)
    return InitPlan(
        layout, Programs(graph_of(closed), jx.tree.leaves(args), shardings, layout.place_leaf)
    )


def _lines(title: str, leaves: Any) -> Iterator[str]:
    """The largest of `leaves`, one a line."""
    largest: list[Leaf] = sorted(leaves, key=lambda leaf: -leaf.bytes_per_device)
    if not largest:
        return
    yield f"{title}:"
    sizes = [bytes_text(leaf.bytes_per_device) for leaf in largest[:_SHOWN]]
    for size, leaf in zip(sizes, largest, strict=False):
        spec = f" {','.join(map(str, leaf.spec))}" if leaf.spec else ""
        yield f"  {size:>{max(map(len, sizes))}}  {leaf.where}  {leaf.dtype}{leaf.shape}{spec}"
    if len(largest) > _SHOWN:
        rest = sum(leaf.bytes_per_device for leaf in largest[_SHOWN:])
        yield f"  and {len(largest) - _SHOWN} more, {bytes_text(rest)}"
