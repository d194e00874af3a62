"""`explain`: why every leaf of a state lies as it does, as a value that can be shown and kept."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shardflax.core.module import Module
from shardflax.partitioning.errors import LayoutError, Problem
from shardflax.partitioning.explained import (
    LeafExplained,
    MeshExplained,
    explain_leaf,
    mesh_of_spec,
)
from shardflax.partitioning.init import abstract_layout
from shardflax.partitioning.layout import Layout
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh
from shardflax.partitioning.untyped import jx

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Explanation", "explain"]

_FOLLOWS = "as its parameter"


@dataclass(frozen=True)
class Explanation:
    """Why every leaf of a state lies as it does on a mesh; `explain` makes it.

    Printed, it is a table; `to_json` and `to_html` have more of it.  Nothing is raised for what is
    wrong: `problems` lists it, `check` raises it.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import LogicallyPartitioned, preset
    >>> kernel = LogicallyPartitioned(jnp.ones((64, 96)), ("embed", "mlp"))
    >>> found = explain({"params": {"w": kernel}}, "fsdp=256,tensor=2", preset("fsdp_tp"))
    >>> [problem.dim for problem in found.problems]
    [0]
    """

    layout: Layout
    title: str = ""
    dcn: Mapping[str, int] = field(default_factory=dict[str, int])

    @functools.cached_property
    def mesh(self) -> MeshExplained:
        """The mesh."""
        return MeshExplained.of(self.layout.mesh, dict(self.dcn))

    @functools.cached_property
    def leaves(self) -> tuple[LeafExplained, ...]:
        """Every leaf, in the order of the state."""
        layout = self.layout
        return tuple(explain_leaf(leaf, layout.mesh, layout.rules) for leaf in layout.leaves)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong."""
        return self.layout.problems

    @functools.cached_property
    def followers(self) -> dict[str, str]:
        """The leaves that are laid out just as a parameter is, and the path of that parameter."""
        owners = {
            leaf.path.partition("/")[2]: leaf for leaf in self.leaves if leaf.origin != _FOLLOWS
        }
        found: dict[str, str] = {}
        for leaf in self.leaves:
            rest = leaf.path if leaf.origin == _FOLLOWS else ""
            while rest and rest not in owners:
                rest = rest.partition("/")[2]
            owner = owners.get(rest) if rest else None
            if owner and (owner.spec, owner.problems) == (leaf.spec, leaf.problems):
                found[leaf.path] = owner.path
        return found

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds of the state: the same on all, as all parts are equal."""
        return self.layout.bytes_per_device

    @functools.cached_property
    def memory(self) -> dict[str, int]:
        """Bytes per device of each part of the state, by the first key of the path.

        >>> import jax.numpy as jnp
        >>> from shardflax.partitioning import preset
        >>> explain({"step": jnp.int32(0)}, "fsdp=8", preset("fsdp")).memory
        {'step': 4}
        """
        sums: Counter[str] = Counter()
        for leaf in self.leaves:
            sums[leaf.group] += leaf.bytes_per_device
        return dict(sums)

    @property
    def rules_title(self) -> str:
        """What the rules are called."""
        rules = self.layout.rules
        return rules.title if isinstance(rules, AxisRules) else "plain pairs"

    @property
    def heading(self) -> str:
        """What lies where under which rules, in one line."""
        title = f"{self.title} " if self.title else ""
        return f"{title}on {self.mesh} under {self.rules_title}"

    def check(self) -> None:
        """Raises all `problems` as one `LayoutError`, if there are any."""
        self.layout.check()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, as `to_json` writes them."""
        from shardflax.partitioning.explain_json import explanation_dict

        return explanation_dict(self)

    def to_json(self) -> str:
        """All of it as JSON; `format` and `version` in it say how to read it.

        >>> import jax.numpy as jnp
        >>> from shardflax.partitioning import preset
        >>> text = explain({"step": jnp.int32(0)}, "fsdp=8", preset("fsdp")).to_json()
        >>> json.loads(text)["leaves"][0]["origin"]
        'a single number'
        """
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def to_html(self) -> str:
        """One page that needs nothing else: the mesh drawn, memory, and a table to search.

        >>> import jax.numpy as jnp
        >>> from shardflax.partitioning import preset
        >>> explain({"step": jnp.int32(0)}, "fsdp=8", preset("fsdp")).to_html()[:15]
        '<!doctype html>'
        """
        from shardflax.partitioning.explain_html import page

        return page(self.to_dict())

    def save(self, path: str | Path) -> Path:
        """Writes `to_html` to a file, or `to_json` if its name ends in `.json`."""
        path = Path(path)
        text = self.to_json() + "\n" if path.suffix == ".json" else self.to_html()
        path.write_text(text, encoding="utf-8")
        return path

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mesh": self.mesh}  # the layout leaves its devices behind

    def __str__(self) -> str:
        from shardflax.partitioning.explain_text import explanation_text

        return explanation_text(self)

    def __rich__(self) -> Group:
        from shardflax.partitioning.explain_text import explanation_rich

        return explanation_rich(self)

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.layout.leaves)} leaves on {self.mesh}>"


