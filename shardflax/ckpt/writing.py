"""What writes the arrays of a save, wherever they go."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from shardflax.ckpt.durable import FileRecord
from shardflax.ckpt.store import Store
from shardflax.ckpt.worker import Worker

__all__ = ["check_there", "writer"]


@functools.singledispatch
def writer(folder: Any, syncer: Worker) -> Any:
    """What writes one process's part into a folder.

    >>> import tempfile
    >>> from pathlib import Path
    >>> writer(Path(tempfile.mkdtemp()), Worker("example")).finish()
    {}
    """
    return Store(folder, syncer)


@functools.singledispatch
def check_there(folder: Any, files: Mapping[str, FileRecord]) -> None:
    """Raises OSError if a file that was written is no longer there as a whole.

    >>> from pathlib import Path
    >>> check_there(Path("/nowhere"), {})
    """
    for name, (size, _) in files.items():
        if (folder / name).stat().st_size != size:
            raise OSError(f"{folder / name} was changed while the step was saved")
