"""What checkpoints shall reach, and what was found: the first table of `checkpoints.py`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

__all__ = ["Figures", "verdicts"]

_Samples = dict[str, dict[str, list[float]]]
_BESIDE = ("Orbax default", "Orbax tuned")


@dataclasses.dataclass
class Figures:
    """All that was measured: samples by what and where, MB by contender, the end of a process."""

    tables: dict[tuple[str, str], _Samples] = dataclasses.field(default_factory=dict)
    memory: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    death: dict[str, Any] = dataclasses.field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The same for a file."""
        tables = {f"{what}, {where}": taken for (what, where), taken in self.tables.items()}
        return {"samples": tables, "memory": self.memory, "death": self.death}

    def median(self, table: tuple[str, str], name: str, what: str, over: str = "") -> float:
        """The median over the rounds, of a ratio if `over` is given; NaN if not measured."""
        taken = self.tables.get(table, {}).get(name, {})
        values = taken.get(what, [])
        if over:
            values = [a / b for a, b in zip(values, taken[over], strict=True)] if values else []
        return statistics.median(values) if values else float("nan")


@dataclasses.dataclass(frozen=True)
class _Target:
    """A figure and its limit; `digits` after the point."""

    what: str
    table: tuple[str, str]
    column: str
    over: str
    limit: float
    unit: str = ""
    digits: int = 2


def _targets() -> Iterator[_Target]:
    for where, total in (("disk", 1.35), ("tmpfs", 1.5)):
        for table, text in (("large", ""), ("large, two processes", ", two processes")):
            key = (table, where)
            yield _Target(f"blocking / raw write, {where}{text}", key, "blocking", "raw save",
                          0.03, digits=3)  # fmt: skip
            yield _Target(f"durable total, {where}{text}", key, "save", "raw save", total)
            if where == "disk":
                for what, limit in (("restore", 1.9), ("resharded", 2.0)):
                    yield _Target(
                        f"verified restore, {'same' if what == 'restore' else what}{text}", key,
                        what, "raw restore", limit,
                    )  # fmt: skip
    for what, limit in (("save", 1.2), ("blocking", 0.15), ("restore", 2.5)):
        yield _Target(f"small leaves: {what}", ("small", "disk"), what, "", limit, " s")
    yield _Target("barriers and waits in the blocking part", ("large, two processes", "disk"),
                  "barriers", "", 0, digits=0)  # fmt: skip
    yield _Target("training time lost to a background save", ("training", "disk"), "lost", "",
                  0.5, " s")  # fmt: skip


def verdicts(figures: Figures) -> list[str]:
    """A table: what, the others, ours, the limit, and whether it is kept."""
    lines = [f"| | {' | '.join(_BESIDE)} | ours | target | |", "|---|---|---|---|---|---|"]
    for target in _targets():
        found = [
            figures.median(target.table, name, target.column, target.over)
            for name in (*_BESIDE, "ours")
        ]
        lines.append(_line(target.what, found, target.limit, target.unit, target.digits))
    most = [max(figures.memory[name].values()) for name in (*_BESIDE, "ours") if figures.memory]
    if most:
        lines.append(_line("extra memory beyond staging", most, 64, " MB", 0))
    if figures.death:
        late = figures.death["seconds"] - figures.death["timeout"]
        found = [float("nan"), float("nan"), late]
        lines.append(_line("death of a process heard after the timeout by", found, 2, " s", 2))
    return [*lines, "", *_ELSEWHERE]


def _line(what: str, found: list[float], limit: float, unit: str, digits: int) -> str:
    texts = ["-" if x != x else f"{x:.{digits}f}{unit}" for x in found]
    kept = "met" if round(found[-1], digits) <= limit else "missed"
    return f"| {what} | {' | '.join(texts)} | <= {limit:g}{unit} | {kept} |"


_ELSEWHERE = (
    "Not a matter of speed, and shown by tests: damaged files are detected "
    "(`tests/ckpt/test_damage.py`), a program that ends without waiting has committed "
    "(`tests/multiprocess/test_ckpt_processes.py`), a process that dies is named "
    "(`tests/multiprocess/test_ckpt_faults.py`), all is forced to the disk before a step can be "
    "seen (`tests/ckpt/test_disk.py`).",
)
