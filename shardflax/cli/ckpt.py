"""`shardflax ckpt`: what is in checkpoints, whether it is whole, and other formats."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import tyro

from shardflax import ckpt
from shardflax.ckpt.compare import Comparison, compare_sources
from shardflax.ckpt.inspect import when
from shardflax.ckpt.locate import Found, find_checkpoint
from shardflax.ckpt.metering import Meter, Mode, showing
from shardflax.ckpt.sources import Source
from shardflax.ckpt.tree_source import TreeSource, with_names
from shardflax.ckpt.verify import bytes_to_verify, verify_found
from shardflax.cli.ckpt_tree import heading, plain, rich_table, rows_of
from shardflax.cli.errors import CommandError
from shardflax.cli.subject import Subject, rules_of
from shardflax.core.errors import FlaxError
from shardflax.partitioning import make_abstract_mesh
from shardflax.partitioning.table import bytes_text
from shardflax.programs import layout_of

__all__ = ["main"]

_MOST_RICH = 500  # rows; above, rich takes seconds
_HELP = """Looks at checkpoints without devices: of this library, of Orbax, Flax's MessagePack \
files, safetensors. Where a FOLDER is wanted, the folder of a run (its latest step, or --step), of \
one step, or a file will do. Exit status 1 if something is wrong or differs, 2 if the command was \
asked wrongly."""

Progress = Literal["auto", "lines", "off"]
"""How a command shows how far it is: a bar on a terminal, lines for a log, or nothing."""
Rename = Annotated[tuple[str, ...], tyro.conf.arg(metavar="OLD=NEW")]


@dataclasses.dataclass(frozen=True)
class _Ls:
    """List the steps in the folder of a run: size, when, and whether they are committed."""

    folder: tyro.conf.Positional[str]
    """The folder of a run."""

    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """The exit status is 1 if there is no committed step."""
        steps = ckpt.list_steps(self.folder)
        if self.json:
            print(json.dumps([dataclasses.asdict(x) for x in steps], default=str, indent=1))
        else:
            for line in _columns([_step_cells(step) for step in steps]):
                print(line)
            if not steps:
                print(f"no steps in {self.folder}")
        return 0 if any(step.committed for step in steps) else 1


def _step_cells(step: ckpt.StepInfo) -> tuple[str, ...]:
    kind = f" ({step.format})" if step.format not in ("", "shardflax") else ""
    temporary = ", temporary" if step.temporary else ""
    return step.name, bytes_text(step.nbytes), when(step.time), step.state + kind + temporary


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with the first two columns, numbers, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:>{width}}" if i < 2 else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


@dataclasses.dataclass(frozen=True)
class _Show:
    """Show what is in a checkpoint: names, shapes, dtypes, sizes, and how it was laid out."""

    folder: tyro.conf.Positional[str]
    """The folder of a run or of a step, or a file."""

    step: int | None = None
    """Of a run; the latest, if not said."""

    json: bool = False
    """Print JSON."""

    all: bool = False
    """Show layers that are alike one by one."""

    def run(self) -> int:
        """Prints the tree."""
        info = ckpt.inspect_checkpoint(self.folder, self.step)
        if self.json:
            print(info.to_json())
            return 0
        rows = rows_of(info.leaves, self.all)
        print(heading(info))
        if any(leaf.layout for leaf in info.leaves):
            print("layout: a name of each dim, and after a colon the mesh axes that cut it")
        print()
        if sys.stdout.isatty() and len(rows) <= _MOST_RICH:
            from rich.console import Console

            Console(highlight=False).print(rich_table(rows))
        else:
            print(plain(rows))
        return 0


@dataclasses.dataclass(frozen=True)
class _Diff:
    """Compare two checkpoints, or a checkpoint and a model; status 1 if they differ."""

    first: tyro.conf.Positional[str]
    """The folder of a run or of a step, or a file."""

    second: tyro.conf.Positional[str | None] = None
    """The same; the folder of the first, if --second-step is given."""

    step: int | None = None
    """Of the first."""

    second_step: int | None = None
    """Of the second."""

    model: str | None = None
    """In place of a second one: a decoder (tiny, small, ...), or package.module:name of a function
    that returns a state, or of a shardflax.programs.Program."""

    layers: int | None = None
    """Number of blocks of a decoder, if not that of its size."""

    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    """Of a decoder."""

    values: bool = False
    """Read everything, and compare it bit by bit."""

    rename: Rename = ()
    """Components of paths of the first that have another name in the second, OLD=NEW."""

    progress: Progress = "auto"
    """Of what takes more than two seconds: a bar if stderr is a terminal, or lines."""

    def run(self) -> int:
        """Prints what differs."""
        found = find_checkpoint(self.first, self.step)
        first = _renamed(found.source, self.rename)
        result = _compared(found, first, self._second(), self.values, _mode(self.progress))
        print(result)
        return 1 if result else 0

    def _second(self) -> Source:
        if self.model is not None:
            if self.second is not None or self.values:
                raise CommandError("--model takes the place of a second one, and has no --values.")
            return TreeSource(self._state(self.model))
        if self.second is None and self.second_step is None:
            raise CommandError("name a second checkpoint, or --second-step, or --model.")
        return find_checkpoint(self.second or self.first, self.second_step).source

    def _state(self, model: str) -> Any:
        """The state of a model, abstract."""
        subject = Subject(model, self.layers, 1, optimizer=self.optimizer)
        mesh, rules = make_abstract_mesh("data=1"), rules_of("dp")
        return layout_of(subject.program(mesh, rules), mesh, rules).abstract


