"""The examples in the docs that take the compiler of TPUs are executed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_docs import ROOT, run

pytestmark = pytest.mark.tpu

BLOCK = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORTS = "```python\n>>> from shardflax import partitioning as pt\n```\n"


def test_a_pod_is_planned_as_the_page_says() -> None:
    path: Path = ROOT / "docs/layouts.md"
    blocks = [block[1] for block in BLOCK.finditer(path.read_text(encoding="utf-8"))]
    assert len(blocks) == 1 and "tpu_topology" in blocks[0]
    assert run(f"{IMPORTS}```python\n{blocks[0]}```\n", str(path)).failed == 0
