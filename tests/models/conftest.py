"""Compiled quickly, as the layers are: what is checked are numbers and shapes."""

from tests.nn.conftest import quick_compiler

__all__ = ["quick_compiler"]