def _compared(found: Found, first: Source, second: Source, values: bool, mode: Mode) -> Comparison:
    total = sum(spec.nbytes for spec in first.leaves.values()) if values else 0
    try:
        with _bar("comparing", total, mode) as progress:
            return compare_sources(first, second, values=values, progress=progress)
    except FlaxError:
        raise
    except (ValueError, OSError) as error:
        raise ckpt.CheckpointReadError(found.path, None, error) from error


@dataclasses.dataclass(frozen=True)
class _Verify:
    """Read everything and check all checksums; status 1 if anything is damaged."""

    folder: tyro.conf.Positional[str]
    """The folder of a run or of a step, or a file."""

    step: int | None = None
    """Of a run; the latest, if not said."""

    progress: Progress = "auto"
    """Of what takes more than two seconds: a bar if stderr is a terminal, or lines."""

    def run(self) -> int:
        """Prints each file and each leaf that is damaged."""
        try:
            found = find_checkpoint(self.folder, self.step)
        except ckpt.CheckpointReadError as error:
            print(f"damaged: {error.__cause__ or error}")
            return 1
        with _bar("verifying", bytes_to_verify(found), _mode(self.progress)) as progress:
            result = verify_found(found, progress)
        for problem in result.problems:
            print(f"damaged: {problem}")
        for name in result.stray:
            print(f"note: {result.path / name} is not of this checkpoint")
        how = (
            "all checksums right" if result.checksums else "readable (the format has no checksums)"
        )
        count = len(result.problems)
        print(
            f"{result.path}: {result.files:,} files, {result.leaves:,} leaves, "
            f"{bytes_text(result.nbytes)}: {how if result.ok else f'{count} problems'}"
        )
        return 0 if result.ok else 1


@dataclasses.dataclass(frozen=True)
class _Convert:
    """Write a checkpoint in another format: into a run, or to .safetensors or .msgpack."""

    source: tyro.conf.Positional[str]
    """The folder of a run or of a step, or a file, in any format."""

    destination: tyro.conf.Positional[str]
    """A file ending in .safetensors or .msgpack, or the folder of a run."""

    to: Literal["shardflax", "safetensors", "msgpack"] | None = None
    """The format, if the name of the destination does not say it."""

    step: int | None = None
    """Of a run; the latest, if not said."""

    as_step: int | None = None
    """The number of the step that is written."""

    rename: Rename = ()
    """Components of paths and what they become, OLD=NEW; * stands for any part of one."""

    progress: Progress = "auto"
    """Of what takes more than two seconds: a bar if stderr is a terminal, or lines."""

    def run(self) -> int:
        """Prints what was written."""
        found = find_checkpoint(self.source, self.step)
        total = sum(spec.nbytes for spec in found.source.leaves.values())
        with _bar("converting", total, _mode(self.progress)) as progress:
            done = ckpt.convert_checkpoint(
                self.source,
                self.destination,
                to=self.to,
                step=self.step,
                as_step=self.as_step,
                rename=_rules(self.rename),
                progress=progress,
            )
        size = bytes_text(done.nbytes)
        print(f"wrote {done.path} ({done.format}): {done.leaves:,} leaves, {size}")
        return 0


@dataclasses.dataclass(frozen=True)
class _Gc:
    """Remove what killed runs left in the folder of a run; without --yes, only say what."""

    folder: tyro.conf.Positional[str]
    """The folder of a run. Committed steps, and what a living process writes, stay."""

    yes: bool = False
    """Remove it."""

    force: bool = False
    """Also what was changed in the last hour and nobody can tell about: saves of Orbax, and those
    in object stores."""

    def run(self) -> int:
        """Prints what is, or would be, removed."""
        found = ckpt.find_leftovers(self.folder, force=self.force)
        rest = [x.path.name for x in ckpt.find_leftovers(self.folder, force=True) if x not in found]
        if self.yes:
            found = ckpt.remove_leftovers(found, force=self.force)
        for line in _columns([_leftover_cells(x) for x in found]):
            print(line)
        total = bytes_text(sum(x.nbytes for x in found))
        if not found:
            print("nothing to remove")
        else:
            print(f"removed {total}" if self.yes else f"{total}; --yes removes it")
        if rest:
            print(f"changed in the last hour, and left alone without --force: {', '.join(rest)}")
        return 0


def _leftover_cells(x: ckpt.Leftover) -> tuple[str, ...]:
    return x.path.name, bytes_text(x.nbytes), when(x.time), x.why


_COMMANDS = {
    "ls": _Ls,
    "show": _Show,
    "diff": _Diff,
    "verify": _Verify,
    "convert": _Convert,
    "gc": _Gc,
}


def main(args: Sequence[str]) -> int:
    """Runs one of the commands; see `shardflax ckpt --help`.

    >>> import tempfile
    >>> with ckpt.CheckpointManager(tempfile.mkdtemp()) as manager:
    ...     handle = manager.save(3, {"a": 1})
    >>> main(["verify", str(manager.directory)])
    /.../3: 6 files, 1 leaves, 0 B: all checksums right
    0
    """
    command = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, args=args, prog="shardflax ckpt", description=_HELP
    )
    try:
        return command.run()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(str(error)) from error


def _mode(progress: Progress) -> Mode:
    return None if progress == "off" else progress


def _rules(texts: Sequence[str]) -> dict[str, str]:
    rules: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not old or not equals or not new:
            raise CommandError(f"--rename {text!r}: write OLD=NEW, such as encoder=backbone.")
        rules[old] = new
    return rules


def _renamed(source: Source, texts: Sequence[str]) -> Source:
    try:
        return with_names(source, _rules(texts))
    except ValueError as error:
        raise CommandError(str(error)) from error


@contextmanager
def _bar(what: str, total: int, mode: Mode) -> Iterator[Callable[[int], object]]:
    """Shows how far something is that takes long."""
    meter = Meter(what, total)
    with showing(meter, mode):
        yield meter.advance
