"""How processes tell one another things, through the key-value store of JAX's coordination service.

Nothing here touches a device, so it can go on in the background of a computation.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from shardflax.ckpt.errors import CheckpointError, CheckpointPeerError
from shardflax.core.staging import coordination_client

__all__ = ["Rendezvous", "meet", "new_token"]

_GRACE = 1.0
"""Seconds by which the others wait longer than process 0, whose word they wait for."""
_counter = itertools.count()


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """A place where the processes of one manager exchange values; with one process, trivial.

    `timeout` is how many seconds to wait for a value.

    >>> alone = meet(timeout=5)
    >>> alone.tell("a", 3)
    >>> alone.hear("a", by=0)
    3
    """

    root: str
    timeout: float
    index: int
    count: int
    client: Any
    here: dict[str, str]

    @property
    def primary(self) -> bool:
        """True in the process that commits, deletes and decides (process 0)."""
        return self.index == 0

    def tell(self, key: str, value: Any) -> None:
        """Leaves a JSON value for the others."""
        text = json.dumps(value)
        if self.client is None:
            self.here[key] = text
        else:
            try:
                self.client.key_value_set(f"{self.root}/{key}", text, allow_overwrite=True)
            except Exception as error:
                raise _gone(error) from error

    def peek(self, key: str) -> Any:
        """A value if it is there already, else None."""
        if self.client is None:
            return json.loads(self.here.get(key, "null"))
        try:
            return json.loads(self.client.key_value_try_get(f"{self.root}/{key}"))
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise _gone(error) from error

    def hear(self, key: str, by: int, doing: str = "", patience: float = _GRACE) -> Any:
        """Waits for a value that process `by` leaves.

        Raises CheckpointPeerError, naming it, if it does not within the timeout.
        """
        if self.client is None:
            return json.loads(self.here[key])
        limit = self.timeout + (0 if by == self.index or self.primary else patience)
        try:
            text = self.client.blocking_key_value_get(f"{self.root}/{key}", int(limit * 1000))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise _gone(error) from error
            raise CheckpointPeerError([by], limit, doing or key) from error
        return json.loads(text)

    def gather(
        self,
        key: str,
        doing: str,
        stop: Callable[[Any], bool] = bool,
        without: Sequence[int] = (),
    ) -> dict[int, Any]:
        """Waits for the values that all processes leave under `key/<index>`; for process 0.

        A value for which `stop` is true ends the waiting at once, and processes of `without` are
        not waited for.  Raises CheckpointPeerError, naming those that are missing, if some have not
        left one within the timeout.
        """
        if self.client is None:
            return {0: json.loads(self.here[f"{key}/0"])}
        end, pause = time.monotonic() + self.timeout, 0.002
        found: dict[int, Any] = {}
        missing = [p for p in range(self.count) if p not in without]
        while missing:
            for name, text in self.client.key_value_dir_get(f"{self.root}/{key}/"):
                found[int(name.rpartition("/")[2])] = json.loads(text)
            if any(map(stop, found.values())):
                break
            missing = [p for p in missing if p not in found]
            if missing and time.monotonic() > end:
                raise CheckpointPeerError(missing, self.timeout, doing)
            time.sleep(pause if missing else 0)
            pause = min(2 * pause, 0.05)
        return found

    def forget(self, prefix: str) -> None:
        """Drops what was left under a prefix."""
        if self.client is None:
            for key in [key for key in self.here if key.startswith(f"{prefix}/")]:
                del self.here[key]
        else:
            self.client.key_value_delete(f"{self.root}/{prefix}/")

    def agree(self, key: str, value: Any, doing: str) -> Any:
        """Process 0's value, in every process."""
        if self.primary:
            self.tell(key, value)
            return value
        return self.hear(key, by=0, doing=doing)

    def together(self, key: str, value: Mapping[str, Any], doing: str) -> dict[int, Any]:
        """The values of all processes, in every one of them, once all have come here."""
        self.tell(f"{key}/in/{self.index}", value)
        if not self.primary:
            found = self.hear(f"{key}/out", by=0, doing=doing)
            if "missing" in found:
                raise CheckpointPeerError(found["missing"], self.timeout, doing)
            return {int(index): said for index, said in found["all"].items()}
        try:
            found = self.gather(f"{key}/in", doing, stop=_never)
        except CheckpointPeerError as error:
            self.tell(f"{key}/out", {"missing": error.processes})
            raise
        self.tell(f"{key}/out", {"all": found})
        return found


def _gone(error: Exception) -> CheckpointPeerError:
    """The error for a coordination service that cannot be reached: process 0 runs it."""
    why = str(error).partition("\n")[0]
    return CheckpointPeerError([0], 0, f"the coordination service, which it runs, is gone: {why}")


def _never(_: Any) -> bool:
    return False


def meet(timeout: float) -> Rendezvous:
    """A new rendezvous; all processes make theirs in the same order.

    Raises ValueError for a timeout that is not positive and finite; CheckpointError if there are
    several processes that cannot talk.
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"CheckpointManager: timeout is a positive, finite number, not {timeout}.")
    number, count = next(_counter), jax.process_count()
    client = coordination_client() if count > 1 else None
    if client is None and count > 1:
        raise CheckpointError(
            f"There are {count} processes, but no coordination service: "
            f"call jax.distributed.initialize() before anything else."
        )
    root = f"shardflax.ckpt/{number}"
    return Rendezvous(root, timeout, jax.process_index(), count, client, {})


def new_token() -> str:
    """A short name that nobody else has."""
    return secrets.token_hex(4)
