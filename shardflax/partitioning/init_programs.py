"""The programs of an init: equal pieces are one program, which is given other keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import NamedSharding

from shardflax.partitioning.init_graph import (
    Graph,
    Input,
    Output,
    Piece,
    pieces_of,
    run_node,
    run_piece,
    sources_of,
)
from shardflax.partitioning.sameness import Sameness
from shardflax.partitioning.untyped import jx

__all__ = ["Programs", "Step"]


@dataclass(frozen=True)
class Step:
    """One run of one program: the arrays that it makes, by number, and what it reads."""

    arrays: tuple[int, ...]
    program: Any
    sources: tuple[Any, ...]


class Programs:
    """What an init runs, one step after the other, to make the arrays of a state.

    `arguments` are the flat arguments of the init; `place(number, array)` lays an array out inside
    of a program.  Keys are derived one by one, outside of the programs: from there on, equal
    parameters differ in nothing else.  `count` is the number of different programs.

    >>> import jax
    >>> from shardflax.partitioning.init_graph import graph_of
    >>> from shardflax.partitioning import make_mesh
    >>> def init(key):
    ...     return [jax.random.normal(jax.random.fold_in(key, i), (8, 4)) for i in range(9)]
    >>> key, rows = jax.random.key(0), NamedSharding(make_mesh("data=8"), jax.P("data"))
    >>> graph = graph_of(jax.make_jaxpr(init)(key))
    >>> programs = Programs(graph, [key], [rows] * 9, lambda number, array: array)
    >>> len(programs.steps), programs.count
    (9, 1)
    >>> (array,) = programs.run(programs.steps[3])
    >>> bool((array == init(key)[3]).all())
    True
    """

    def __init__(
        self,
        graph: Graph,
        arguments: Sequence[Any],
        shardings: Sequence[NamedSharding],
        place: Callable[[int, Any], Any],
    ) -> None:
        self._graph, self._shardings, self._place = graph, shardings, place
        self._known: dict[Any, Any] = {Input("argument", i): x for i, x in enumerate(arguments)}
        self._known |= {Input("constant", i): x for i, x in enumerate(graph.consts)}
        same, programs = Sameness(), dict[Hashable, Any]()
        self.steps = tuple(self._step(piece, same, programs) for piece in pieces_of(graph))
        self.count = len(programs)

    def make_keys(self) -> None:
        """Derives all keys that programs are given; best done where no mesh is in scope."""
        for step in self.steps:
            for source in step.sources:
                self._value(source)

    def run(self, step: Step) -> list[Any]:
        """The arrays of one step."""
        return step.program(*map(self._value, step.sources))

    def lower(self, step: Step) -> Any:
        """The program of a step, lowered: `lower(step).compile().memory_analysis()`."""
        return step.program.lower(*map(self._value, step.sources))

    def _step(self, piece: Piece, same: Sameness, programs: dict[Hashable, Any]) -> Step:
        sources = sources_of(self._graph, piece)
        shardings = tuple(self._shardings[array] for array in piece.arrays)
        inputs = tuple(map(self._type, sources))
        key = same.of_piece(self._graph, piece, sources), inputs, shardings
        if key not in programs:
            programs[key] = jx.jit(self._function(piece, sources), out_shardings=[*shardings])
        return Step(piece.arrays, programs[key], sources)

    def _function(self, piece: Piece, sources: Sequence[Any]) -> Callable[..., list[Any]]:
        def initialise(*values: Any) -> list[Any]:
            arrays = run_piece(self._graph, piece, sources, values)
            return [self._place(*pair) for pair in zip(piece.arrays, arrays, strict=True)]

        return initialise

    def _type(self, source: Any) -> str:
        """Shape and dtype of an input of a program."""
        if isinstance(source, Output):
            return str(self._graph.nodes[source.node].eqn.outvars[source.number].aval)
        return str(jx.typeof(self._known[source]))

    def _value(self, source: Any) -> Any:
        """The value of an input; keys are made here, with all that they are made of."""
        if source not in self._known:
            missing, open_ = set[int](), list[int]([source.node])
            while open_:
                missing.add(number := open_.pop())
                reads: tuple[Any, ...] = self._graph.nodes[number].reads
                new = (read for read in reads if isinstance(read, Output))
                open_ += [read.node for read in new if read not in self._known]
            for number in sorted(missing):
                run_node(self._graph, number, self._known)
        return self._known[source]
