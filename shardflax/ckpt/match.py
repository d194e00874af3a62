"""Which saved leaf becomes which leaf of the target; strict, with exceptions that are asked for."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.ckpt.leaves import LeafSpec, describe, difference
from shardflax.ckpt.paths import Names, Path, show, tree_of
from shardflax.ckpt.patterns import Patterns, Renaming, covers, idle_patterns
from shardflax.ckpt.restack import Taken, find_stacked
from shardflax.ckpt.sources import Source

__all__ = [
    "Options", "Report", "Take", "match", "renamed",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What a restore may do beyond taking each leaf as it is; see `CheckpointManager.restore`.

    >>> Options().cast
    False
    """

    cast: Patterns = False
    missing: Patterns = False
    extra: Patterns = False
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    include: Patterns = True


@dataclasses.dataclass(frozen=True)
class Report:
    """What a restore did, leaf by leaf; paths are those of the target, in `ignored` the saved ones.

    `loaded` came from the checkpoint; of these, `cast` got another dtype, `renamed` another path,
    and `restacked` were cut from, or put together to, the leaf of a scanned layer.  `kept` have
    the target's own value; `ignored` were saved and not wanted.

    >>> print(Report(("w",), (), (), (), (), ()))
    1 loaded
    """

    loaded: tuple[str, ...]
    cast: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    renamed: tuple[str, ...]
    restacked: tuple[str, ...]

    def __str__(self) -> str:
        """The counts, in one line."""
        counts = {f.name: len(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing"


@dataclasses.dataclass(frozen=True)
class Take:
    """How one leaf of the target is made: from the saved leaves of `taken`, or kept (None)."""

    taken: Taken | None
    saved: LeafSpec | None
    target: LeafSpec
    cast: bool = False


def match(
    source: Source, target: Any, options: Options
) -> tuple[dict[Path, Take], Report, list[str]]:
    """A `Take` for each leaf of the target, what they amount to, and what forbids them."""
    tree = tree_of(target)
    leaves = tree.zip(jax.tree.leaves(target))
    names: dict[Path, Names] = dict(zip(tree.paths, tree.names, strict=True))
    saved, lines = renamed(source, Renaming(options.rename))
    if source.boxed:
        saved = _unboxed(saved, leaves)
    specs = {path: source.leaves[old] for path, old in saved.items()}
    found: dict[Path, Take] = {}
    restacked: list[Path] = []
    for path, leaf in leaves.items():
        spec = describe(path, leaf)
        if not covers(options.include, path):
            found[path] = _keep(path, leaf, spec, lines, "not included")
        elif path in saved:
            found[path] = _direct(path, saved[path], specs[path], spec, options, lines)
        elif stacked := find_stacked(
            path, spec, names[path], specs, lambda p: source.names(saved[p])
        ):
            taken = dataclasses.replace(stacked, paths=tuple(saved[p] for p in stacked.paths))
            found[path] = _checked(path, taken, specs[stacked.paths[0]], spec, options, lines)
            restacked.append(path)
        elif covers(options.missing, path):
            found[path] = _keep(path, leaf, spec, lines, "missing")
        else:
            lines.append(f"missing  {show(path)}  target {spec} is not in the checkpoint")
        if line := _narrowed(path, leaf):
            lines.append(line)
    used = {p for take in found.values() if take.taken for p in take.taken.paths}
    unused = [path for path, old in saved.items() if old not in used and path not in leaves]
    wanted = options.extra if options.include is True else True
    lines += [
        f"extra    {show(path)}  saved {specs[path]} is not in the target"
        for path in unused
        if not covers(wanted, path)
    ]
    for option in ("include", "cast", "missing"):
        lines += idle_patterns(option, getattr(options, option), leaves)
    lines += idle_patterns("extra", options.extra, saved, "no saved leaf")
    lines.sort(key=lambda line: line[9:].split("  ")[0])
    return found, _report(found, restacked, saved, used), lines


def renamed(source: Source, renaming: Renaming) -> tuple[dict[Path, Path], list[str]]:
    """The saved paths by their new names, and a line for each rule that does nothing.

    >>> from shardflax.ckpt.tree_source import TreeSource
    >>> renamed(TreeSource({"a": 1, "b_0": 2}), Renaming({"b_*": "c/*", "A": "e"}))[0]
    {('a',): ('a',), ('c', '0'): ('b_0',)}
    """
    saved: dict[Path, Path] = {}
    lines = list[str]()
    for path in source.leaves:
        to = renaming(path)
        if to in saved:
            lines.append(f"rename   {show(to)}  {show(path)} and {show(saved[to])} both become it")
        saved[to] = path
    return saved, [*lines, *renaming.problems(saved, source.leaves.keys())]


def _unboxed(saved: Mapping[Path, Path], target: Mapping[Path, Any]) -> dict[Path, Path]:
    """Paths without their last part, where that is the field of a box.

    The target shows it: it has a leaf of the shorter path; or it knows no such part at all, and
    the part stands alone (the leaf may be one of a scanned layer, under another path).
    """
    ends = {path[-1] for path in target if path}
    siblings = collections.Counter(path[:-1] for path in saved)

    def short(path: Path) -> bool:
        if path in target:
            return False
        alone = path[-1:] == ("value",) and siblings[path[:-1]] == 1 and len(path) > 1
        return path[:-1] in target or (alone and "value" not in ends)

    return {path[:-1] if short(path) else path: old for path, old in saved.items()}


def _keep(path: Path, leaf: Any, spec: LeafSpec, lines: list[str], why: str) -> Take:
    """The target's own value, if it has one."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        lines.append(f"missing  {show(path)}  {why}, and the target {spec} has no value to keep")
    return Take(None, None, spec)


def _direct(
    path: Path, old: Path, saved: LeafSpec, target: LeafSpec, options: Options, lines: list[str]
) -> Take:
    return _checked(path, Taken((old,)), saved, target, options, lines)


def _checked(
    path: Path, taken: Taken, saved: LeafSpec, target: LeafSpec, options: Options, lines: list[str]
) -> Take:
    """A take, and a line if it would need what nobody asked for."""
    formed = dataclasses.replace(saved, shape=taken.shape(saved.shape))
    wrong = difference(formed, target)
    if wrong is None:
        return Take(taken, saved, target)
    arrays = formed.kind == target.kind == "array"
    if wrong.kind == "dtype" and arrays and covers(options.cast, path):
        return Take(taken, saved, target, cast=True)
    lines.append(f"{wrong.kind:7}  {show(path)}  {wrong.text}")
    return Take(taken, saved, target)


def _narrowed(path: Path, leaf: Any) -> str | None:
    """A line if JAX could not make an array of this dtype at all."""
    if not isinstance(leaf, jax.ShapeDtypeStruct) or jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        return None
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if dtype == leaf.dtype:
        return None
    return (
        f"dtype    {show(path)}  target {leaf.dtype} would become {dtype}: "
        f"set jax_enable_x64, or give a numpy array as the target"
    )


def _report(
    found: Mapping[Path, Take],
    restacked: Iterable[Path],
    saved: Mapping[Path, Path],
    used: set[Path],
) -> Report:
    def texts(paths: Iterable[Path]) -> tuple[str, ...]:
        return tuple(map(show, paths))

    return Report(
        loaded=texts(path for path, take in found.items() if take.taken),
        cast=texts(path for path, take in found.items() if take.cast),
        kept=texts(path for path, take in found.items() if not take.taken),
        ignored=texts(old for old in saved.values() if old not in used),
        renamed=texts(path for path in found if saved.get(path, path) != path),
        restacked=texts(restacked),
    )
