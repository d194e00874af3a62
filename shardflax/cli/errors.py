"""What can be wrong about a command."""

from __future__ import annotations

from shardflax.core.errors import FlaxError

__all__ = ["CommandError", "ImportPathError"]


class CommandError(FlaxError):
    """Options that do not fit together, or a file that cannot be read."""


class ImportPathError(CommandError):
    """`package.module:name` that cannot be imported, or is not what is wanted there."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path!r}: {problem}")
        self.path = path
