"""Rows of the matrix: convolutions, pooling and norms."""

from __future__ import annotations

from tests.nn.row import Row

ROWS: list[Row] = []
