"""What a command looks at: a model of the library, or something of yours by its import path."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import os
import re
import sys
import traceback
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardflax.cli.errors import CommandError, ImportPathError
from shardflax.cli.mesh import AbstractMeshOptions
from shardflax.core.errors import did_you_mean
from shardflax.core.module import Module
from shardflax.models import UnknownModelError, decoder_config
from shardflax.partitioning import AxisRules, batch_axes, preset
from shardflax.partitioning.errors import kind_of
from shardflax.programs import DecoderProgram, Program
from shardflax.training import OptimizerConfig

__all__ = ["Subject", "SubjectOptions", "imported", "rules_of"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a command was asked to look at, and with which batch and optimizer.

    `what` is the name of a decoder in `shardflax.models`, or `package.module:name`.  The name may
    stand for

    - a function without arguments that returns a state: any tree of arrays, boxed or not, such as
      `model.init(key, x)` or a `TrainState`; or that returns `(model, *inputs)`;
    - such a tuple `(model, *inputs)`;
    - a `shardflax.programs.Program`, which has a train step too.

    Functions are called abstractly: what they make is never allocated.

    >>> Subject("tiny").seq_len
    128
    """

    what: str
    layers: int | None = None
    batch: int | None = None
    seq_len: int = 128
    optimizer: str = "adamw"

    def program(self, mesh: Any, rules: AxisRules) -> Program | DecoderProgram:
        """The program; a decoder's batch has a row for each device along it, if none is said.

        Raises `UnknownModelError`, `ImportPathError`, or `CommandError` for an empty batch.

        >>> from shardflax.partitioning import make_mesh
        >>> Subject("tiny").program(make_mesh("data=8"), preset("dp")).shape
        (8, 128)
        """
        if ":" in self.what:
            return _as_program(self.what, imported(self.what))
        for option, number in (("--batch", self.batch), ("--seq-len", self.seq_len)):
            if number is not None and number < 1:
                raise CommandError(f"{option} {number}: there is at least one.")
        updates = {} if self.layers is None else {"num_layers": self.layers}
        try:
            config = decoder_config(self.what, **updates)
        except UnknownModelError as error:
            how = "A model of yours is package.module:name."
            raise UnknownModelError(f"{error} {how}") from None
        rows = self.batch or math.prod(mesh.shape[axis] for axis in batch_axes(mesh, rules))
        return DecoderProgram(config, OptimizerConfig(name=self.optimizer), (rows, self.seq_len))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubjectOptions(AbstractMeshOptions):
    """Options of all commands that look at a model on a mesh.

    >>> SubjectOptions(layers=2).subject("tiny").layers
    2
    """

    preset: str = "fsdp_tp"
    """Rules: presets, such as fsdp or "fsdp + tp_sp", or package.module:NAME of AxisRules."""

    layers: int | None = None
    """Number of blocks of a decoder, if not that of its size."""

    batch: int | None = None
    """Rows of a batch of a decoder; one for each device along it, if not said."""

    seq_len: int = 128
    """Tokens in a row."""

    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    """Of a decoder."""

    def subject(self, model: str) -> Subject:
        """The model, with what these options say about it.

        Raises `CommandError` for options of decoders that would do nothing.
        """
        subject = Subject(model, self.layers, self.batch, self.seq_len, self.optimizer)
        for field in dataclasses.fields(subject)[1:]:
            if ":" in model and getattr(subject, field.name) != field.default:
                option = f"--{field.name.replace('_', '-')}"
                raise CommandError(f"{option} is for decoders: {model!r} says its own.")
        return subject


def rules_of(text: str) -> AxisRules:
    """The rules that a command line names: presets (`fsdp + tp_sp`), or `package.module:NAME`.

    Raises `UnknownPresetError`, or `ImportPathError`.

    >>> rules_of("fsdp_tp").title
    'fsdp_tp'
    >>> rules_of("shardflax.partitioning:DEFAULT_RULES").title
    'default rules'
    """
    if ":" not in text:
        return preset(text)
    found = imported(text)
    if not isinstance(found, AxisRules):
        how = "Write AxisRules(...)."
        raise ImportPathError(text, f"expected AxisRules, found {kind_of(found)}. {how}")
    return found


