"""Explanations as plain values: what `to_json` writes, and what the page shows.

The shape of it is promised: a change that a reader could trip over raises `VERSION`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardflax.partitioning.errors import Problem
from shardflax.partitioning.explained import DimExplained, LeafExplained, MeshExplained
from shardflax.partitioning.rule_sets import FOLLOWS
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.spec_check import spec_axes

if TYPE_CHECKING:
    from shardflax.partitioning.explanation import Explanation

__all__ = ["FORMAT", "VERSION", "explanation_dict"]

FORMAT, VERSION = "shardflax.explanation", 1


def explanation_dict(explanation: Explanation) -> dict[str, Any]:
    """All of an explanation as plain values, in a fixed order.

    >>> from shardflax.partitioning import explain, preset
    >>> import jax.numpy as jnp
    >>> list(explanation_dict(explain({"step": jnp.int32(0)}, "fsdp=8", preset("fsdp"))))[:4]
    ['format', 'version', 'title', 'mesh']
    """
    layout = explanation.layout
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": explanation.title,
        "mesh": _mesh(explanation.mesh),
        "rules": _rules(explanation),
        "bytes": sum(leaf.bytes for leaf in explanation.leaves),
        "bytes_per_device": explanation.bytes_per_device,
        "memory": explanation.memory,
        "leaves": [_leaf(leaf) for leaf in explanation.leaves],
        "unnamed": list(layout.unnamed),
        "unused_rules": list(layout.unused_rules),
        "unused_defaults": list(layout.unused_defaults),
        "unused_axes": list(layout.unused_axes),
        "problems": [_problem(problem) for problem in explanation.problems],
    }


def _mesh(mesh: MeshExplained) -> dict[str, Any]:
    axes = [
        {"name": a.name, "size": a.size, "dcn": a.dcn, "ici": a.ici, "type": a.kind}
        for a in mesh.axes
    ]
    return {
        "axes": axes,
        "devices": mesh.size,
        "slices": mesh.slices,
        "ids": list(mesh.ids) or None,
        "platform": mesh.platform,
    }


def _rules(explanation: Explanation) -> dict[str, Any]:
    rules = explanation.layout.rules
    values: dict[str, Any] = {"title": explanation.rules_title, "entries": _entries(rules)}
    if isinstance(rules, AxisRules):
        sets = {kind: _entries(getattr(rules, kind)) for kind in FOLLOWS}
        values["sets"] = {kind: rows for kind, rows in sets.items() if rows != values["entries"]}
    return values


def _entries(rules: LogicalRules) -> list[dict[str, Any]]:
    return [{"name": name, "axes": list(map(str, spec_axes(axes)))} for name, axes in rules]


def _leaf(leaf: LeafExplained) -> dict[str, Any]:
    return {
        "path": leaf.path,
        "shape": list(leaf.shape),
        "dtype": leaf.dtype,
        "names": [dim.name for dim in leaf.dims] if leaf.named else None,
        "origin": leaf.origin,
        "rule_set": leaf.rule_set,
        "spec": [list(axes) for axes in leaf.spec],
        "dims": [_dim(dim) for dim in leaf.dims],
        "bytes": leaf.bytes,
        "bytes_per_device": leaf.bytes_per_device,
        "parts": leaf.parts,
        "problems": list(leaf.problems),
    }


def _dim(dim: DimExplained) -> dict[str, Any]:
    return {
        "size": dim.size,
        "local": dim.local,
        "name": dim.name,
        "rule": None if dim.rule is None else list(dim.rule),
        "taken": list(dim.taken),
        "given_up": [{"axis": axis, "why": why} for axis, why in dim.given_up],
    }


def _problem(problem: Problem) -> dict[str, Any]:
    path = problem.where.partition(", shape ")[0]
    return {
        "path": path,
        "error": problem.error.__name__,
        "dim": problem.dim,
        "text": problem.text,
    }
