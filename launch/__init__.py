"""Drivers: they start processes, and build a run from the library's parts."""

__all__: list[str] = []