def explain(
    what: Any,
    mesh: AnyMesh | str | Mapping[str, int],
    rules: LogicalRules,
    *args: Any,
    title: str = "",
    **kwargs: Any,
) -> Explanation:
    """Explains how a state lies on a mesh under rules: allocates nothing, and raises no problems.

    `what` is a state (any tree of arrays or shapes, boxed or not), a module, a function that makes
    a state, or a `Layout` (whose mesh and rules count, not those given).  A module is initialised
    abstractly with `args` and `kwargs` (arrays or `jax.ShapeDtypeStruct`s), and a function called
    so.  `mesh` may be a spec, of any size: no devices are needed.

    Raises `LayoutError` for a module without inputs, `MeshSpecError` for a spec that cannot be
    read.

    >>> import jax, jax.numpy as jnp
    >>> import shardflax.nn as nn
    >>> from shardflax.partitioning import preset
    >>> model = nn.Dense(96, kernel_axes=("embed", "mlp"), use_bias=False)
    >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    >>> print(explain(model, "fsdp=16,tensor=2", preset("fsdp_tp"), x))
    on fsdp=16, tensor=2 under fsdp_tp
    path           array           dims                    bytes / device  notes
    -------------  --------------  ----------------------  --------------  -----
    params/kernel  float32[64,96]  embed→fsdp, mlp→tensor           768 B
    <BLANKLINE>
    768 B on each of 32 devices: 1 leaf, 24.0 KiB in all.
    """
    dcn: dict[str, int] = {}
    if isinstance(mesh, str | Mapping):
        mesh, dcn = mesh_of_spec(mesh)
    if isinstance(what, Layout):
        return Explanation(what, title, dcn)
    return Explanation(_layout(what, mesh, rules, args, kwargs), title, dcn)


def _layout(
    what: Any, mesh: AnyMesh, rules: LogicalRules, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Layout:
    """The layout of a state, or of what a module or function makes."""
    if isinstance(what, Module):
        if not args and not kwargs:
            raise LayoutError(
                f"explain: {type(what).__name__} is a module, and its parameters depend on its "
                f"inputs. Give them after the rules, as shapes: explain(model, mesh, rules, "
                f"jax.ShapeDtypeStruct((8, 128), jnp.int32))."
            )
        key = jx.eval_shape(lambda: jx.random.key(0))
        return _abstract(what.init, (key, *args), kwargs, mesh, rules)
    if isinstance(what, type):
        raise LayoutError(
            f"explain: {what.__name__} is a class. Give a module of it: {what.__name__}(...)."
        )
    if callable(what):
        return _abstract(what, args, kwargs, mesh, rules)
    return Layout(what, mesh, rules)


def _abstract(
    init: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: AnyMesh, rules: LogicalRules
) -> Layout:
    """The layout of what `init` makes; only arrays and shapes among its arguments are traced."""
    leaves, tree = jx.tree.flatten((args, kwargs))
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def made(arrays: Any) -> Any:
        filled = iter(arrays)
        both = zip(leaves, traced, strict=True)
        given = [next(filled) if is_array else leaf for leaf, is_array in both]
        given_args, given_kwargs = jx.tree.unflatten(tree, given)
        return init(*given_args, **given_kwargs)

    arrays = [leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array]
    return abstract_layout(made, arrays, mesh=cast(Any, mesh), rules=rules)
