"""Every kind of region x every transformation x every way of giving the mesh: nothing is dropped.

What is asserted is the traced program: on auto axes it holds a sharding constraint, on explicit
ones a reshard, on manual ones neither; and in each cell names that are wrong are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import (
    AxisRules,
    MeshScopeError,
    NamesRankError,
    NoRulesWarning,
    UnknownAxisError,
    UnknownNameError,
    call_site,
    make_mesh,
    use,
    with_logical_constraint,
)

AXES = "data=2,fsdp=2,tensor=2"
EVERY = ("data", "fsdp", "tensor")
NAMES = ("batch", "act_mlp")
RULES = AxisRules({"batch": "fsdp", "act_mlp": "tensor"})
PAIRS = [("batch", "fsdp"), ("act_mlp", "tensor")]
X = jax.ShapeDtypeStruct((4, 4), "float32")
Body = Callable[[Any], Any]


@dataclass(frozen=True)
class Region:
    """Types of the axes, axes that a `shard_map` around makes manual, and what must be there."""

    types: Any
    manual: tuple[str, ...]
    constraint: tuple[Any, ...] | None = None
    reshard: tuple[Any, ...] | None = None

    def enter(self, fn: Body, mesh: Any) -> Body:
        if not self.manual:
            return fn
        # JAX takes an explicit argument only as it is typed, and this one is whole.
        spec = P() if self.types == "explicit" else P("fsdp")
        names = set(self.manual)
        return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names)


REGIONS = {
    "auto": Region("auto", (), constraint=("fsdp", "tensor")),
    "explicit": Region("explicit", (), reshard=("fsdp", "tensor")),
    "tensor explicit": Region({"tensor": "explicit"}, (), ("fsdp", None), (None, "tensor")),
    "manual": Region("auto", EVERY),
    "manual of explicit": Region("explicit", EVERY),
    "partly manual, else auto": Region("auto", ("fsdp",), constraint=(None, "tensor")),
    "partly manual, else explicit": Region("explicit", ("fsdp",), reshard=(None, "tensor")),
}
TRANSFORMS: dict[str, Callable[[Body], Body]] = {
    "call": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x]))[0],
    "vmap spmd": lambda f: lambda x: jax.vmap(f, spmd_axis_name="data")(jnp.stack([x, x]))[0],
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), f(x), length=2)[0],
    "while": lambda f: lambda x: jax.lax.fori_loop(0, 2, lambda _, c: f(c), f(x)),
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: f(x * 2), x),
    "grad": lambda f: lambda x: jax.vjp(f, x)[1](f(x))[0],
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "remat": jax.checkpoint,
    "jit in scan in vmap": lambda f: TRANSFORMS["vmap"](TRANSFORMS["scan"](jax.jit(f))),
}
WAYS = ["set_mesh", "use", "with mesh", "argument", "argument in scope", "abstract", "none"]


@contextlib.contextmanager
def giving(way: str, mesh: Any) -> Iterator[Any]:
    """Enters what a way enters, and gives what it passes as `mesh`."""
    scope: Any = {
        "set_mesh": jax.set_mesh,
        "use": lambda mesh: use(mesh, RULES),
        "with mesh": lambda mesh: mesh,
        "argument in scope": jax.set_mesh,
        "abstract": lambda mesh: jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    }.get(way, lambda mesh: contextlib.nullcontext())(mesh)
    with scope:
        yield mesh if way.startswith("argument") else None


def program(jaxpr: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every constraint and every reshard to a layout over some axis, in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            yield "constraint", tuple(eqn.params["sharding"].spec)
        elif eqn.primitive.name == "reshard":
            yield "reshard", tuple(eqn.params["dst_sharding"].spec)
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from program(inner)


def said(found: Any, kind: str) -> set[tuple[Any, ...]]:
    """The layouts of one kind, of the last two dims, without those that say nothing."""
    specs: set[tuple[Any, ...]] = set()
    for what, spec in found:
        rank = 3 if len(spec) == 3 or spec[:1] in (("data",), (P.UNCONSTRAINED,)) else 2
        dims = (*spec, *[None] * (rank - len(spec)))[rank - 2 :]
        if what == kind and dims != (None, None):
            specs.add(dims)
    return specs


def refuses(x: Any, mesh: Any, knows_mesh: bool) -> None:
    """Names, rank and axes that are wrong are errors, here."""
    with pytest.raises(UnknownNameError, match="did you mean 'act_mlp'"):
        with_logical_constraint(x, ("batch", "act_mpl"), RULES, mesh)
    with pytest.raises(NamesRankError, match="1 names"):
        with_logical_constraint(x, ("batch",), RULES, mesh)
    with pytest.raises(NamesRankError, match="3 names"):
        with_logical_constraint(x, ("batch", None, None), PAIRS, mesh)
    for rules in ([("batch", "fdsp")], AxisRules({"batch": "fdsp", "act_mlp": None})):
        wrong = pytest.raises(UnknownAxisError, match=r"'fdsp'.*did you mean 'fsdp'")
        with wrong if knows_mesh else contextlib.nullcontext():
            with_logical_constraint(x, NAMES, rules, mesh)


@pytest.mark.filterwarnings("ignore:.with mesh.:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("region", REGIONS)
def test_every_cell(region: str, transform: str, way: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(call_site, "_warned", set())
    where = REGIONS[region]
    mesh = make_mesh(AXES, axis_types=where.types)
    known = way != "none" or bool(where.manual)
    warned: list[int] = []

    def body(x: Any) -> Any:
        refuses(x, given, known)
        if way != "use":
            with pytest.warns(NoRulesWarning, match=r"at .*constraint_grid.py:\d+") as got:
                for _ in range(1 + len(warned)):
                    with_logical_constraint(x, NAMES, mesh=given)
            warned.append(len(got))
            monkeypatch.setattr(call_site, "_warned", set())
        return with_logical_constraint(x, NAMES, None if way == "use" else RULES, given)

    with giving(way, mesh) as given:
        fn = where.enter(TRANSFORMS[transform](body), mesh)
        found = list(program(jax.jit(fn).trace(X).jaxpr))
    for kind in ("constraint", "reshard"):
        expected = getattr(where, kind) if known else None
        assert said(found, kind) == ({expected} if expected else set()), found
    assert set(warned) <= {1}
    if transform == "call":  # and nothing else is in the program
        assert len(found) == (known and bool(where.constraint) + bool(where.reshard))
    if transform == "vmap spmd" and "constraint" in dict(found):
        assert all(spec[0] == "data" for kind, spec in found if kind == "constraint")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("region", REGIONS)
def test_programs_for_another_platform_keep_every_constraint(region: str, transform: str) -> None:
    """Lowered for TPUs on this host, over a mesh without devices."""
    where = REGIONS[region]
    mesh = make_mesh(AXES, axis_types=where.types).abstract_mesh
    with use(mesh, RULES):
        fn = where.enter(TRANSFORMS[transform](lambda x: with_logical_constraint(x, NAMES)), mesh)
        text = jax.jit(fn).trace(X).lower(lowering_platforms=("tpu",)).as_text()
    kept = [line for line in text.splitlines() if "sdy.sharding_constraint" in line]
    axes = {axis for line in kept for axis in EVERY if f'"{axis}"' in line}
    wanted = {*(where.constraint or ()), *(where.reshard or ())} - {None}
    assert wanted <= axes and (wanted or not axes)


@pytest.mark.filterwarnings("ignore:.with mesh.:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("region", REGIONS)
def test_arrays_that_are_not_traced(region: str, way: str) -> None:
    """Outside of any trace the array itself moves."""
    where = REGIONS[region]
    mesh = make_mesh(AXES, axis_types=where.types)
    x = jnp.arange(16.0).reshape(4, 4)
    with giving(way, mesh) as given:
        fn = where.enter(lambda x: with_logical_constraint(x, NAMES, RULES, given), mesh)
        if way == "abstract" and not where.manual:
            with pytest.raises(MeshScopeError, match=r"abstract mesh \(data=2, fsdp=2, tensor=2\)"):
                fn(x)
            return
        y = fn(x)
    assert (y == x).all()
    if way == "none" and not where.manual:
        assert y is x
    elif where.manual != EVERY:
        rows = None if where.manual and where.types == "explicit" else "fsdp"
        assert tuple(y.sharding.spec) == (rows, "tensor")
