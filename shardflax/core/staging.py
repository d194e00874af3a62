"""The only corner of the library on semi-private JAX: traces, jaxprs, static nodes."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy
from jax._src import config as jax_config
from jax._src import core as jax_core  # jax.extend.core has the same, and imports all of Pallas
from jax._src import distributed, traceback_util
from jax._src import mesh as jax_mesh
from jax.interpreters import partial_eval

__all__ = [
    "Static",
    "coordination_client",
    "current_trace",
    "entered_mesh",
    "escapes",
    "fold_in",
    "hide_frames",
    "hoist",
    "is_tracing",
    "jx",
    "known",
    "needed",
    "policy_names",
    "regions",
    "run_equation",
    "run_simple",
    "show_frames",
    "single_device_arrays",
    "with_checkpoint_names",
]

_config: Any = jax_config
_core: Any = jax_core
_tracing, _eagerly = _core.trace_ctx, _core.eval_trace
_distributed: Any = distributed
_mesh: Any = jax_mesh
_partial_eval: Any = partial_eval
jx: Any = jax  # JAX as an untyped value: some of its functions are half typed


@jax.tree_util.register_static
@dataclass(frozen=True)
class Static:
    """A value that crosses a JAX transform in the tree structure, compared by equality.

    >>> jax.tree.leaves(Static(("a", 1)))
    []
    """

    value: Hashable


def single_device_arrays(array: jax.Array) -> Sequence[jax.Array]:
    """What is on each device of this process: all that `addressable_data` gives one by one.

    >>> [part.shape for part in single_device_arrays(jax.numpy.ones(3))]
    [(3,)]
    """
    return cast("Any", array)._arrays


def current_trace() -> Any:
    """A token that is equal for two moments at the same level of JAX tracing.

    >>> current_trace() == current_trace()
    True
    >>> outside = current_trace()
    >>> _ = jax.jit(lambda x: print(current_trace() == outside))(1.0)
    False
    """
    return _core.get_opaque_trace_state(convention="flax")


def is_tracing() -> bool:
    """True inside of any trace: there, also an array that is no tracer may be part of a program.

    >>> is_tracing(), jax.eval_shape(lambda: is_tracing() and jax.numpy.ones(2)).shape
    (False, (2,))
    """
    return _tracing.trace is not _eagerly


def regions() -> list[str]:
    """What the code that is running is traced for, innermost first: `remat`, `scan`, `jit`, ...

    Maps over a dim are left out: what runs under them is part of what is around them.

    >>> regions(), jax.eval_shape(jax.checkpoint(lambda: jax.numpy.ones(len(regions())))).shape
    ([], (2,))
    """
    trace, found = _tracing.trace, list[str]()
    while trace is not None and trace is not _eagerly:
        kind = getattr(getattr(getattr(trace, "frame", None), "debug_info", None), "traced_for", "")
        if not (trace in _seen_through.traces or type(trace).__name__ == "BatchTrace"):
            found.append("remat" if "remat" in kind else kind)
        trace = getattr(trace, "parent_trace", None)
    return found


class _SeenThrough(threading.local):
    """Traces of this thread that end up in the one around them."""

    def __init__(self) -> None:
        self.traces: list[Any] = []


_seen_through = _SeenThrough()


def entered_mesh() -> Any:
    """The mesh of the `with mesh:` block around, or None.

    Such a mesh is not the one that `jax.sharding.get_abstract_mesh` tells, and JAX shows it
    nowhere else.

    >>> entered_mesh() is None
    True
    """
    mesh = _mesh.thread_resources.env.physical_mesh
    return None if mesh.empty else mesh


def escapes(tree: Any, since: Any) -> bool:
    """True if `tree` holds a value of a trace entered after `since` was `current_trace()`.

    >>> outside = current_trace()
    >>> def fn(x):
    ...     print(escapes(x, outside), escapes(jax.numpy.ones(2), outside))
    >>> jax.vmap(fn)(jax.numpy.ones(2))
    True False
    """
    trace: Any = _core.trace_ctx.trace
    if since._trace_ref() is trace:
        return False
    entered: list[Any] = []
    while trace is not None and since._trace_ref() is not trace:
        entered.append(trace)
        trace = getattr(trace, "parent_trace", None)
    tracers = (x for x in jx.tree.leaves(tree) if isinstance(x, _core.Tracer))
    return any(x._trace is trace for x in tracers for trace in entered)


def fold_in(key: jax.Array, data: Any) -> jax.Array:
    """`jax.random.fold_in` for a number of 32 bits; while tracing in a third of the time.

    What takes the time there is to make `data`, of numpy, an array first.

    >>> key = jax.random.key(0)
    >>> bool(jax.jit(lambda k: fold_in(k, numpy.uint32(1)))(key) == jax.random.fold_in(key, 1))
    True
    """
    if isinstance(key, _core.Tracer) and jx.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        return _fold_in_primitive().bind(key, data)
    return jax.random.fold_in(key, data)


@functools.cache
def _fold_in_primitive() -> Any:
    """The operation that `jax.random.fold_in` is traced to."""
    key = jx.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    closed = jx.make_jaxpr(jax.random.fold_in)(key, numpy.uint32(0))
    return closed.jaxpr.eqns[-1].primitive


def hoist(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any
) -> tuple[Any, Callable[[Any, Any], Any], list[Any]]:
    """Splits a loop body into what needs to be done once and a step.

    `body(carry, xs)` gives `(changing, invariant)`; `carry` and `xs` hold shapes
    (`jax.ShapeDtypeStruct`), and the body is traced once.  Returns the invariant values, a function
    `step(carry, xs) -> changing`, and the paths of those leaves that were to be invariant and are
    not (the values and the step are then meaningless).

    >>> def body(carry, x):
    ...     table = jax.numpy.arange(2.0)
    ...     return carry + table * x, table
    >>> shape = jax.ShapeDtypeStruct((2,), "float32")
    >>> table, step, varying = hoist(body, shape, shape)
    >>> table.tolist(), step(table, table).tolist(), varying
    ([0.0, 1.0], [0.0, 2.0], [])
    """
    closed, (changing, invariant) = jx.make_jaxpr(body, return_shape=True)(carry, xs)
    jaxpr, tree = closed.jaxpr, jx.tree.structure(changing)
    stays = jaxpr.outvars[tree.num_leaves :]
    paths = [path for path, _ in jx.tree.flatten_with_path(invariant)[0]]
    if _needs_inputs(jaxpr, stays):
        bad = [p for p, v in zip(paths, stays, strict=True) if _needs_inputs(jaxpr, [v])]
        return invariant, lambda carry, xs: changing, bad

    reached = _reachable(jaxpr)
    inside = [eqn for eqn in jaxpr.eqns if eqn.effects or reached.intersection(eqn.outvars)]
    shared = _shared(jaxpr, inside, jaxpr.outvars[: tree.num_leaves])
    once, _ = _sliced(jaxpr, [*stays, *shared])
    values = jx.core.eval_jaxpr(once.replace(invars=[]), closed.consts)
    rest = jaxpr.replace(
        eqns=inside,
        invars=[*shared, *jaxpr.invars],
        outvars=jaxpr.outvars[: tree.num_leaves],
        debug_info=_debug(jaxpr, len(shared) + len(jaxpr.invars), tree.num_leaves),
    )

    def step(carry: Any, xs: Any) -> Any:
        inputs = (*values[len(stays) :], *jx.tree.leaves((carry, xs)))
        return jx.tree.unflatten(tree, jx.core.eval_jaxpr(rest, closed.consts, *inputs))

    return jx.tree.unflatten(jx.tree.structure(invariant), values[: len(stays)]), step, []


def known(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `fn(*args, **kwargs)` gives, as far as it is known without arrays for some arguments.

    Arrays among the arguments may be given as shapes (`jax.ShapeDtypeStruct`).  Outputs that do
    not depend on them are computed, and nothing else is; the others are shapes, too.

    >>> x = jax.ShapeDtypeStruct((2,), "float32")
    >>> known(lambda x: (x + 1, jax.numpy.zeros(x.shape)), x)[1].tolist()
    [0.0, 0.0]
    """
    leaves, tree = jx.tree.flatten((args, kwargs))
    missing = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}

    def of_missing(values: dict[int, Any]) -> Any:
        args, kwargs = jx.tree.unflatten(tree, [values.get(i, x) for i, x in enumerate(leaves)])
        return fn(*args, **kwargs)

    # What does not depend on them stays concrete while `fn` is traced: it may branch on it.
    with _config.eager_constant_folding(True):
        closed, shapes = jx.make_jaxpr(of_missing, return_shape=True)(missing)
    jaxpr, out = closed.jaxpr, jx.tree.leaves(shapes)
    told = range(len(out))
    if _needs_inputs(jaxpr, jaxpr.outvars):
        told = [i for i in told if not _needs_inputs(jaxpr, [jaxpr.outvars[i]])]
    once, _ = _sliced(jaxpr, [jaxpr.outvars[i] for i in told])
    values = jx.core.eval_jaxpr(once.replace(invars=[]), closed.consts)
    for i, value in zip(told, values, strict=True):
        out[i] = value
    return jx.tree.unflatten(jx.tree.structure(shapes), out)


