"""What programs without inputs compute, as expressions: equal expressions have equal values.

Two programs that do the same operations on the same operands agree in every bit, in whatever order
and under whatever calls, loops and branches they do them.  To see that, nothing is compiled, and
nothing depends on how XLA would fuse what is compiled as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

__all__ = ["Expressions"]

_SAME = {
    "name",
    "optimization_barrier",
    "random_clone",
}  # primitives whose outputs are their inputs
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_ROUNDS = 12  # more than any loop in the programs carries


class Expressions:
    """Gives each expression that it meets a number: the same to the same."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._stacks: dict[int, tuple[int, ...]] = {}
        self._zeros: set[int] = set()
        self._depth = 0  # of loops whose number of steps nobody knows

    def of(self, closed: core.ClosedJaxpr) -> list[int]:
        """The numbers of the outputs of a program without inputs."""
        return self._run(closed, [])

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _run(self, body: Any, args: Sequence[int]) -> list[int]:
        """The outputs of a jaxpr of `args`."""
        jaxpr: core.Jaxpr = getattr(body, "jaxpr", body)
        values = dict(zip(jaxpr.invars, args, strict=True))
        consts = getattr(body, "consts", ())
        values.update(zip(jaxpr.constvars, map(self._constant, consts), strict=True))

        def read(x: Any) -> int:
            return self._constant(x.val) if isinstance(x, core.Literal) else values[x]

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(x) for x in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _constant(self, value: Any) -> int:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            impl = str(jax.random.key_impl(value))
            return self._number("key", impl, self._constant(jax.random.key_data(value)))
        array = np.asarray(value)
        made = self._number("constant", array.dtype, array.shape, array.tobytes())
        if array.dtype == np.float32 and not array.any():
            self._zeros.add(made)
        return made

    def _equation(self, eqn: Any, ins: list[int]) -> list[int]:
        kind = eqn.primitive.name
        if kind in _SAME:
            return ins
        if kind in _LOOPS:
            return _LOOPS[kind](self, eqn, ins)
        body = next((eqn.params[name] for name in _BODIES if name in eqn.params), None)
        if body is not None and kind != "shard_map":
            return self._run(body, ins)
        if kind == "sub" and ins[1] in self._zeros and _like_first(eqn):
            return ins[:1]  # exact for every number
        made = self._number(kind, self._key(eqn.params), *ins)
        outs = [self._number("output", i, made) for i in range(len(eqn.outvars))]
        if kind == "broadcast_in_dim" and ins[0] in self._zeros:
            self._zeros.update(outs)
        return outs

    def _key(self, value: Any) -> Any:
        """A parameter of an operation, as a key."""
        if isinstance(value, Mapping):
            return tuple((name, self._key(x)) for name, x in sorted(value.items()))
        if isinstance(value, list | tuple):
            return type(value).__name__, *map(self._key, value)
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            inputs = getattr(value, "jaxpr", value).invars
            arguments = [self._number("argument", i, str(x.aval)) for i, x in enumerate(inputs)]
            return tuple(self._run(value, arguments))
        if isinstance(value, np.ndarray | jax.Array):
            return self._constant(value)
        return type(value).__name__, value

    # --- loops and branches

    def _scan(self, eqn: Any, ins: list[int]) -> list[int]:
        """Step after step: what a step does not change is the same expression in each."""
        params, body = eqn.params, eqn.params["jaxpr"].jaxpr
        # What is scanned has one dim more outside; how parameters say it changes with JAX.
        n_carry = _count_alike(eqn.outvars, body.outvars)
        n_consts = _count_alike(eqn.invars, body.invars) - n_carry
        consts, xs = ins[:n_consts], ins[n_consts + n_carry :]
        carry = ins[n_consts : n_consts + n_carry]
        steps: dict[int, list[int]] = {}
        order = range(params["length"])
        for i in reversed(order) if params["reverse"] else order:
            outs = self._run(params["jaxpr"], [*consts, *carry, *(self._at(x, i) for x in xs)])
            carry, steps[i] = outs[:n_carry], outs[n_carry:]
        columns = zip(*(steps[i] for i in order), strict=True)
        return [*carry, *map(self._stack, columns)]

    def _stack(self, parts: tuple[int, ...]) -> int:
        made = self._number("stack", *parts)
        self._stacks[made] = parts
        return made

    def _at(self, stacked: int, i: int) -> int:
        parts = self._stacks.get(stacked)
        return self._number("at", i, stacked) if parts is None else parts[i]

    def _cond(self, eqn: Any, ins: list[int]) -> list[int]:
        index, *operands = ins
        branches = [self._run(branch, operands) for branch in eqn.params["branches"]]
        return [self._number("cond", index, *outs) for outs in zip(*branches, strict=True)]

    def _while(self, eqn: Any, ins: list[int]) -> list[int]:
        """What is carried is told apart by how it starts, what becomes of it, and when it ends.

        That says which of two loops' values are equal, once it is looked at for as many rounds as
        there are values: as with the states of two automata.
        """
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts = ins[:n_cond], ins[n_cond : n_cond + n_body]
        carry = ins[n_cond + n_body :]
        if 2 * len(carry) > _ROUNDS:
            return [self._number("unknown", len(self._numbers)) for _ in carry]
        self._depth += 1
        carry = [self._number("carried", self._depth, x) for x in carry]
        for _ in range(_ROUNDS):
            (ends,) = self._run(params["cond_jaxpr"], [*cond_consts, *carry])
            after = self._run(params["body_jaxpr"], [*body_consts, *carry])
            pairs = zip(carry, after, strict=True)
            carry = [self._number("while", ends, old, new) for old, new in pairs]
        self._depth -= 1
        return carry


def _count_alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(x.aval.shape == y.aval.shape for x, y in pairs)


def _like_first(eqn: Any) -> bool:
    """True if what comes out has the shape and dtype of the first operand."""
    first, out = (x.aval for x in (eqn.invars[0], eqn.outvars[0]))
    return (first.shape, first.dtype) == (out.shape, out.dtype)


_LOOPS: dict[str, Callable[[Expressions, Any, list[int]], list[int]]] = {
    "scan": Expressions._scan,  # pyright: ignore[reportPrivateUsage]
    "cond": Expressions._cond,  # pyright: ignore[reportPrivateUsage]
    "while": Expressions._while,  # pyright: ignore[reportPrivateUsage]
}
