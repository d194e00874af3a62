"""Tables of a module's layers, under the name that Linen's programs import them by."""

from __future__ import annotations

from shardflax.core.summary import tabulate

__all__ = ["tabulate"]
