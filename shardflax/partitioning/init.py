"""`init_sharded`: abstract, then a layout, then checks, and only then arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from shardflax.core.boxes import is_box
from shardflax.partitioning.given import check_init
from shardflax.partitioning.init_plan import plan_init
from shardflax.partitioning.layout import Layout
from shardflax.partitioning.override_outputs import unmatched_outputs
from shardflax.partitioning.rules import LogicalRules
from shardflax.partitioning.scope import AnyMesh, InitTrace, init_tracing, use
from shardflax.partitioning.untyped import jx

__all__ = ["abstract_layout", "init_sharded", "unboxed"]


def init_sharded(
    init_fn: Callable[..., Any],
    *args: Any,
    mesh: Mesh,
    rules: LogicalRules,
    names: Mapping[str, tuple[Any, ...]] | None = None,
    print_plan: bool = False,
    progress: bool | None = None,
) -> tuple[Any, Layout]:
    """Initialises a train state directly in its layout; nothing exists unsharded at any time.

    `init_fn(*args)` returns any tree of (boxed) arrays.  It is traced once, abstractly, under
    `use(mesh, rules)`; every leaf's layout is resolved and checked (`names` are those of
    `Layout`); then the arrays are made one after the other, by programs with the layout as output
    sharding.  What an array does not depend on is not computed for it (no forward pass), and equal
    parameters share a program.  The state comes back unboxed, with its `Layout`.  The numbers do
    not depend on the mesh.

    `print_plan` prints what will be made before it is made (see `plan_init`, which gives the plan
    alone).  `progress` draws a line on stderr; None does so on terminals, after a second.

    Raises a `LayoutError` that lists everything wrong, by path, before anything is allocated.

    >>> import jax
    >>> from shardflax.partitioning import make_mesh, named, preset
    >>> kernel = named(jax.nn.initializers.lecun_normal(), ("embed", "mlp"))
    >>> state, layout = init_sharded(
    ...     lambda key: {"params": {"kernel": kernel(key, (8, 16))}},
    ...     jax.random.key(0),
    ...     mesh=make_mesh("fsdp=4,tensor=2"),
    ...     rules=preset("fsdp_tp"),
    ... )
    >>> state["params"]["kernel"].sharding.spec
    P('fsdp', 'tensor')
    >>> layout.bytes_per_device
    64
    """
    plan = plan_init(init_fn, *args, mesh=mesh, rules=rules, names=names)
    if print_plan:
        print(plan)
    return plan.run(progress), plan.layout


def abstract_layout(
    init_fn: Callable[..., Any],
    *args: Any,
    mesh: AnyMesh,
    rules: LogicalRules,
    names: Mapping[str, tuple[Any, ...]] | None = None,
) -> Layout:
    """The layout that `init_sharded` would use, problems included; allocates and raises nothing.

    >>> import jax
    >>> from shardflax.partitioning import make_mesh, named, preset
    >>> kernel = named(jax.nn.initializers.lecun_normal(), ("emebd", "mlp"))
    >>> layout = abstract_layout(
    ...     lambda key: {"kernel": kernel(key, (8, 16))},
    ...     jax.random.key(0),
    ...     mesh=make_mesh("fsdp=4,tensor=2"),
    ...     rules=preset("fsdp_tp"),
    ... )
    >>> [problem.where for problem in layout.problems]
    ['kernel, shape (8, 16)']
    """
    check_init(init_fn, "abstract_layout")
    with use(mesh, rules), init_tracing(InitTrace()) as trace:
        boxed = jx.eval_shape(init_fn, *args)
    trace.problems.extend(unmatched_outputs(rules, trace))
    return Layout(boxed, mesh, rules, trace, names=names)


def unboxed(tree: Any) -> Any:
    """The values of all boxes of `tree`, with no constraint applied.

    >>> from shardflax.partitioning import Partitioned
    >>> unboxed({"w": Partitioned(1.0, ())})
    {'w': 1.0}
    """

    def value(x: Any) -> Any:
        while is_box(x):
            x = x.value if hasattr(x, "value") else x.unbox()
        return x

    return jx.tree.map(value, tree, is_leaf=is_box)
