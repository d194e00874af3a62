"""Checkpoints as files or folders named by their step: which there are, their order, which to keep.

A name is a prefix and a number, `checkpoint_100` or `loss_0.25`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "MPA_SUFFIX",
    "REPLACED",
    "StepFile",
    "expire",
    "natural_sort",
    "safe_normpath",
    "step_files",
]

MPA_SUFFIX = "_gda"  # of the folder with a checkpoint's multiprocess arrays
REPLACED = ".replaced"  # of a checkpoint that is about to be overwritten; its name begins with "."

_DIGITS = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SIGNED = re.compile(f"([-+]?{_DIGITS})")


def natural_sort(file_list: Iterable[str], signed: bool = True) -> list[str]:
    """Sorts names by the numbers in them, not digit by digit.

    `signed` says that a sign before a number belongs to it; else it is as if it was not there.

    >>> natural_sort(["ckpt_1e5", "ckpt_-1.0", "ckpt_10", "ckpt_9"])
    ['ckpt_-1.0', 'ckpt_9', 'ckpt_10', 'ckpt_1e5']
    """
    number = float if signed else lambda text: abs(float(text))

    def key(name: str) -> list[Any]:
        # Text and numbers take turns, so that like is compared with like.
        return [number(s) if i % 2 else s for i, s in enumerate(_SIGNED.split(name))]

    return sorted(file_list, key=key)


def safe_normpath(path: str) -> str:
    """`os.path.normpath` that leaves the scheme of `gs://bucket` alone.

    >>> safe_normpath("gs://a//b/../c"), safe_normpath("/x/./y/")
    ('gs://a/c', '/x/y')
    """
    scheme, found, rest = path.rpartition("://")
    return f"{scheme}{found}{os.path.normpath(rest)}"


class StepFile(NamedTuple):
    """A checkpoint, and the number in its name.

    >>> StepFile(Path("/ckpt/checkpoint_3"), "3").step
    3.0
    """

    path: Path
    number: str

    @property
    def step(self) -> float:
        """The number as one."""
        return float(self.number)

    def delete(self) -> None:
        """Removes the checkpoint, and its multiprocess arrays."""
        for path in (self.path, self.path.with_name(self.path.name + MPA_SUFFIX)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def step_files(ckpt_dir: str | os.PathLike[str], prefix: str) -> list[StepFile]:
    """The checkpoints of a folder, in the order of their steps; files of other names are not seen.

    One that was to be overwritten when the program was killed is still there, under another name.

    >>> step_files("/not/there", "checkpoint_")
    []
    """
    folder = Path(safe_normpath(os.path.join(os.fspath(ckpt_dir), prefix + "0"))).parent
    start = os.path.basename(prefix)
    if not folder.is_dir():
        return []
    files: dict[str, Path] = {}
    for path in folder.iterdir():
        replaced = path.name.startswith(".") and path.name.endswith(REPLACED)
        name = path.name[1 : -len(REPLACED)] if replaced else path.name
        number = name[len(start) :]
        if not name.startswith(start) or not _SIGNED.fullmatch(number):
            continue
        if not replaced or number not in files:
            files[number] = path
    found = (StepFile(path, number) for number, path in files.items())
    return sorted(found, key=lambda file: file.step)


def expire(files: list[StepFile], keep: int, keep_every: float | None) -> list[StepFile]:
    """Which of `files` (in order) the policy lets go.

    The last `keep` stay.  With `keep_every`, so does each earlier one that is at least so many
    steps after the one kept before it.

    >>> files = [StepFile(Path(n), n) for n in ("1", "5", "6", "8", "10", "12")]
    >>> [file.number for file in expire(files, 2, 4)]
    ['6', '8']
    """
    old = files[:-keep] if keep else files
    if keep_every is None:
        return old
    gone, last = list[StepFile](), float("-inf")
    for file in old:
        if file.step - last >= keep_every:
            last = file.step
        else:
            gone.append(file)
    return gone
