"""Errors: one class per cause.

Inner code raises short; the module boundary adds the module path.  Each message says where, what
was expected, what was found, and what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["FlaxError", "did_you_mean"]


class FlaxError(Exception):
    """The base class of every error that this library raises on purpose.

    >>> issubclass(ScopeParamNotFoundError, FlaxError)
    True
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of `known`, or lists them all.

    >>> did_you_mean("emebd", ["embed", "mlp"])
    "did you mean 'embed'?"
    >>> did_you_mean("zzz", ["embed", "mlp"])
    'known: embed, mlp.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}."
