"""Imports go one way: between the packages, inside the core, and out to JAX.

The tree is read as text (`ast`), so an import inside a function counts too.
"""

from __future__ import annotations

import ast
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
    {"boundary", "functional", "nn"},
    {"transforms"},
    {"remat"},
    {"mapping"},
    {"cross"},
    {"control", "derivatives", "pack"},
    {
        "module",
        "calls",
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


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file; `from a import b` as `a.b`, which covers both modules and names."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(where, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(where, f"{prefix}.{alias.name}") for alias in node.names)


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


@pytest.mark.parametrize("path", sources("shardflax", "launch"), ids=module_name)
def test_packages_import_downwards(path: Path) -> None:
    owner = package_of(module_name(path))
    assert owner is not None
    wrong = [f"{i.where} imports {i.target}" for i in imports(path) if complaint(owner, i.target)]
    assert not wrong, (
        f"{owner} may import only {sorted(PACKAGES.get(owner, SMALL.get(owner, set())))}"
    )


@pytest.mark.parametrize("path", sources("shardflax/core"), ids=module_name)
def test_core_modules_import_downwards(path: Path) -> None:
    if path.name == "__init__.py":
        assert path.parent == ROOT / "shardflax/core", "the core is flat"
        return
    level = {name: n for n, names in enumerate(CORE) for name in names}
    assert path.stem in level, f"say in this file in which layer of the core {path.stem} is"
    targets = [(i, i.target.split(".")) for i in imports(path) if below(i.target, "shardflax.core")]
    wrong = [i for i, t in targets if len(t) < 3 or level.get(t[2], len(CORE)) > level[path.stem]]
    assert not wrong, f"{path.stem} is of layer {level[path.stem]}: {CORE}"


@pytest.mark.parametrize("path", sources("shardflax", "launch", "examples"), ids=module_name)
def test_nobody_imports_flax(path: Path) -> None:
    assert [i for i in imports(path) if below(i.target, "flax")] == []


@pytest.mark.parametrize("path", sources("shardflax", "launch", "examples"), ids=module_name)
def test_semi_private_jax_only_in_staging(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spelled = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    spelled |= {i.target for i in imports(path)}
    found = {s for s in spelled for private in PRIVATE_JAX if below(s, private)}
    assert not found or module_name(path) == "shardflax.core.staging", found


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = {"pyarrow"}  # an extra
    declared = {re.split(r"[<>=\[]", d)[0] for d in project["dependencies"]} | optional
    renamed = {"orbax-checkpoint": "orbax", "google-crc32c": "google_crc32c"}
    used = {i.target.split(".")[0] for p in sources("shardflax", "launch") for i in imports(p)}
    used -= {"shardflax", "launch", *sys.stdlib_module_names}
    # jaxlib is what jax runs on.
    assert used == {renamed.get(d, d) for d in declared} - {"jaxlib"}


def test_the_reader_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A violation of each kind is found, also a relative one and one inside a function."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "shardflax/core/scope.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..nn import Dense\ndef f():\n    import launch.local, numpy\n")
    found = list(imports(path))
    assert found[0] == ("shardflax/core/scope.py:1", "shardflax.nn.Dense")
    assert [i.target for i in found if complaint("shardflax.core", i.target)] == [
        "shardflax.nn.Dense",
        "launch.local",
    ]
    assert complaint("shardflax.training", "shardflax.ckpt.CheckpointManager")
    assert not complaint("shardflax.nn", "shardflax.core.scope")
    assert complaint("shardflax.core", "shardflax.errors")
