"""Imports go one way: between the packages, inside the core, and out to JAX.

The tree is read as text (`ast`), so an import inside a function counts too.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# package -> what it may import besides itself; a package that is not listed here is an error.
PACKAGES: dict[str, set[str]] = {"shardflax.core": set()}
PACKAGES["shardflax.partitioning"] = {"shardflax.core"}
PACKAGES["shardflax.nn"] = PACKAGES["shardflax.partitioning"] | {"shardflax.partitioning"}
for _leaf in ("training", "ckpt", "models"):
    PACKAGES[f"shardflax.{_leaf}"] = PACKAGES["shardflax.nn"] | {"shardflax.nn"}
PACKAGES["shardflax.cli"] = set(PACKAGES)
PACKAGES["launch"] = {p for p in PACKAGES if p.startswith("shardflax.")}

# Small modules beside the packages, with the seeds' names: each says here how low it sits.
SMALL: dict[str, set[str]] = {
    "shardflax": set(PACKAGES) - {"launch", "shardflax.cli"},
    "shardflax.__main__": {"shardflax.cli"},
    "shardflax.programs": PACKAGES["shardflax.training"]
    | {"shardflax.training", "shardflax.models"},
    "shardflax.mesh_options": {"shardflax.core", "shardflax.partitioning"},
    "shardflax.struct": {"shardflax.core"},
    "shardflax.traverse_util": {"shardflax.core"},
    "shardflax.traceback_util": {"shardflax.core"},
    "shardflax.config": {"shardflax.core"},
    "shardflax.jax_utils": {"shardflax.core"},
    "shardflax.cursor": {"shardflax.core"},
    "shardflax.serialization": {"shardflax.core"},
    "shardflax._msgpack": {"shardflax.core"},
    "shardflax._files": set(),
    "shardflax.configurations": {"shardflax.core"},
    "shardflax.errors": {"shardflax.core", "shardflax.partitioning", "shardflax.nn"},
}

# Layers of the core, lowest first; a module may import those of lower layers and of its own.
CORE = [
    {
        "names",
        "boxes",
        "rng",
        "staging",
        "errors",
        "frozen_dict",
        "holders",
        "meta",
        "tracers",
        "lazy",
    },
    {"checkpoint_errors", "module_errors", "node", "shapes", "transform_errors"},
    {"scope", "variable"},
    {"boundary", "calls", "functional", "nn"},
    {"transforms"},
    {"remat"},
    {"mapping"},
    {"cross"},
    {"control", "derivatives", "pack"},
    {
        "module",
        "run",
        "classes",
        "construct",
        "copies",
        "marks",
        "stateful",
        "sharing",
        "summary",
        "lift",
    },
]

PRIVATE_JAX = ("jax._src", "jax.interpreters", "jax.extend")


class Import(NamedTuple):
    where: str  # file:line
    target: str  # dotted


def sources(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Read(NamedTuple):
    """What the rules look at in one file."""

    imports: tuple[Import, ...]
    dotted: frozenset[str]  # every `a.b.c` that is written out
    called: frozenset[str]  # every `f` or `a.b.c` that is called


@functools.cache
def read(path: Path) -> Read:
    """A file, parsed once for all tests; `from a import b` is `a.b`, be it a module or a name."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[Import] = []
    dotted: set[str] = set()
    called: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            found += [Import(where, target) for target in _targets(node, package)]
        elif isinstance(node, ast.Attribute):
            dotted.add(_dotted(node))
        elif isinstance(node, ast.Call):
            called.add(_dotted(node.func))
    return Read(tuple(found), frozenset(dotted), frozenset(called))