_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def imported(path: str) -> Any:
    """What `package.module:name` stands for; modules of the working directory are found, too.

    Raises `ImportPathError` (did-you-mean) if there is no such thing, or if importing the module
    fails.

    >>> imported("shardflax.partitioning:presett")
    Traceback (most recent call last):
        ...
    shardflax.cli.errors.ImportPathError: 'shardflax.partitioning:presett': the module has no
    'presett': did you mean 'preset'?
    """
    where, _, name = path.partition(":")
    if where.endswith(".py"):
        dotted = where.removesuffix(".py").replace(os.sep, ".").lstrip(".")
        raise ImportPathError(path, f"this is a file. Write its module, {dotted}:{name or 'name'}.")
    if not _MODULE.fullmatch(where) or not name:
        raise ImportPathError(path, "write package.module:name.")
    module = _module(path, where)
    if not hasattr(module, name):
        hint = did_you_mean(name, [n for n in vars(module) if not n.startswith("_")])
        raise ImportPathError(path, f"the module has no {name!r}: {hint}")
    return getattr(module, name)


def _module(path: str, where: str) -> Any:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:
        name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if name and f"{where}.".startswith(f"{name}."):
            raise ImportPathError(path, f"there is no module {name!r} to import.") from None
        raise ImportPathError(path, f"importing {where} fails: {_fault(error)}") from error


def _fault(error: BaseException) -> str:
    """An exception of somebody else's code in one line, with the last place of that code."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((_HERE, "<frozen"))]
    at = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    if isinstance(error, SyntaxError):
        at = ""  # it says so itself
    return f"{type(error).__name__}: {error}{at}"


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _as_program(path: str, found: Any) -> Program | DecoderProgram:
    if isinstance(found, Program | DecoderProgram):
        return found
    if isinstance(found, Module):
        raise ImportPathError(path, _needs_inputs(found))
    if not callable(found) and not isinstance(found, tuple):
        raise ImportPathError(path, f"expected a function, or a Program, found {kind_of(found)}.")
    return Program(_Init(path, found))


@dataclasses.dataclass(frozen=True)
class _Init:
    """The init of what an import path stands for."""

    path: str
    found: Any

    def __call__(self, key: jax.Array) -> Any:
        made = _called(self.path, self.found)
        if isinstance(made, Module):
            raise ImportPathError(self.path, _needs_inputs(made))
        if isinstance(made, Program | DecoderProgram):
            problem = "the function returns a Program, which is traced later: name it instead of"
            raise ImportPathError(self.path, f"{problem} a function that makes it.")
        if isinstance(made, tuple) and made and isinstance(made[0], Module):
            return made[0].init(key, *jax.tree.map(_as_array, made[1:]))
        _check_state(self.path, made)
        return jax.tree.map(_as_array, made)


def _called(path: str, found: Any) -> Any:
    """What a function returns; a value as it is."""
    if not callable(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        how = "write one that calls it, such as: lambda: init(jax.random.key(0))."
        raise ImportPathError(
            path, f"a function without arguments is wanted ({error}): {how}"
        ) from None
    except ValueError:
        pass  # a function of C, of which nothing is known
    try:
        return found()
    except SystemExit as error:
        raise ImportPathError(path, f"calling it ends the process: {_fault(error)}") from None


def _check_state(path: str, made: Any) -> None:
    """Refuses what is no tree of arrays, or an empty one: nothing to say is nothing that fits."""
    leaves = jax.tree.leaves_with_path(made)
    if not leaves:
        raise ImportPathError(path, f"it returns {kind_of(made)} without arrays, and no state.")
    for where, leaf in leaves:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            place = jax.tree_util.keystr(where)
            at = f" at {place}" if place else ""
            raise ImportPathError(
                path, f"it returns {kind_of(leaf)}{at}: a state is a tree of arrays."
            )


def _as_array(x: Any) -> Any:
    """An array for a shape: inside of the trace in which this runs, one that is never made."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _needs_inputs(model: Module) -> str:
    name = type(model).__name__
    return (
        f"{name} is a module, and its parameters depend on its inputs. Write a function that "
        f"returns (model, *inputs), such as: lambda: ({name}(...), jnp.ones((8, 128)))."
    )
