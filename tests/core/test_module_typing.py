# pyright: reportUnnecessaryTypeIgnoreComment=true
"""Type checkers see modules as dataclasses: what is wrong here is marked, and must be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Generic, TypeVar, assert_type

import shardflax.nn as nn

T = TypeVar("T")


class Layer(nn.Module):
    width: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: float) -> float:
        return self.scale * x * self.width


class Keyword(nn.Module, kw_only=True):
    first: int = 1
    second: str


class Wrapped(nn.Module, Generic[T]):
    inner: T


class Derived(Layer):
    extra: bool = False


def right() -> list[Any]:
    """Each of these is accepted, and has the type it seems to have."""
    layer = Layer(3, 2.0, name="layer")
    assert_type(layer, Layer)
    assert_type(layer.width, int)
    assert_type(layer.clone(width=4), Layer)
    assert_type(layer.copy(name="other"), Layer)
    assert_type(layer.name, str | None)
    assert_type(Wrapped(layer).inner, Layer)
    assert_type(Layer(2).bind({})(1.0), float)
    return [layer, Keyword(second="x"), Derived(1, extra=True), Layer(width=1, parent=None)]


def wrong() -> list[Any]:
    """Each of these is refused; some would run."""
    return [
        Layer("three"),  # pyright: ignore[reportArgumentType]
        Layer(3, name=4),  # pyright: ignore[reportArgumentType]
        Layer(3)("x"),  # pyright: ignore[reportArgumentType]
    ]


def never() -> list[Any]:
    """Each of these is refused, and fails."""
    return [
        Layer(),  # pyright: ignore[reportCallIssue]
        Layer(3, 4.0, 5),  # pyright: ignore[reportCallIssue]
        Layer(3, width_=4),  # pyright: ignore[reportCallIssue]
        Keyword(1, "x"),  # pyright: ignore[reportCallIssue]
        Keyword(),  # pyright: ignore[reportCallIssue]
    ]


def test_what_is_accepted_runs() -> None:
    assert [type(m).__name__ for m in right()] == ["Layer", "Keyword", "Derived", "Layer"]


def test_a_type_checker_agrees() -> None:
    command = ["--pythonpath", sys.executable, "--outputjson", str(Path(__file__))]
    done = subprocess.run(
        [sys.executable, "-m", "pyright", *command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    assert report["generalDiagnostics"] == []
