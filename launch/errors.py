"""What can be wrong about how a process was started."""

from __future__ import annotations

from shardflax.core.errors import FlaxError

__all__ = ["LaunchEnvironmentError"]


class LaunchEnvironmentError(FlaxError):
    """The environment variables that describe the processes of a run do not fit together.

    >>> raise LaunchEnvironmentError("SHARDFLAX_PROCESS_ID", "an integer", "'first'")
    Traceback (most recent call last):
    launch.errors.LaunchEnvironmentError: SHARDFLAX_PROCESS_ID: expected an integer, found 'first'
    """

    def __init__(self, variable: str, expected: str, found: str) -> None:
        super().__init__(f"{variable}: expected {expected}, found {found}")
        self.variable = variable
