"""Rows of the matrix: recurrent cells, further attention and fp8."""

from __future__ import annotations

from tests.nn.row import Row

ROWS: list[Row] = []
