"""An init as a graph, cut into pieces: one for each array, or for the arrays of one loop.

Compiled as a whole, an init of a hundred equal layers is a program a hundred times as long, and
works on as many arrays at once as the compiler sees fit.  Cut into pieces, equal arrays are equal
programs that differ in the key that they are given, and they are made one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shardflax.core.staging import needed, run_equation, run_simple
from shardflax.partitioning.untyped import jx

__all__ = [
    "Graph",
    "Input",
    "Node",
    "Output",
    "Piece",
    "graph_of",
    "pieces_of",
    "run_node",
    "run_piece",
    "sources_of",
    "value_of",
]

# Calls that are only there for derivatives, tracing and compiling: their equations are taken one
# by one.
_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
}


class Input(NamedTuple):
    """What a graph starts from: an argument of the init, or a constant that its trace met."""

    kind: str
    number: int


class Output(NamedTuple):
    """One output of one node."""

    node: int
    number: int


@dataclass(frozen=True)
class Node:
    """An equation of the graph, the jaxpr it stands in, and where what it reads is from.

    `reads` has an `Input`, an `Output`, or a literal for each.
    """

    jaxpr: Any
    eqn: Any
    reads: tuple[Any, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run, and where each array of the state is from.

    `seeds` are the nodes that make keys out of keys: cheap, and where equal parameters differ.
    With `effects` (something is printed, say) a graph is not cut.
    """

    nodes: tuple[Node, ...]
    arrays: tuple[Any, ...]
    consts: tuple[Any, ...]
    seeds: frozenset[int]
    effects: bool


@dataclass(frozen=True)
class Piece:
    """The arrays that a piece makes, by number, and the nodes that it needs, in order."""

    arrays: tuple[int, ...]
    nodes: tuple[int, ...]


def graph_of(closed: Any) -> Graph:
    """The graph of a traced init, without what no array of the state needs.

    >>> import jax
    >>> graph = graph_of(jax.make_jaxpr(lambda x: (x + 1, x * x, x * 3)[::2])(1.0))
    >>> [node.eqn.primitive.name for node in graph.nodes]
    ['add', 'mul']
    """
    jaxpr, nodes = needed(closed.jaxpr), list[Node]()
    inputs = [Input("argument", i) for i in range(len(jaxpr.invars))]
    consts = [Input("constant", i) for i in range(len(closed.consts))]
    arrays = _unrolled(jaxpr, inputs, consts, nodes)
    return Graph(
        tuple(nodes), tuple(arrays), tuple(closed.consts), _seeds(nodes), bool(closed.effects)
    )


