"""What can be wrong about how a process was started, and with the options of a run."""

from __future__ import annotations

from shardflax.core.errors import FlaxError

__all__ = ["LaunchEnvironmentError", "TrainOptionError"]


class LaunchEnvironmentError(FlaxError):
    """The environment variables that describe the processes of a run do not fit together.

    >>> raise LaunchEnvironmentError("SHARDFLAX_PROCESS_ID", "an integer", "'first'")
    Traceback (most recent call last):
    launch.errors.LaunchEnvironmentError: SHARDFLAX_PROCESS_ID: expected an integer, found 'first'
    """

    def __init__(self, variable: str, expected: str, found: str) -> None:
        super().__init__(f"{variable}: expected {expected}, found {found}")
        self.variable = variable


class TrainOptionError(FlaxError):
    """An option of `launch.train` has a value that no run can have.

    >>> raise TrainOptionError("save_every", 0, "a number from 1")
    Traceback (most recent call last):
    launch.errors.TrainOptionError: --save-every 0: expected a number from 1
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.option = f"--{field.replace('_', '-')}"
        super().__init__(f"{self.option} {value}: expected {expected}")
