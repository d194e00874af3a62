"""The output of several processes on one terminal, or in one log."""

from __future__ import annotations

import io
import random
import re

import pytest

from launch.chatter import GlooChatter
from launch.console import Console, Lines, clip


class Terminal(io.StringIO):
    """A terminal that knows carriage return, newline and "erase to the end of the line"."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        rows, column = [""], 0
        for part in re.split(r"(\r|\n|\x1b\[K)", self.getvalue()):
            if part == "\n":
                rows.append("")
                column = 0
            elif part == "\r":
                column = 0
            elif part == "\x1b[K":
                rows[-1] = rows[-1][:column]
            else:
                rows[-1] = rows[-1][:column] + part + rows[-1][column + len(part) :]
                column += len(part)
        return rows


def on_terminal(count: int = 2, columns: int = 40) -> tuple[Terminal, Console]:
    terminal = Terminal()
    return terminal, Console(count, out=terminal, err=terminal, columns=columns)


def in_log(count: int = 2) -> tuple[io.StringIO, Console]:
    log = io.StringIO()
    return log, Console(count, out=log, err=log)


def test_lines_come_whole_and_with_a_prefix() -> None:
    log, console = in_log()
    console.feed(0, b"hel")
    console.feed(1, b"one\ntwo\nthr")
    console.feed(0, b"lo\n")
    assert log.getvalue() == "[1] one\n[1] two\n[0] hello\n"


def test_prefixes_align_from_ten_processes_on() -> None:
    log, console = in_log(11)
    console.feed(3, b"x\n")
    console.feed(10, b"y\n")
    assert log.getvalue() == "[ 3] x\n[10] y\n"


def test_streams_stay_apart() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(1, out=out, err=err)
    console.feed(0, b"half", "out")
    console.feed(0, b"oops\n", "err")
    console.feed(0, b" whole\n", "out")
    assert (out.getvalue(), err.getvalue()) == ("[0] half whole\n", "[0] oops\n")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_any_cut_of_the_bytes_gives_the_same_lines(size: int) -> None:
    data = "straße → Z\r\n\rbar 1\rbar 2 ✓\nend\n".encode()
    log, console = in_log()
    for i in range(0, len(data), size):
        console.feed(0, data[i : i + size])
    assert log.getvalue() == "[0] straße → Z\n[0] bar 2 ✓\n[0] end\n"


def test_undecodable_bytes_are_marked() -> None:
    log, console = in_log()
    console.feed(0, b"a\xffb\n")
    assert log.getvalue() == "[0] a\N{REPLACEMENT CHARACTER}b\n"


def test_a_bar_stays_the_last_line_of_a_terminal() -> None:
    terminal, console = on_terminal()
    console.feed(0, b"\rstep 1")
    assert terminal.screen() == ["[0] step 1"]
    console.feed(1, b"a line from elsewhere, longer\n")
    assert terminal.screen() == ["[1] a line from elsewhere, longer", "[0] step 1"]
    console.feed(0, b"\rstep 2")
    console.feed(0, b"warning\n", "err")
    assert terminal.screen()[1:] == ["[0] warning", "[0] step 2"]
    console.feed(0, b"\r\x1b[Kdone\n")
    assert terminal.screen()[1:] == ["[0] warning", "[0] done", ""]


def test_a_bar_that_ends_with_its_return_is_shown_too() -> None:
    terminal, console = on_terminal()
    console.feed(0, b"50 %\r")
    assert terminal.screen() == ["[0] 50 %"]
    console.feed(0, b"100 %\r\n")
    assert terminal.screen() == ["[0] 100 %", ""]


def test_an_erased_bar_leaves_nothing() -> None:
    terminal, console = on_terminal()
    console.feed(0, b"\rstep 1")
    console.feed(0, b"\r\x1b[K")
    assert terminal.screen() == [""]


def test_the_bar_of_the_first_process_wins() -> None:
    terminal, console = on_terminal()
    console.feed(1, b"\rother")
    console.feed(0, b"\rmine")
    console.feed(1, b"\rother 2")
    assert terminal.screen() == ["[0] mine"]
    console.feed(0, b"\n")
    assert terminal.screen() == ["[0] mine", "[1] other 2"]


def test_a_bar_never_wraps() -> None:
    terminal, console = on_terminal(columns=20)
    console.feed(0, b"\r" + b"#" * 100)
    assert terminal.screen() == ["[0] " + "#" * console.columns(0)]
    assert len(terminal.screen()[0]) == 19


def test_a_log_gets_no_bar() -> None:
    log, console = in_log()
    console.feed(0, b"\rstep 1\rstep 2")
    console.feed(1, b"line\n")
    console.close(0)
    assert log.getvalue() == "[1] line\n"


def test_close_prints_what_lacks_a_line_end() -> None:
    log, console = in_log()
    console.feed(0, b"last words")
    console.close(0)
    assert log.getvalue() == "[0] last words\n"
    terminal, console = on_terminal()
    console.feed(0, b"\rstep 7")
    console.close(0)
    console.notice("process 0 was killed by SIGKILL")
    assert terminal.screen() == ["[0] step 7", "launch: process 0 was killed by SIGKILL", ""]


def test_a_line_without_end_is_not_held_back_forever() -> None:
    log, console = in_log()
    for _ in range(17):
        console.feed(0, b"x" * 4096)
    assert log.getvalue().startswith("[0] xxx")


def test_noise_is_dropped_where_native_code_writes() -> None:
    log = io.StringIO()
    console = Console(2, out=log, err=log, noise=GlooChatter)
    console.feed(0, b"[Gloo] Rank 0 is connected to 1 peer ranks. ", "native")
    console.feed(0, b"7\n")
    console.feed(1, b"7\n", "native")
    console.feed(0, b"Expected number of connected peer ranks is : 1\nword\n", "native")
    assert log.getvalue() == "[0] 7\n[1] 7\n[0] word\n"


@pytest.mark.parametrize("seed", range(20))
def test_greetings_of_many_threads_are_dropped(seed: int) -> None:
    rng = random.Random(seed)
    pieces = (
        "{} is connected to |7| peer ranks. |Expected number of connected peer ranks is : |7|\n"
    )
    threads = [["[Gloo] Rank ", *pieces.format(i).split("|")] for i in range(8)]
    mixed = ""
    while left := [t for t in threads if t]:
        mixed += rng.choice(left).pop(0)
    chatter = GlooChatter()
    assert [line for line in mixed.splitlines() if not chatter(line)] == []


def test_only_greetings_are_dropped() -> None:
    chatter = GlooChatter()
    lines = ["7", "", "rank 3 peer ranks. ", "[Gloo] Rank 0 is broken", "Loss 7"]
    assert [line for line in lines if not chatter(line)] == lines


def test_clip_keeps_escapes_and_counts_columns() -> None:
    assert clip("\x1b[31mabc\x1b[0mdef", 4) == "\x1b[31mabc\x1b[0md"
    assert clip("abc", 0) == ""


def test_lines_know_what_is_drawn() -> None:
    lines = Lines()
    assert list(lines.feed(b"plain")) == []
    assert not lines.drawn
    assert list(lines.feed(b"\n\rbar")) == ["plain"]
    assert lines.drawn