def _unrolled(jaxpr: Any, inputs: Sequence[Any], consts: Sequence[Any], nodes: list[Node]) -> Any:
    """Adds the equations of `jaxpr` to `nodes`; returns where its outputs are from."""
    where = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(atom: Any) -> Any:
        return atom if hasattr(atom, "val") else where[atom]

    for eqn in jaxpr.eqns:
        reads = tuple(map(read, eqn.invars))
        inner = _call(eqn)
        if inner is None:
            made = [Output(len(nodes), i) for i in range(len(eqn.outvars))]
            nodes.append(Node(jaxpr, eqn, reads))
        else:
            kept = list(map(_known, getattr(inner, "consts", ())))
            made = _unrolled(getattr(inner, "jaxpr", inner), reads, kept, nodes)
        where.update(zip(eqn.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _seeds(nodes: Sequence[Node]) -> frozenset[int]:
    """The nodes that make keys, or a few unsigned integers, out of nothing but such."""
    found = set[int]()
    for number, node in enumerate(nodes):
        made = [v.aval for v in node.eqn.outvars]
        small = all(map(_is_seed, made)) and node.eqn.primitive.name != "random_bits"
        reads = (s for s in node.reads if isinstance(s, Output))
        if small and not _has_body(node.eqn) and all(s.node in found for s in reads):
            found.add(number)
    return frozenset(found)


def _is_seed(aval: Any) -> bool:
    """True for keys, and for arrays of unsigned integers that may be inside of keys."""
    dtype = getattr(aval, "dtype", np.dtype(bool))
    is_key = jx.dtypes.issubdtype(dtype, jx.dtypes.prng_key)
    return is_key or (np.issubdtype(dtype, np.unsignedinteger) and aval.size <= 4096)


class _Known(NamedTuple):
    """A value that is read like a literal."""

    val: Any
    aval: Any


def _known(value: Any) -> _Known:
    return _Known(value, jx.typeof(value))


def _call(eqn: Any) -> Any:
    """The jaxpr of an equation that is no more than a call, or None."""
    inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    if inner is None or len(getattr(inner, "jaxpr", inner).invars) != len(eqn.invars):
        return None
    if eqn.primitive.name not in ("jit", "pjit"):
        return inner
    said = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    plain = all(type(sharding).__name__ == "UnspecifiedValue" for sharding in said)
    return inner if plain and len(eqn.outvars) > 1 else None


def pieces_of(graph: Graph) -> list[Piece]:
    """The pieces of a graph, in the order of their first array.

    Arrays that come out of one loop (or another equation with a body) are one piece.  What else
    two arrays have in common is computed for each.

    >>> import jax
    >>> def init(x):
    ...     y = x + 1
    ...     a, b = jax.lax.scan(lambda c, _: (c + 1, c), y, length=3)
    ...     return a, y, b, y * 2
    >>> [piece.arrays for piece in pieces_of(graph_of(jax.make_jaxpr(init)(1.0)))]
    [(0, 2), (1,), (3,)]
    """
    if graph.effects:
        rest = set(range(len(graph.nodes))) - graph.seeds
        return [Piece(tuple(range(len(graph.arrays))), tuple(sorted(rest)))]
    slices = [_slice(graph, [array]) for array in graph.arrays]
    leader = list(range(len(slices)))
    for loop in _loops(graph, slices):
        first = min(leader[array] for array in loop)
        joined = {leader[array] for array in loop}
        leader = [first if of in joined else of for of in leader]
    groups: dict[int, list[int]] = {}
    for array, of in enumerate(leader):
        groups.setdefault(of, []).append(array)
    return [
        Piece(tuple(group), tuple(sorted({node for array in group for node in slices[array]})))
        for group in groups.values()
    ]


def _slice(graph: Graph, sources: Sequence[Any]) -> set[int]:
    """The nodes that `sources` depend on."""
    found, open_ = set[int](), [s.node for s in sources if isinstance(s, Output)]
    while open_:
        node = open_.pop()
        if node not in found and node not in graph.seeds:
            found.add(node)
            open_ += [s.node for s in graph.nodes[node].reads if isinstance(s, Output)]
    return found


def _loops(graph: Graph, slices: Sequence[set[int]]) -> Iterator[list[int]]:
    """The arrays that depend on one equation with a body and several outputs, for each such."""
    users: dict[int, list[int]] = {}
    for array, nodes in enumerate(slices):
        for node in nodes:
            users.setdefault(node, []).append(array)
    for node, arrays in users.items():
        eqn = graph.nodes[node].eqn
        if len(arrays) > 1 and len(eqn.outvars) > 1 and _has_body(eqn):
            yield arrays


def _has_body(eqn: Any) -> bool:
    """True for a loop, a branch, and whatever else has a jaxpr inside."""
    return any(map(_is_body, eqn.params.values()))


def _is_body(param: Any) -> bool:
    """True for a jaxpr, and for a tuple of them."""
    if isinstance(param, tuple):
        return any(map(_is_body, param))  # pyright: ignore[reportUnknownArgumentType]
    return hasattr(getattr(param, "jaxpr", param), "eqns")


def sources_of(graph: Graph, piece: Piece) -> tuple[Any, ...]:
    """The inputs of a piece: arguments, constants and keys, in the order in which they are read."""
    inside = set(piece.nodes)
    reads = [source for number in piece.nodes for source in graph.nodes[number].reads]
    reads += [graph.arrays[array] for array in piece.arrays]
    outer = (s for s in reads if isinstance(s, Input | Output) and not _made(s, inside))
    return tuple(dict.fromkeys(outer))


def _made(source: Input | Output, nodes: set[int]) -> bool:
    return isinstance(source, Output) and source.node in nodes


def run_piece(graph: Graph, piece: Piece, sources: Sequence[Any], values: Sequence[Any]) -> Any:
    """The arrays of a piece; `values` are those of `sources`, its inputs.

    >>> import jax
    >>> graph = graph_of(jax.make_jaxpr(lambda x: [(x + 1) * 3])(1.0))
    >>> piece = pieces_of(graph)[0]
    >>> run_piece(graph, piece, sources_of(graph, piece), [2.0])
    [Array(9., dtype=float32, ...)]
    """
    known = dict(zip(sources, values, strict=True))
    for number in piece.nodes:
        run_node(graph, number, known)
    return [value_of(graph.arrays[array], known) for array in piece.arrays]


def run_node(graph: Graph, number: int, known: dict[Any, Any]) -> None:
    """Adds the outputs of a node to what is known."""
    node = graph.nodes[number]
    values = [value_of(source, known) for source in node.reads]
    simple = number in graph.seeds  # keys are no part of the mesh
    made = run_simple(node.eqn, values) if simple else run_equation(node.jaxpr, node.eqn, values)
    known.update((Output(number, i), value) for i, value in enumerate(made))


def value_of(source: Any, known: Mapping[Any, Any]) -> Any:
    """The value of something that is read; a literal without a dtype of its own stays without."""
    if isinstance(source, Input | Output):
        return known[source]
    weak = getattr(source.aval, "weak_type", False) and hasattr(source.val, "item")
    return source.val.item() if weak else source.val
