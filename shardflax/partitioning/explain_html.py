"""Explanations as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

__all__ = ["page"]


def page(values: Mapping[str, Any]) -> str:
    """The page for the values of an explanation (see `Explanation.to_dict`).

    >>> page({"title": "</title><script>"}).count("<script>")
    1
    """
    folder = files("shardflax.partitioning").joinpath("explain_page")
    text = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in _FILES}
    script = "\n".join(text[name] for name in _FILES if name.endswith(".js"))
    parts = {
        "TITLE": html.escape(str(values.get("title") or "layout")),
        "STYLE": text["page.css"],
        "DATA": _embedded(values),
        "SCRIPT": script,
    }
    before, *rest = text["page.html"].split("{{")
    pieces = (piece.split("}}", 1) for piece in rest)
    return before + "".join(parts[name] + after for name, after in pieces)


# Scripts in the order in which they stand in the page: later ones use earlier ones.
_FILES = ("page.html", "page.css", "values.js", "mesh.js", "table.js", "panel.js")


def _embedded(values: Mapping[str, Any]) -> str:
    """JSON that can stand in a `<script>` element: nothing in it can end the element."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028"}
    escapes["\u2029"] = "\\u2029"
    return "".join(escapes.get(char, char) for char in text)
