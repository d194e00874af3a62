"""When two pieces of a trace are the same program."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from shardflax.partitioning.init_graph import Graph, Input, Output, Piece

__all__ = ["Sameness"]


class Sameness:
    """Keys that are equal for equal equations, jaxprs and parameters, whatever traced them.

    What cannot be compared is equal to itself alone.

    >>> import jax
    >>> one, two = (jax.make_jaxpr(lambda x: x + 1)(1.0) for _ in range(2))
    >>> Sameness().of(one) == Sameness().of(two)
    True
    """

    def __init__(self) -> None:
        self._jaxprs: dict[int, tuple[Any, Hashable]] = {}

    def of_piece(self, graph: Graph, piece: Piece, sources: Sequence[Any]) -> Hashable:
        """A key of the program that makes a piece of `graph` out of `sources`."""
        places = {source: place for place, source in enumerate(sources)}
        local = {number: place for place, number in enumerate(piece.nodes)}

        def read(source: Any) -> Hashable:
            if not isinstance(source, Input | Output):
                return self._literal(source)
            if isinstance(source, Output) and source not in places:
                return local[source.node], source.number
            return places[source]

        nodes = (graph.nodes[number] for number in piece.nodes)
        return (
            tuple((self._equation(node.eqn), *map(read, node.reads)) for node in nodes),
            tuple(read(graph.arrays[array]) for array in piece.arrays),
        )

    def of(self, value: Any) -> Hashable:
        """A key of a parameter of an equation."""
        if hasattr(getattr(value, "jaxpr", value), "eqns"):
            return self._jaxpr(value)
        if isinstance(value, tuple | list):
            parts = cast("Sequence[Any]", value)
            return type(parts).__name__, *map(self.of, parts)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return "mapping", *((key, self.of(x)) for key, x in items)
        if isinstance(value, np.ndarray | np.generic):
            array = np.asarray(cast("Any", value))
            return array.shape, str(array.dtype), array.tobytes()
        if isinstance(value, float):
            return "float", value.hex()
        try:
            hash(value)
        except TypeError:
            return "object", id(value)
        return type(value).__qualname__, value

    def _jaxpr(self, value: Any) -> Hashable:
        """A key of a jaxpr; computed once, for a trace has the same ones many times."""
        known = self._jaxprs.get(id(value))
        if known is None:
            known = self._jaxprs[id(value)] = value, self._key(value)
        return known[1]

    def _key(self, value: Any) -> Hashable:
        jaxpr, consts = getattr(value, "jaxpr", value), getattr(value, "consts", ())
        places: dict[Any, int] = {}
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            places[variable] = len(places)

        def read(atom: Any) -> Hashable:
            return self._literal(atom) if hasattr(atom, "val") else places[atom]

        equations = list[Hashable]()
        for eqn in jaxpr.eqns:
            equations.append((self._equation(eqn), *map(read, eqn.invars)))
            for variable in eqn.outvars:
                places[variable] = len(places)
        inputs = tuple(str(variable.aval) for variable in jaxpr.invars)
        return tuple(map(self.of, consts)), inputs, tuple(equations), *map(read, jaxpr.outvars)

    def _equation(self, eqn: Any) -> Hashable:
        params = tuple((name, self.of(value)) for name, value in sorted(eqn.params.items()))
        return eqn.primitive.name, params

    def _literal(self, literal: Any) -> Hashable:
        """A key of a value that is part of a program."""
        return "literal", str(literal.aval), self.of(np.asarray(literal.val))