def _targets(node: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = package[: len(package) - node.level + 1] if node.level else []
    prefix = ".".join([*base, *([node.module] if node.module else [])])
    yield from (f"{prefix}.{alias.name}" for alias in node.names)


def _dotted(node: ast.expr) -> str:
    """`a.b.c`, or nothing if it does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def package_of(name: str) -> str | None:
    """The package or small module that a dotted name of ours belongs to; None for others'."""
    known = [p for p in [*PACKAGES, *SMALL] if p != "shardflax" and below(name, p)]
    return max(known, key=len) if known else ("shardflax" if below(name, "shardflax") else None)


def complaint(owner: str, target: str) -> bool:
    """True if a module of `owner` must not import `target`."""
    home = package_of(target)
    if home is None or home == owner:
        return False
    if home in SMALL and home != "shardflax":
        # A small module may be used by any package that sits above all it needs itself.
        reach = PACKAGES.get(owner, SMALL.get(owner, set())) | {owner}
        return not SMALL[home] <= reach
    allowed = PACKAGES.get(owner, SMALL.get(owner, set()))
    return home not in allowed


def test_every_module_has_a_home() -> None:
    top = {module_name(p) for p in (ROOT / "shardflax").glob("*.py")}
    top |= {module_name(p) for p in (ROOT / "shardflax").glob("*/__init__.py")}
    assert top - set(PACKAGES) - set(SMALL) == set(), "say in this file how low it sits"


def test_packages_import_downwards() -> None:
    wrong: list[str] = []
    for path in sources("shardflax", "launch"):
        owner = package_of(module_name(path))
        assert owner is not None, path
        allowed = sorted(PACKAGES.get(owner, SMALL.get(owner, set())))
        wrong += [
            f"{one.where} imports {one.target}: {owner} may import only {allowed}"
            for one in read(path).imports
            if complaint(owner, one.target)
        ]
    assert wrong == []


def test_core_modules_import_downwards() -> None:
    level = {name: n for n, names in enumerate(CORE) for name in names}
    modules = [path for path in sources("shardflax/core") if path.name != "__init__.py"]
    assert {path.parent for path in modules} == {ROOT / "shardflax/core"}, "the core is flat"
    assert {path.stem for path in modules} - set(level) == set(), "say in this file in which layer"
    wrong: list[str] = []
    for path in modules:
        for one in read(path).imports:
            if below(one.target, "shardflax.core"):
                target = one.target.split(".")
                at = level.get(target[2], len(CORE)) if len(target) > 2 else len(CORE)
                if at > level[path.stem]:
                    wrong.append(f"{one.where} (layer {level[path.stem]}) imports {one.target}")
    assert wrong == []


def test_nobody_imports_flax() -> None:
    every = (one for p in sources("shardflax", "launch", "examples") for one in read(p).imports)
    assert [one for one in every if below(one.target, "flax")] == []


def test_semi_private_jax_only_in_staging() -> None:
    wrong: dict[str, set[str]] = {}
    for path in sources("shardflax", "launch", "examples"):
        spelled = read(path).dotted | {one.target for one in read(path).imports}
        found = {s for s in spelled for private in PRIVATE_JAX if below(s, private)}
        if found:
            wrong[module_name(path)] = found
    assert set(wrong) == {"shardflax.core.staging"}, wrong


def test_meshes_are_built_in_one_place() -> None:
    """`jax.make_mesh` of the installed JAX has explicit axes where nothing is said."""
    makers = {"Mesh", "jax.make_mesh", "jax.sharding.Mesh", "sharding.Mesh"}
    found = {module_name(p) for p in sources("shardflax", "launch") if read(p).called & makers}
    # The second is Linen's `replicate`, over all devices of a process in a row.
    assert found == {"shardflax.partitioning.mesh", "shardflax.jax_utils"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = {"pyarrow"}  # an extra
    declared = {re.split(r"[<>=\[]", d)[0] for d in project["dependencies"]} | optional
    renamed = {"orbax-checkpoint": "orbax", "google-crc32c": "google_crc32c"}
    used = {i.target.split(".")[0] for p in sources("shardflax", "launch") for i in read(p).imports}
    used -= {"shardflax", "launch", *sys.stdlib_module_names}
    # jaxlib is what jax runs on.
    assert used == {renamed.get(d, d) for d in declared} - {"jaxlib"}


def test_the_reader_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A violation of each kind is found, also a relative one and one inside a function."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "shardflax/core/scope.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ..nn import Dense\n"
        "def f():\n    import launch.local, numpy\n    jax._src.core.x(f().y)\n"
    )
    found, dotted, called = read(path)
    assert dotted == {"jax._src", "jax._src.core", "jax._src.core.x", ""}
    assert called == {"jax._src.core.x", "f"}
    assert found[0] == ("shardflax/core/scope.py:1", "shardflax.nn.Dense")
    assert [i.target for i in found if complaint("shardflax.core", i.target)] == [
        "shardflax.nn.Dense",
        "launch.local",
    ]
    assert complaint("shardflax.training", "shardflax.ckpt.CheckpointManager")
    assert not complaint("shardflax.nn", "shardflax.core.scope")
    assert complaint("shardflax.core", "shardflax.errors")
