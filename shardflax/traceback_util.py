"""Which frames tracebacks show.

JAX takes its own frames out of the traceback of an error that goes through one of its transforms.
With the flag `flax_filter_frames`, which is on unless said otherwise, importing this module lets it
take out this library's frames, too, so that the user's lines stand one below the other.
"""

from __future__ import annotations

import os

from shardflax import config
from shardflax.core import staging

__all__ = ["hide_flax_in_tracebacks", "register_exclusion", "show_flax_in_tracebacks"]

_HERE = os.path.dirname(__file__)


def register_exclusion(path: str) -> None:
    """Leaves frames of files below `path` out of the tracebacks that JAX filters.

    >>> register_exclusion("/somewhere/site-packages/boring")
    """
    staging.hide_frames(path)


def _apply(hidden: bool) -> None:
    if hidden:
        staging.hide_frames(_HERE)
    else:
        staging.show_frames(_HERE)


def hide_flax_in_tracebacks() -> None:
    """Takes this library's frames out of the tracebacks that JAX filters.

    >>> hide_flax_in_tracebacks()
    >>> config.flax_filter_frames
    True
    """
    config.update("flax_filter_frames", True)


def show_flax_in_tracebacks() -> None:
    """Leaves this library's frames in the tracebacks that JAX filters.

    >>> show_flax_in_tracebacks()
    >>> config.flax_filter_frames
    False
    >>> hide_flax_in_tracebacks()
    """
    config.update("flax_filter_frames", False)


config.on_update("flax_filter_frames", _apply)
