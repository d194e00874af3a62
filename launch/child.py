"""The first lines that run in each process that `launch.local` starts.

`python -m launch.child -m some.module args` runs the module as `python -m some.module args` would,
but the process does not outlive the launcher, and leaves at once if it fails (see
`launch.distributed.leaving_on_failure`).
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.distributed import leaving_on_failure

__all__ = ["LAUNCHER", "STDOUT", "die_with_parent", "run"]

LAUNCHER = "SHARDFLAX_LAUNCHER_PID"
STDOUT = "SHARDFLAX_STDOUT"  # the descriptor for what Python prints
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, also of SIGKILL (Linux only).

    A process whose parent is already gone exits at once.

    >>> import os
    >>> die_with_parent(os.getppid())
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def run(command: Sequence[str]) -> None:
    """Runs `-m module args` or `script.py args` as `__main__`, in this process.

    >>> import sys
    >>> saved = sys.argv
    >>> run(["-m", "this"])  # doctest: +ELLIPSIS
    The Zen of Python, by Tim Peters
    ...
    >>> sys.argv = saved
    """
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    die_with_parent(int(os.environ.pop(LAUNCHER)))
    descriptor = int(os.environ.pop(STDOUT))
    os.set_inheritable(descriptor, False)
    sys.stdout = sys.__stdout__ = open(descriptor, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    with leaving_on_failure():
        run(sys.argv[1:])
