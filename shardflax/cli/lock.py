"""`shardflax lock`: writes layouts and collectives down; `--check` says what has changed since."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from shardflax.cli.devices import emulated_devices, tpus
from shardflax.cli.errors import CommandError
from shardflax.cli.subject import SubjectOptions, rules_of
from shardflax.core.errors import did_you_mean
from shardflax.partitioning import (
    LibtpuError,
    LockEntry,
    collectives,
    lock,
    read_lock,
    write_lock,
)
from shardflax.partitioning.lock_changes import changes_between
from shardflax.programs import layout_of, traced_step

__all__ = ["LockOptions", "main"]

_HELP = """Keeps layouts and collectives in a file under version control. With a model and a mesh, \
writes or renews one entry; without, renews all entries of the file, each from what was asked for \
it. With --check nothing is written: what has changed is printed, and the exit status is 1 if \
anything has."""


@dataclasses.dataclass(frozen=True)
class LockOptions(SubjectOptions):
    """What to lock, or to check.

    >>> LockOptions().file.name
    'shardflax.lock'
    """

    model: tyro.conf.Positional[str | None] = None
    """A decoder, or package.module:name, as for shardflax explain; nothing: all of the file."""

    mesh: str | None = None
    """Axes and sizes, such as fsdp=4,tensor=2."""

    topology: str | None = None
    """TPUs to compile the step for, such as v5e:4x4, with their own compiler (the package libtpu, \
which needs no TPU); emulated devices, if not said. The slices that dcn(...) joins are such each."""

    name: str | None = None
    """Of the entry; model, mesh and preset, if not said. Without a model: the one entry to take."""

    file: Path = Path("shardflax.lock")
    """The lock file."""

    check: bool = False
    """Compare, and write nothing."""

    collectives: bool = True
    """Compile the train step for what it sends; else the layout alone."""


@dataclasses.dataclass(frozen=True)
class _Asked(SubjectOptions):
    """What an entry is made from, as it is kept in the file."""

    model: str
    mesh: str
    topology: str | None = None
    collectives: bool = True

    @staticmethod
    def of(values: Any, name: str) -> _Asked:
        """As it was kept."""
        try:
            said: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
            return _Asked(**said)
        except (AttributeError, TypeError):
            raise CommandError(
                f"the entry {name!r} does not say what it was made from. Write it anew, with "
                f"shardflax lock MODEL --mesh ... --name {name!r}."
            ) from None

    @property
    def kept(self) -> dict[str, Any]:
        """What differs from the defaults."""
        default = _Asked("", "")
        values = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if key in ("model", "mesh", "preset") or value != getattr(default, key)
        }

    @property
    def emulated(self) -> int:
        """How many emulated devices it takes."""
        if not self.collectives or self.topology is not None:
            return 0
        return int(self.read(self.mesh)[0].size)

    def hardware(self) -> list[Any]:
        """The devices to compile for."""
        if self.topology is None:
            return emulated_devices(self.emulated)
        return tpus(self.topology, self.mesh, self.other_axes)

    def entry(self) -> LockEntry:
        """The entry, made anew."""
        rules = rules_of(self.preset)
        subject = self.subject(self.model)
        if not self.collectives:
            mesh, _ = self.read(self.mesh)
            layout = layout_of(subject.program(mesh, rules), mesh, rules)
            return lock(layout, asked=self.kept)
        mesh = self.place(self.mesh, self.hardware())
        program = subject.program(mesh, rules)
        if program.step is None:
            raise CommandError(
                f"{self.model!r} has no train step, whose collectives could be locked. Make it a "
                f"shardflax.programs.Program with a step, or say --no-collectives."
            )
        layout = layout_of(program, mesh, rules)
        layout.check()
        compiled = traced_step(program, layout, rules).lower().compile()
        memory = None if self.topology is None else compiled.memory_analysis()
        return lock(layout, collectives(compiled, mesh), asked=self.kept, memory=memory)


def main(args: Sequence[str]) -> int:
    """Runs the command; with `--check`, the exit status is 1 if anything has changed.

    >>> import tempfile
    >>> file = ["--file", f"{tempfile.mkdtemp()}/shardflax.lock"]
    >>> main(["tiny", "--mesh", "fsdp=4", "--no-collectives", "--name", "mine", *file])
    mine: new, 39 leaves, 387.8 KiB a device
    0
    >>> main(["--check", *file])
    mine: as locked
    0
    """
    options = tyro.cli(LockOptions, args=args, prog="shardflax lock", description=_HELP)
    if options.model is None and options.mesh is not None:
        raise CommandError("--mesh goes with a model: shardflax lock MODEL --mesh ...")
    known = read_lock(options.file) if options.file.exists() or not _is_new(options) else {}
    asked = _asked(options, known)
    if not asked:
        raise CommandError(f"{options.file} has no entry: shardflax lock MODEL --mesh ... adds it.")
    _check_devices(asked)
    changed = 0
    entries = dict(known)
    for name, one in asked.items():
        entries[name] = one.entry()
        changed += _report(name, known.get(name), entries[name], options.check)
    if options.check:
        return 1 if changed else 0
    if entries != known:
        write_lock(options.file, entries)
        print(f"wrote {options.file}", file=sys.stderr)
    return 0


def _check_devices(asked: dict[str, _Asked]) -> None:
    """Refuses, before anything is compiled, what this process has no devices or compiler for."""
    if needed := max((one.emulated for one in asked.values()), default=0):
        emulated_devices(needed)
    for name, one in asked.items():
        if one.topology is not None and not one.collectives:
            raise CommandError(
                f"{name}: --topology says what to compile for, and --no-collectives that nothing "
                f"is compiled. Leave one of them out."
            )
        if one.topology is not None and one.devices is not None:
            raise CommandError(f"{name}: --topology has devices of its own. Leave --devices out.")
        try:
            if one.topology is not None:
                one.hardware()
        except LibtpuError as error:
            raise CommandError(f"{name} is compiled for TPUs ({one.topology}): {error}") from None


def _is_new(options: LockOptions) -> bool:
    return options.model is not None and not options.check


def _asked(options: LockOptions, known: dict[str, LockEntry]) -> dict[str, _Asked]:
    """The entries to make, by name."""
    if options.model is None:
        names = list(known) if options.name is None else [_known(options.name, known, options.file)]
        return {name: _Asked.of(known[name].asked, name) for name in names}
    if options.mesh is None:
        raise CommandError(f"say the mesh: shardflax lock {options.model} --mesh fsdp=4,tensor=2")
    fields = [field.name for field in dataclasses.fields(_Asked)]
    asked = _Asked(**{name: getattr(options, name) for name in fields})
    made_from = filter(None, (asked.model, asked.mesh, asked.preset, asked.topology))
    name = options.name or " ".join(made_from)
    if options.check:
        _known(name, known, options.file)
    return {name: asked}


def _known(name: str, known: dict[str, LockEntry], file: Path) -> str:
    if name not in known:
        raise CommandError(f"{file} has no entry {name!r}: {did_you_mean(name, known)}")
    return name


def _report(name: str, old: LockEntry | None, new: LockEntry, check: bool) -> bool:
    """Prints what has changed; true if anything has."""
    from shardflax.partitioning.table import bytes_text

    if old is None:
        size = f"{bytes_text(new.bytes_per_device)} a device"
        if new.memory is not None:
            size += f", {bytes_text(sum(new.memory.values()))} while a step runs"
        print(f"{name}: new, {len(new.leaves)} leaves, {size}")
        return True
    if dataclasses.replace(new, compiler=old.compiler, asked=old.asked) == old:
        print(f"{name}: as locked")
        return False
    print(f"{name}: {'not as locked' if check else 'changed'}")
    for line in changes_between(old, new):
        print(f"  {line}")
    return True
