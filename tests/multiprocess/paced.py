"""`launch.train` that takes its time from some step on: `-m tests.multiprocess.paced STEP ...`.

Steps of a tiny model take milliseconds.  What a test does to a run after one of them (it kills it,
it tells it to stop, which JAX looks for once a second) would come at any later one, or too late.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from launch.train import main
from shardflax.training.data import Loader

__all__ = ["PAUSE", "pace"]

PAUSE = 1.0
"""Seconds before each step."""


def pace(after: int) -> None:
    """Lets this process rest before each step once `after` of them are done."""
    take = Loader.__next__

    def late(self: Loader) -> Any:
        if self.get_state()["batches"] >= after:
            time.sleep(PAUSE)
        return take(self)

    Loader.__next__ = late


if __name__ == "__main__":
    pace(int(sys.argv.pop(1)))
    main()
