"""The command line `shardflax`: a table of commands, each imported when it is asked for.

A command is a module with `main(args) -> int`, where the int is the exit status: 0 if all is well,
1 if the command found something wrong, 2 if it was asked wrongly or came to no result.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

__all__ = ["COMMANDS", "main"]

# name -> (module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "ckpt": ("shardflax.cli.ckpt", "list, show, compare, verify and convert checkpoints"),
    "explain": ("shardflax.cli.explain", "how every leaf of a train state lies on a mesh"),
    "lock": ("shardflax.cli.lock", "write layouts and collectives down, and check them"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command, and returns the exit status.

    An error of the library is one line on stderr, and status 2.  Wrong options raise SystemExit,
    also with status 2; what else goes wrong, in a model of the user's for instance, is shown with
    its traceback, and has that status too.

    >>> main(["--help"])
    usage: shardflax COMMAND ...
    ...
    0
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    if given[0] not in COMMANDS:
        return _unknown(given[0])
    return _run(COMMANDS[given[0]][0], given[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS), default=0)
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: shardflax COMMAND ...", "", *lines, "", "shardflax COMMAND --help"])


def _unknown(command: str) -> int:
    from shardflax.core.errors import did_you_mean

    hint = did_you_mean(command, COMMANDS)
    return _fail(f"no command {command!r}: {hint} Commands are {', '.join(COMMANDS)}.")


def _run(module: str, args: list[str]) -> int:
    if "jax" not in sys.modules:
        # Commands look at shapes and files: accelerators are left to whoever is running on them.
        os.environ["JAX_PLATFORMS"] = "cpu"
    command: Any = importlib.import_module(module)
    from shardflax.core.errors import FlaxError

    try:
        status = int(command.main(args))
        sys.stdout.flush()
    except FlaxError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Who reads has closed the pipe (`| head`); the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception:  # 1 would say that something was found, and nothing was
        traceback.print_exc()
        return 2
    return status


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
