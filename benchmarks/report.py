"""The table of results: rows, their budgets, and the files they are written to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.timing import Rounds

__all__ = ["Row", "machine", "markdown", "write"]


@dataclass(frozen=True)
class Row:
    """One row: a figure of ours beside Flax's and its budget; `texts` say how to print them.

    `ours` None was not measured; `texts` may say why.
    """

    what: str
    budget: float
    ours: float | None
    flax: float | None = None
    unit: str = "x"
    texts: Mapping[str, str] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_ratio(cls, what: str, budget: float, taken: Rounds, over: str) -> Row:
        """A row of ratios; the detail has the quartiles and the median times, in milliseconds."""
        names = [name for name in taken.seconds if name != over]
        return cls(
            what,
            budget,
            ours=taken.ratio("ours", over),
            flax=taken.ratio("flax", over) if "flax" in names else None,
            detail={
                "quartiles": {name: taken.spread(name, over) for name in names},
                "milliseconds": {name: taken.median(name) * 1e3 for name in taken.seconds},
                "rounds": len(taken.seconds[over]),
            },
        )

    @property
    def met(self) -> bool | None:
        """Whether the figure, as it is printed, is within its budget; None if there is no figure.

        >>> Row("", budget=1.25, ours=1.253).met, Row("", budget=1.25, ours=1.26).met
        (True, False)
        """
        return None if self.ours is None else round(self.ours, 2) <= self.budget

    def text(self, column: str) -> str:
        """How a column is printed."""
        value = getattr(self, column)
        if value is None:
            return self.texts.get(column, "-")
        written = {"x": f"{value:.2f}", "us": f"{value:.1f} us", "s": f"{value:.3f} s"}
        return self.texts.get(column) or written.get(self.unit, f"{value:g} {self.unit}")


_MET = {True: "met", False: "missed", None: "-"}


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table.

    >>> print(markdown([Row("cost", budget=1.5, ours=2.0, flax=4.0)]))
    | what | Flax | ours | budget | |
    |---|---|---|---|---|
    | cost | 4.00 | 2.00 | <= 1.50 | missed |
    """
    lines = ["| what | Flax | ours | budget | |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row.what, row.text("flax"), row.text("ours"), _budget(row)]
        lines.append(f"| {' | '.join(cells)} | {_MET[row.met]} |")
    return "\n".join(lines)


def _budget(row: Row) -> str:
    return row.texts["budget"] if "budget" in row.texts else f"<= {row.text('budget')}"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "load average": os.getloadavg(),
    }


def write(rows: Sequence[Row], command: str, before: Mapping[str, Any], path: Path) -> None:
    """Writes the rows, the command and the machine to `path` (JSON) and beside it as Markdown."""
    found = [{**asdict(row), "met": row.met} for row in rows]
    content = {"command": command, "machine": before, "load after": os.getloadavg(), "rows": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    facts = ", ".join(f"{name} {value}" for name, value in before.items())
    text = f"`{command}`\n\n{facts}\n\n{markdown(rows)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
