"""The collectives of a compiled program, each with the mesh axes that it runs over."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

_KINDS = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
_KIND = re.compile("=.*" + _KINDS)
_LINE = re.compile(
    r"= \(?\w+\[([\d,]*)\].*?" + _KINDS + r".*?(?:replica_groups|source_target_pairs)="
    r"(\{\{[\d,{}]*\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|mesh\[[^\]]*\](?:, device_ids=\([^{]*\))? ?\{[^}]*\})"
)
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\(\[(.*?)\](?:T\((.*?)\))?\))? ?\{(.*)\}")

_RANGE = re.compile(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*)\))?")


class Collective(NamedTuple):
    """One instruction: its kind, the axes along which its devices differ, and what it gives."""

    kind: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]


def collectives(hlo: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All collectives of an HLO text, but those among single devices."""
    lines = [line for line in hlo.splitlines() if _KIND.search(line)]
    matches = [(line, _LINE.search(line)) for line in lines]
    unread = [line for line, match in matches if match is None]
    assert not unread, unread
    read = [
        Collective(m[2], axes(groups(m[3], mesh.size), mesh), tuple(ints(m[1])))
        for _, m in matches
        if m
    ]
    return [c for c in read if c.axes]


def groups(text: str, size: int) -> list[list[int]]:
    """The groups of device numbers that HLO writes: listed, as a reshaped range, or by a mesh."""
    if text == "{}":
        return [list(range(size))]
    if text.startswith("{"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    if text.startswith("mesh"):
        sizes, over, order, over_axes = found(_MESH, text)
        names = re.findall(r"'(\w+)'=", sizes)
        shape = [int(n) for n in re.findall(r"=(\d+)", sizes)]
        numbers = ordered(over or str(size), order, size).reshape(shape)
        inside = [names.index(name) for name in re.findall(r"'(\w+)'", over_axes)]
        outside = [dim for dim in range(len(shape)) if dim not in inside]
        count = math.prod(shape[dim] for dim in inside)
        return numbers.transpose([*outside, *inside]).reshape(-1, count).tolist()
    shape, over, order = found(_RANGE, text)
    return ordered(over, order, size).reshape(ints(shape)).tolist()


def ordered(over: str, order: str | None, size: int) -> np.ndarray:
    """The range of device numbers, shaped and transposed."""
    numbers = np.arange(size).reshape(ints(over))
    return numbers.transpose(ints(order)) if order else numbers


def found(pattern: re.Pattern[str], text: str) -> tuple[Any, ...]:
    match = pattern.fullmatch(text)
    assert match, f"unknown replica groups: {text}"
    return match.groups()


def ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def axes(groups: list[list[int]], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The axes along which the devices of a group differ; device numbers follow the mesh."""
    shape = tuple(mesh.shape.values())
    where = [np.unravel_index(group, shape) for group in groups]
    varying = [any(len(set(at[dim].tolist())) > 1 for at in where) for dim in range(len(shape))]
    return tuple(name for name, varies in zip(mesh.axis_names, varying, strict=True) if varies)
