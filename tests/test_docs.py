"""The examples in the docs are executed, page by page, each page in one namespace."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(text: str) -> str:
    """The page with all but its Python examples blanked, so that line numbers stay right."""
    kept = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        lines = block[1].splitlines()
        if not block[1].startswith(">>>"):  # a program: one example, whatever it prints
            lines = [">>> with _quiet():", *(f"...     {line}" for line in lines)]
            first -= 1
        kept[first : first + len(lines)] = lines
    return "\n".join(kept) + "\n"


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


def run(text: str, name: str) -> doctest.TestResults:
    test = doctest.DocTestParser().get_doctest(
        examples(text), {"__name__": "__main__", "_quiet": quiet}, name, name, 0
    )
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test)
    return doctest.TestResults(runner.failures, runner.tries)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes is gone afterwards
    assert run(page.read_text(encoding="utf-8"), str(page)).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_wrong_example_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    page = "# Page\n\n```python\n>>> 1 + 1\n3\n\n```\n\n```python\nx = 1\nassert x == 2\n```\n"
    assert run(page, "page") == (2, 2)
    assert 'File "page", line 4' in capsys.readouterr().out
    assert run(page.replace("3", "2").replace("x == 2", "x == 1"), "page") == (0, 2)
