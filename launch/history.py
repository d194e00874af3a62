"""The losses of a run, one line of JSON a step, in the folder of the run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["History"]


class History:
    """A file of metrics by step, which a run that goes on continues where its state does.

    Only the process that shall `write` touches the file.  Opening it for a run that has done
    `step` steps drops what a killed run wrote after them.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "losses.jsonl")
    >>> with History(path, step=0) as history:
    ...     history.add(1, {"loss": 2.5})
    ...     history.add(2, {"loss": 2.0})
    >>> with History(path, step=1) as history:
    ...     history.add(2, {"loss": 1.5})
    >>> [(line["step"], line["loss"]) for line in History.read(path)]
    [(1, 2.5), (2, 1.5)]
    """

    def __init__(self, path: Path, *, step: int, write: bool = True) -> None:
        self.path = path
        self._file: Any = None
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_after(step)
            self._file = path.open("a")

    def _drop_after(self, step: int) -> None:
        kept = [line for line in self.read(self.path) if line["step"] <= step]
        partial = self.path.with_suffix(".part")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.path)

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        r"""The lines of a file; none if it is not there.

        What a kill cut short, or a crash of the machine damaged, is left out.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "losses.jsonl")
        >>> _ = path.write_text('{"step": 1}\n\0\0\n{"st')
        >>> History.read(path), History.read(Path("nowhere"))
        ([{'step': 1}], [])
        """
        if not path.exists():
            return []
        lines = path.read_text(errors="replace").split("\n")[:-1]  # the last has no end
        found: list[dict[str, Any]] = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a step."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