def _sliced(jaxpr: Any, outvars: list[Any]) -> tuple[Any, list[bool]]:
    """What of `jaxpr` makes `outvars`, also within calls, and which inputs that needs.

    Effects do not count: a `jax.debug.print` beside them is not needed, nor what it prints.
    """
    info = _debug(jaxpr, len(jaxpr.invars), len(outvars))
    jaxpr = _without_effects(jaxpr.replace(outvars=outvars, debug_info=info))
    return _partial_eval.dce_jaxpr(jaxpr, [True] * len(outvars))


def _without_effects(x: Any) -> Any:
    """A jaxpr whose equations, also within calls, claim to have no effects."""
    if not _has_eqns(x):
        return x
    inside = getattr(x, "jaxpr", x)
    if inside is not x:
        return x.replace(jaxpr=_without_effects(inside))
    if not x.effects:
        return x

    def pure(eqn: Any) -> Any:
        params = jx.tree.map(_without_effects, eqn.params, is_leaf=_has_eqns)
        return eqn.replace(params=params, effects=_core.no_effects) if eqn.effects else eqn

    return x.replace(eqns=[pure(eqn) for eqn in x.eqns], effects=_core.no_effects)


def needed(jaxpr: Any) -> Any:
    """A jaxpr of the same inputs and outputs, without what no output depends on, in loops too.

    >>> traced = jax.make_jaxpr(lambda x: (x + 1, x * x)[0])(1.0)
    >>> len(traced.jaxpr.eqns), len(needed(traced.jaxpr).eqns)
    (2, 1)
    """
    return _partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def run_equation(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation of a jaxpr, for values of its inputs; None for unused ones.

    >>> jaxpr = jax.make_jaxpr(lambda x: x + 1)(1.0).jaxpr
    >>> float(run_equation(jaxpr, jaxpr.eqns[0], [2.0, 1.0])[0])
    3.0
    """
    used = [v for v in eqn.outvars if not isinstance(v, _core.DropVar)]
    given = {v: x for v, x in zip(eqn.invars, values, strict=True) if isinstance(v, _core.Var)}
    info = _debug(jaxpr, len(given), len(used))
    alone = jaxpr.replace(
        constvars=[],
        invars=[*given],
        outvars=used,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=info,
    )
    made = iter(jx.core.eval_jaxpr(alone, [], *given.values()))
    return [None if isinstance(v, _core.DropVar) else next(made) for v in eqn.outvars]


def run_simple(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The same for an equation without a jaxpr inside, with no regard to where it was traced.

    >>> jaxpr = jax.make_jaxpr(lambda x: x + 1)(1.0).jaxpr
    >>> float(run_simple(jaxpr.eqns[0], [2.0, 1.0])[0])
    3.0
    """
    out = eqn.primitive.bind(*values, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _needs_inputs(jaxpr: Any, outvars: list[Any]) -> bool:
    return any(_sliced(jaxpr, outvars)[1])


def _shared(jaxpr: Any, inside: list[Any], outvars: list[Any]) -> list[Any]:
    """Variables that the equations outside of the loop make for those inside and for `outvars`."""
    ids = {id(eqn) for eqn in inside}
    made = {v for eqn in jaxpr.eqns if id(eqn) not in ids for v in eqn.outvars}
    used = [v for eqn in inside for v in _inputs(eqn)]
    used += [v for v in outvars if isinstance(v, _core.Var)]
    return [v for v in dict.fromkeys(used) if v in made]


def _debug(jaxpr: Any, n_in: int, n_out: int) -> Any:
    return jaxpr.debug_info._replace(arg_names=("",) * n_in, result_paths=("",) * n_out)


def _inputs(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if isinstance(v, _core.Var)]


def _reachable(jaxpr: Any) -> set[Any]:
    """Variables of `jaxpr` that depend on its inputs; a call counts as a whole."""
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if reached.intersection(_inputs(eqn)):
            reached.update(eqn.outvars)
    return reached


def policy_names(policy: Any) -> frozenset[str]:
    """The names of values that a policy of `jax.checkpoint_policies` was made with.

    A policy that users wrote has none: nobody knows what it does with its values.

    >>> sorted(policy_names(jax.checkpoint_policies.save_only_these_names("qkv", "out")))
    ['out', 'qkv']
    """
    if not (callable(policy) and _is_of_jax(policy)):
        return frozenset()
    if inspect.isfunction(policy):
        parts = inspect.getclosurevars(policy).nonlocals.values()
    else:
        parts = getattr(policy, "__dict__", {}).values()
    names: set[str] = set()
    for part in parts:
        if isinstance(part, set | frozenset | tuple | list):
            names.update(n for n in cast("list[Any]", part) if isinstance(n, str))
        else:
            names |= policy_names(part)
    return frozenset(names)


def _is_of_jax(x: Any) -> bool:
    module = x.__module__ if inspect.isfunction(x) else type(x).__module__
    return module.partition(".")[0] == "jax"


def with_checkpoint_names(fn: Callable[[], Any]) -> tuple[Any, set[str]]:
    """What `fn()` returns, and the names that `jax.ad_checkpoint.checkpoint_name` gave inside.

    `fn` is traced once, and what it computes becomes part of the trace that is going on.

    >>> from jax.ad_checkpoint import checkpoint_name
    >>> y, names = with_checkpoint_names(lambda: checkpoint_name(jax.numpy.ones(()), "one"))
    >>> float(y), names
    (1.0, {'one'})
    """

    def traced() -> Any:
        _seen_through.traces.append(_tracing.trace)
        try:
            return fn()
        finally:
            _seen_through.traces.pop()

    closed, shapes = jx.make_jaxpr(traced, return_shape=True)()
    leaves = jx.core.eval_jaxpr(closed.jaxpr, closed.consts)
    return jx.tree.unflatten(jx.tree.structure(shapes), leaves), set(_names_in(closed.jaxpr))


def _names_in(jaxpr: Any) -> Iterator[str]:
    """The names in a jaxpr, and in those of its loops, branches and calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            yield eqn.params["name"]
        for part in jx.tree.leaves(eqn.params, is_leaf=_has_eqns):
            if _has_eqns(part):
                yield from _names_in(getattr(part, "jaxpr", part))


def _has_eqns(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


_hidden: list[str] = cast("Any", traceback_util)._exclude_paths


def hide_frames(folder: str) -> None:
    """Lets JAX leave the frames of files below `folder` out of the tracebacks that it filters.

    >>> hide_frames("/somewhere")
    >>> show_frames("/somewhere")
    """
    if folder not in _hidden:
        cast("Any", traceback_util).register_exclusion(folder)


def show_frames(folder: str) -> None:
    """Undoes `hide_frames`.

    >>> show_frames("/never/hidden")
    """
    if folder in _hidden:
        _hidden.remove(folder)


def coordination_client() -> Any:
    """The client of JAX's coordination service; None where `jax.distributed` is not initialised.

    >>> coordination_client() is None
    True
    """
    return _distributed.global_state.client
