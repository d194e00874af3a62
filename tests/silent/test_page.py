"""The page of errors knows every class of error that partitioning has."""

from __future__ import annotations

from pathlib import Path

from shardflax import errors as public
from shardflax.partitioning import errors

PAGE = Path(__file__).parent.parent.parent / "docs" / "errors.md"
CLASSES = [
    name
    for name, value in vars(errors).items()
    if isinstance(value, type)
    and issubclass(value, Exception)
    and value.__module__ == errors.__name__
]


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
    assert [name for name in CLASSES if not hasattr(public, name)] == []
