"""Every example runs, and does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_rules(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_rules.py"), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < 0.9 * losses[0]
    assert re.search(r"params/Dense_0/kernel .*\(pixels, wide\) .*\(-, tensor\)", said)


def test_all_are_tested() -> None:
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["own_rules.py"]
