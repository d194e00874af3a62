"""How far a long save, restore or check is: a bar, or lines, or nothing."""

import io
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardflax import ckpt
from shardflax.ckpt import faults, verify
from shardflax.ckpt.metering import Meter, showing
from shardflax.cli import main


class Screen(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def until(stream: Any, text: str) -> None:
    """Waits until something is shown, as it is while one waits long enough."""
    for _ in range(30_000):
        if text in stream.getvalue():
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{text!r} was never shown")


def shown(
    monkeypatch: pytest.MonkeyPatch,
    stream: io.StringIO,
    mode: Any,
    text: str = "",
    patience: float = 0.01,
) -> str:
    """What is on a stream when half of something took so long that a text was shown."""
    monkeypatch.setattr(sys, "stderr", stream)
    meter = Meter("restoring step 3", 4 << 20)
    with showing(meter, mode, patience=patience, period=0.1):
        meter.advance(2 << 20)
        until(stream, text)
        meter.advance(2 << 20)
    return stream.getvalue()


def test_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "restoring step 3" in shown(monkeypatch, Screen(), "auto", "2.0/4.0 MiB")
    assert shown(monkeypatch, io.StringIO(), "auto") == ""
    assert shown(monkeypatch, Screen(), None) == ""
    assert shown(monkeypatch, Screen(), "auto", patience=600) == "", "it was quick"


def test_lines_for_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    half = "restoring step 3: 50 % of 4.0 MiB"
    first, *_, last = shown(monkeypatch, io.StringIO(), "lines", half).splitlines()
    assert first == half
    assert re.fullmatch(r"restoring step 3: 100 % of 4\.0 MiB in \d+\.\d s", last)
    assert shown(monkeypatch, io.StringIO(), "lines", patience=600) == ""


def test_a_program_that_ends_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert shown(monkeypatch, Screen(), "auto") == ""


def test_saves_and_restores_count_what_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meters: list[Meter] = []

    class Noted(Meter):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            meters.append(self)

    monkeypatch.setitem(ckpt.CheckpointManager.save.__globals__, "Meter", Noted)
    state = {"w": np.ones(100_000), "b": np.ones(3, np.int8), "n": 3}
    nbytes = 800_003
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        manager.wait()
        manager.restore(state)
        manager.restore()
        manager.restore(include="b")
    what = [(m.what, m.total, m.done) for m in meters if m.total]
    assert what == [
        ("saving step 1", nbytes, nbytes),
        ("restoring step 1", nbytes + 8, nbytes + 8),
        ("restoring step 1", nbytes + 8, nbytes + 8),
        ("restoring step 1", 3, 3),
    ]


def test_who_waits_for_a_save_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setitem(ckpt.CheckpointManager.save.__globals__, "showing", _quickly)
    end = faults.listen(lambda point: point == "written" and until(screen, "saving step 1"))
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.ones(1000)})
    end()
    with ckpt.CheckpointManager(tmp_path / "log", progress="lines") as manager:
        end = faults.listen(lambda point: point == "written" and until(screen, "saving step 2"))
        handle = manager.save(2, {"w": np.ones(1000)})
        assert handle is not None and handle.committed.result() is None
        end()
    assert "saving step 2: 100 % of 7.8 KiB" in screen.getvalue()


def _quickly(meter: Meter, mode: Any) -> Any:
    return showing(meter, mode, patience=0.02, period=0.1)


@pytest.mark.parametrize("mode", ["lines", "off"])
def test_commands_say_it_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.ones(100_000)})
    monkeypatch.setattr("shardflax.cli.ckpt.showing", _quickly)
    read = verify.damage

    def slow(*args: Any, **options: Any) -> Any:
        until(sys.stderr, "verifying: " if mode == "lines" else "")
        return read(*args, **options)

    monkeypatch.setattr("shardflax.ckpt.verify.damage", slow)
    assert main(["ckpt", "verify", str(tmp_path), "--progress", mode]) == 0
    err = capsys.readouterr().err
    assert ("verifying: " in err and " % of 1.5 MiB" in err) if mode == "lines" else not err
