"""The display by a fake clock: lines, bars, who draws, and how wide."""

import io
import re
from typing import Any

import pytest

from shardflax.training.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that stands still until told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHARDFLAX_PROGRESS", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def run(progress: Progress, clock: Clock, steps: range, seconds: float = 1.0) -> None:
    """Steps that take a given time."""
    for step in steps:
        clock.now += seconds
        progress.update(step, 1 / step)


def make(total: int, stream: Any, **kwargs: Any) -> tuple[Progress, Clock]:
    """A display with 1000 tokens a step."""
    clock = Clock()
    progress = Progress(total, tokens_per_step=1000, stream=stream, clock=clock, **kwargs)
    return progress, clock


def frames(text: str) -> list[str]:
    """What the terminal shows after each carriage return, without colours."""
    return [re.sub(r"\x1b\[[\d;]*[mK]", "", part) for part in text.split("\r")[1:]]


def test_lines_now_and_then_first_and_last() -> None:
    out = io.StringIO()
    progress, clock = make(25, out, every_seconds=10)
    with progress:
        run(progress, clock, range(1, 26))
    assert out.getvalue().splitlines() == [
        "step 1/25  loss 1.0000  1k tok/s  0:24 left",
        "step 11/25  loss 0.0909  1k tok/s  0:14 left",
        "step 21/25  loss 0.0476  1k tok/s  0:04 left",
        "step 25/25  loss 0.0400  1k tok/s  0:00 left",
    ]


def test_a_resumed_run_counts_from_its_start() -> None:
    out = io.StringIO()
    progress, clock = make(100, out, start=90)
    run(progress, clock, range(91, 93), seconds=2.0)
    assert out.getvalue() == "step 91/100  loss 0.0110  500 tok/s  0:18 left\n"


def test_a_bar_on_a_terminal_is_redrawn_in_one_line() -> None:
    out = Terminal()
    progress, clock = make(4, out)
    with progress:
        run(progress, clock, range(1, 5))
    *_, last = frames(out.getvalue())
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")
    assert re.fullmatch(r"━+ step 4/4  loss 0\.2500  1k tok/s  0:00 left\n", last)


def test_a_bar_is_not_drawn_more_often_than_one_can_see() -> None:
    out = Terminal()
    progress, clock = make(1000, out)
    run(progress, clock, range(1, 1000), seconds=0.01)
    assert 90 <= len(frames(out.getvalue())) <= 110


@pytest.mark.parametrize("width", [20, 45, 60, 200])
def test_a_bar_fits_the_columns_it_is_given(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDFLAX_PROGRESS", "bar")
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    progress, clock = make(12345, out)
    run(progress, clock, range(12340, 12345))
    assert frames(out.getvalue()) and all(len(frame) <= width for frame in frames(out.getvalue()))
    assert ("━" in out.getvalue()) == (width > 45)


@pytest.mark.parametrize(
    ("told", "terminal", "mode"),
    [("bar", False, "bar"), ("lines", True, "lines"), (None, True, "bar"), (None, False, "lines")],
)
def test_who_decides(
    told: str | None, terminal: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told:
        monkeypatch.setenv("SHARDFLAX_PROGRESS", told)
    stream = Terminal() if terminal else io.StringIO()
    assert make(1, stream)[0].mode == mode
    assert make(1, stream, mode="bar")[0].mode == "bar"


def test_other_processes_are_silent_but_measure() -> None:
    out = io.StringIO()
    progress, clock = make(9, out, shown=False)
    with progress:
        run(progress, clock, range(1, 10))
        progress.note("saved")
    assert out.getvalue() == "" and progress.tokens_per_second == 1000


def test_notes_stand_above_the_bar() -> None:
    out = Terminal()
    progress, clock = make(9, out)
    progress.note("starting")
    run(progress, clock, range(1, 3))
    progress.note("saved step 2")
    progress.close()
    lines = out.getvalue().split("\n")
    assert lines[0] == "starting" and lines[1].endswith("\r\x1b[Ksaved step 2")
    assert "step 2/9" in lines[2] and lines[3] == ""


def test_an_error_ends_the_line_first() -> None:
    out = Terminal()
    progress, clock = make(9, out)
    with pytest.raises(ZeroDivisionError), progress:
        run(progress, clock, range(1, 3))
        _ = 1 / 0
    assert out.getvalue().endswith("\n")
