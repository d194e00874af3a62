"""Stories: short programs on the functional core that show what a design is for.

A story is a function of a namespace: `init`, `apply`, `lift` and `nn` (layers as functions of
scopes) of a functional core, and `linen`, the modules.  It is told by both libraries, and what it
returns must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flax.core
import flax.core.nn
import flax.linen

import shardflax.nn
from shardflax import core
from tests.core.harness import assert_equal, plain, quick_key

__all__ = ["KEY", "told"]

KEY = quick_key(0)


def _namespace(core: Any, linen: Any) -> SimpleNamespace:
    names = ("init", "apply", "bind", "lift", "nn", "freeze", "unfreeze", "Scope")
    return SimpleNamespace(linen=linen, **{name: getattr(core, name) for name in names})


OURS = _namespace(core, shardflax.nn)
THEIRS = _namespace(flax.core, flax.linen)


def told(story: Callable[[Any], Any]) -> Any:
    """What the story returns, with ours; Flax must say the same, bit for bit."""
    ours = story(OURS)
    assert_equal(plain(ours), plain(story(THEIRS)))
    return ours
