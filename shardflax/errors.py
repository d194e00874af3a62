"""All errors that the library raises on purpose, by the names of Linen's catalogue."""

from shardflax.core.errors import *  # noqa: F403
from shardflax.core.errors import __all__ as _core
from shardflax.partitioning.errors import *  # noqa: F403
from shardflax.partitioning.errors import __all__ as _partitioning

__all__ = sorted({*_core, *_partitioning} - {"did_you_mean", "raise_problems"})
