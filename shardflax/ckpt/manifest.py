"""The manifest: what a checkpoint holds, readable without touching any device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from shardflax.ckpt.leaves import LeafSpec, describe, difference
from shardflax.ckpt.paths import Path, leaves_by_path, show

__all__ = ["Manifest", "check_json"]

FORMAT = "shardflax.ckpt"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The spec of every leaf of a state, by path.

    >>> import jax.numpy as jnp
    >>> saved = Manifest.of({"w": jnp.ones((2, 3)), "step": 7})
    >>> Manifest.from_json(saved.to_json()) == saved
    True
    >>> for line in saved.differences(Manifest.of({"w": jnp.ones((2, 4)), "b": jnp.ones(4)})):
    ...     print(line)
    missing  b  target float32[4] is not in the checkpoint
    extra    step  saved int (Python) is not in the target
    shape    w  saved float32[2,3], target float32[2,4]
    """

    leaves: Mapping[Path, LeafSpec]

    @classmethod
    def of(cls, state: Any) -> Manifest:
        """The manifest of a state; raises CheckpointLeafError for leaves of other types."""
        return cls({path: describe(path, leaf) for path, leaf in leaves_by_path(state).items()})

    def differences(self, target: Manifest) -> list[str]:
        """One line for each leaf of either that does not go into the other, by path."""
        lines = []
        for path in sorted(self.leaves.keys() | target.leaves.keys()):
            saved, wanted = self.leaves.get(path), target.leaves.get(path)
            if saved is None:
                lines.append(f"missing  {show(path)}  target {wanted} is not in the checkpoint")
            elif wanted is None:
                lines.append(f"extra    {show(path)}  saved {saved} is not in the target")
            elif found := difference(saved, wanted):
                lines.append(f"{found.kind:7}  {show(path)}  {found.text}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads."""
        leaves = [{"path": list(path), **_spec_json(spec)} for path, spec in self.leaves.items()]
        return {"format": FORMAT, "version": VERSION, "leaves": leaves}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Reads `to_json`'s value; raises ValueError for anything else."""
        match value:
            case {"format": "shardflax.ckpt", "version": 1, "leaves": list(leaves)}:
                return cls({tuple(leaf["path"]): _spec_of(leaf) for leaf in leaves})
            case {"format": "shardflax.ckpt", "version": version}:
                raise ValueError(f"manifest version {version!r}; this library reads {VERSION}")
            case _:
                raise ValueError("not a manifest of this library")


def _spec_json(spec: LeafSpec) -> dict[str, Any]:
    """A spec without its empty fields; a complex value as two numbers."""
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if v is not None}
    if isinstance(spec.value, complex):
        fields["value"] = [spec.value.real, spec.value.imag]
    return fields


def _spec_of(leaf: Mapping[str, Any]) -> LeafSpec:
    """The inverse of `_spec_json`."""
    value = leaf.get("value")
    return LeafSpec(
        kind=leaf["kind"],
        shape=tuple(leaf["shape"]),
        dtype=leaf["dtype"],
        impl=leaf.get("impl"),
        value=complex(*value) if isinstance(value, list) else value,
    )


def check_json(extras: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `extras` as JSON gives it back (tuples become lists).

    Raises TypeError, naming the item, for what JSON cannot hold exactly.

    >>> check_json({"epoch": 3, "shape": (2, 2)})
    {'epoch': 3, 'shape': [2, 2]}
    """
    _check_item("extras", extras)
    return json.loads(json.dumps(extras))


def _check_item(where: str, value: Any) -> None:
    """Walks through a JSON value; `json.dumps` alone would turn int keys into strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: keys of JSON objects are strings.")
            _check_item(f"{where}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_item(f"{where}[{index}]", item)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"{where} is a {type(value).__name__}, which JSON cannot hold: "
            f"convert it to a number, string, list or dict."
        )
