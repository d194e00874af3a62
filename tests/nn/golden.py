"""Writes the golden file anew: `python -m tests.nn.golden`."""

from __future__ import annotations

import json

import conftest  # noqa: F401  # eight devices, before JAX starts
from tests.nn.matrix import GOLDEN, described
from tests.nn.rows import ROWS


def main() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    trees = {row.name: described(row) for row in ROWS}
    GOLDEN.write_text(json.dumps(trees, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
