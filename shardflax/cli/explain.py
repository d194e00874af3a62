"""`shardflax explain`: how every leaf of a state lies on a mesh, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from shardflax.cli.devices import tpus
from shardflax.cli.errors import CommandError
from shardflax.cli.subject import SubjectOptions, rules_of
from shardflax.partitioning import DEFAULT_RULES, PRESETS, Comparison, Explanation
from shardflax.partitioning.compare import costs_on
from shardflax.partitioning.explain_text import problem_lines
from shardflax.programs import DecoderProgram, abstract_batch, layout_of

__all__ = ["ExplainOptions", "comparison_of", "explanation_of", "main"]

_MOST_RICH = 500  # rows; above, rich takes seconds
_HELP = """Explains how every leaf of a train state lies on a mesh: names, the rule that hit, axes \
taken and given up, bytes per device. No device is needed and nothing is allocated, whatever the \
size of model and mesh. Exit status 1 if anything is wrong with the layout."""


@dataclasses.dataclass(frozen=True)
class ExplainOptions(SubjectOptions):
    """What to explain, and how to show it.

    >>> ExplainOptions("tiny", "fsdp=8").preset
    'fsdp_tp'
    """

    model: tyro.conf.Positional[str]
    """A decoder (tiny, small, base, llama3-1b, llama3-8b, llama3-70b), or package.module:name of \
a function that returns a state, or (model, *inputs), or of a shardflax.programs.Program."""

    mesh: str
    """Axes and sizes, such as fsdp=4,tensor=2 or "dcn(data=2) ici(fsdp=16,tensor=8)"."""

    topology: str | None = None
    """TPUs that the mesh, or each of its slices, is of, such as v5e:4x4: -1 in the mesh is what \
is left of them, and axes that do not fit them are refused. Takes the package libtpu, no TPU."""

    json: Path | None = None
    """Write JSON to this file; - is standard output, in place of the table."""

    html: Path | None = None
    """Write one self-contained page to this file."""

    problems_only: bool = False
    """Print what is wrong, and nothing else."""

    compare: bool = False
    """Compare all presets, and --preset, on the mesh: bytes per device, and what weights and \
gradients send."""

    also: tuple[str, ...] = ()
    """With --compare: more meshes, such as data=8 fsdp=8."""


def explanation_of(options: ExplainOptions) -> Explanation:
    """The explanation that options ask for.

    Raises a `LayoutError` for the batch of a decoder that the mesh does not divide.

    >>> len(explanation_of(ExplainOptions("tiny", "fsdp=4,tensor=2")).leaves)
    39
    """
    rules = rules_of(options.preset)
    mesh, dcn = _placed(options, options.mesh)
    program = options.subject(options.model).program(mesh, rules)
    if isinstance(program, DecoderProgram):
        abstract_batch(program, mesh, rules)  # raises where that of the options does not fit
    layout = layout_of(program, mesh, rules)
    return Explanation(layout, options.model, dcn)


def comparison_of(options: ExplainOptions) -> Comparison:
    """The comparison that options ask for: a batch has as many rows under every preset.

    >>> (row,) = comparison_of(ExplainOptions("tiny", "fsdp=1")).rows  # all mean the same
    >>> len(row.presets), row.batch
    (15, 1024)
    """
    meshes = [_placed(options, spec) for spec in (options.mesh, *options.also)]
    rows = options.batch or max(mesh.size for mesh, _ in meshes)
    if ":" not in options.model:
        options = dataclasses.replace(options, batch=rows)
    program = options.subject(options.model).program(meshes[0][0], DEFAULT_RULES)
    about = (jax.eval_shape(lambda: jax.random.key(0)),), {}, program.batch, program.batch_names
    presets = [*PRESETS, rules_of(options.preset)]
    found = (costs_on(mesh, dcn, presets, program.init, *about) for mesh, dcn in meshes)
    return Comparison(tuple(row for costs in found for row in costs), options.model)


def _placed(options: ExplainOptions, spec: str) -> tuple[Any, dict[str, int]]:
    """A mesh, and the sizes across slices of one without devices."""
    if options.topology is None:
        return options.read(spec)
    return options.place(spec, tpus(options.topology, spec, options.other_axes)), {}


def main(args: Sequence[str]) -> int:
    """Runs the command; the exit status is 1 if the layout has problems.

    >>> main(["tiny", "--mesh", "fsdp=4,tensor=2", "--problems-only"])
    tiny on fsdp=4, tensor=2 under fsdp_tp: 39 leaves, no problems
    0
    """
    options = tyro.cli(ExplainOptions, args=args, prog="shardflax explain", description=_HELP)
    if options.compare:
        return _compare(options)
    if options.also:
        raise CommandError("--also has more meshes to compare on: it goes with --compare.")
    if str(options.html) == "-":
        raise CommandError("--html -: a page is written to a file, such as --html layout.html.")
    explanation = explanation_of(options)
    for path in filter(None, (options.json, options.html)):
        if str(path) != "-":
            _write(explanation, path, page=path is options.html)
    if str(options.json) == "-":
        print(explanation.to_json())
    elif options.problems_only:
        _print_problems(explanation)
    else:
        _print_table(explanation)
    return 1 if explanation.problems else 0


def _compare(options: ExplainOptions) -> int:
    """Prints or writes a comparison; the status is 1 if no preset fits."""
    if options.html or options.problems_only:
        raise CommandError("--compare gives a table, or JSON: not --html or --problems-only.")
    comparison = comparison_of(options)
    if options.json and str(options.json) != "-":
        _write_text(comparison.to_json() + "\n", options.json)
    if str(options.json) == "-":
        print(comparison.to_json())
    else:
        _print(comparison)
    return 0 if any(not row.problems for row in comparison.rows) else 1


def _write(explanation: Explanation, path: Path, page: bool) -> None:
    _write_text(explanation.to_html() if page else explanation.to_json() + "\n", path)


def _write_text(text: str, path: Path) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise CommandError(f"{path}: it cannot be written: {error.strerror}.") from None
    print(f"wrote {path}", file=sys.stderr)


def _print_problems(explanation: Explanation) -> None:
    for line in problem_lines(explanation):
        print(line)
    if not explanation.problems:
        print(f"{explanation.heading}: {len(explanation.leaves)} leaves, no problems")


def _print_table(explanation: Explanation) -> None:
    if len(explanation.leaves) <= _MOST_RICH:
        _print(explanation)
    else:
        print(explanation)


def _print(what: Explanation | Comparison) -> None:
    """In colours on a terminal, plain elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(what)
    else:
        print(what)
