"""The page of errors knows every class of error that partitioning has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardflax import errors as public
from shardflax.nn import errors as of_layers
from shardflax.partitioning import errors

PAGE = Path(__file__).parent.parent.parent / "docs" / "errors.md"


def classes(module: Any) -> list[str]:
    """The names of the classes of errors that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and value.__module__ == module.__name__
    ]


CLASSES = classes(errors)


def test_every_class_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(CLASSES) > 15
    assert [name for name in CLASSES if f"`{name}`" not in text] == []


def test_every_class_is_shown_by_a_program() -> None:
    """With its text: raised, or (warnings) printed."""
    text = PAGE.read_text(encoding="utf-8")
    raised = [name for name in CLASSES if not name.endswith("Warning")]
    caught = {"PartitioningUnspecifiedError"}  # caught, to print its note
    missing = {n for n in raised if f"shardflax.partitioning.errors.{n}: " not in text}
    assert missing == caught and "except pt.PartitioningUnspecifiedError" in text


def test_every_class_is_public() -> None:
    every = {*CLASSES, *classes(of_layers)}
    assert len(every) > len(CLASSES) + 15 and every - set(public.__all__) == set()
