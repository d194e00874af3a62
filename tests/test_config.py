"""Flags, and the frames of tracebacks that one of them hides."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardflax import config, configurations, nn, traceback_util


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = config.flax_filter_frames
    yield
    config.update("flax_filter_frames", before)


def test_flags_are_read_and_changed() -> None:
    flag = configurations.define_bool_state("flag_of_a_test", False, "A flag.")
    assert flag.value is False and config.flax_flag_of_a_test is False
    config.update("flax_flag_of_a_test", True)
    assert flag.value is True
    with config.temp_flip_flag("flag_of_a_test", False):
        assert flag.value is False
    assert config.flax_flag_of_a_test is True


def test_variables_are_returned_frozen_if_so_flagged() -> None:
    model, x = nn.BatchNorm(use_running_average=False), jnp.ones((1, 2))
    with config.temp_flip_flag("return_frozendict", True):
        variables = model.init(jax.random.key(0), x)
        stats, _ = variables.pop("params")
        assert type(stats) is nn.FrozenDict
        assert type(model.apply(variables, x, mutable=True)[1]) is nn.FrozenDict
        assert type(model.bind(variables).variables["params"]) is nn.FrozenDict
    assert type(model.init(jax.random.key(0), x)) is dict


def test_a_flag_goes_back_when_the_context_fails() -> None:
    with pytest.raises(ZeroDivisionError), config.temp_flip_flag("filter_frames", False):
        raise ZeroDivisionError
    assert config.flax_filter_frames


def test_faults() -> None:
    with pytest.raises(LookupError, match="did you mean 'flax_filter_frames'"):
        config.update("flax_filter_frame", True)
    with pytest.raises(TypeError, match="got int: 3"):
        config.update("flax_filter_frames", 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="defined already"):
        config.define_bool_state("flax_filter_frames", True, "Again.")
    with pytest.raises(AttributeError, match="flax_nothing"):
        _ = config.flax_nothing
    with pytest.raises(TypeError, match="use the value"):
        bool(config.define_bool_state("flag_of_another_test", False, "A flag."))


@pytest.mark.parametrize("value", ["1", "on", "Yes", "TRUE", "0", "off", "No", "f", "n", "y"])
def test_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_FLAG", value)
    truth = value.lower() in ("1", "on", "yes", "true", "y")
    assert config.static_bool_env("A_FLAG", not truth) is truth
    monkeypatch.setenv("A_FLAG", f"{value}!")
    with pytest.raises(ValueError, match="A_FLAG"):
        config.static_bool_env("A_FLAG", True)


def test_flags_start_with_their_environment_variable() -> None:
    code = "from shardflax import config; print(config.flax_filter_frames)"
    env = {"FLAX_FILTER_FRAMES": "off", "PATH": "", "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, env=env, capture_output=True, check=True).stdout == b"False\n"


@pytest.fixture
def filtered() -> Iterator[None]:
    """JAX takes the frames out that it would otherwise only explain away."""
    before: Any = jax.config.values["jax_traceback_filtering"]
    jax.config.update("jax_traceback_filtering", "remove_frames")
    yield
    jax.config.update("jax_traceback_filtering", before)


def _frames() -> list[str]:
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            raise KeyError("broken")

    def run(x: Any) -> Any:
        return Broken().apply({}, x)

    with pytest.raises(KeyError) as info:
        jax.jit(run)(jnp.ones(1))
    return [frame.filename for frame in traceback.extract_tb(info.value.__traceback__)]


def _ours(files: list[str]) -> list[str]:
    return [file for file in files if "/shardflax/" in file]


@pytest.mark.usefixtures("filtered")
def test_frames_are_hidden_and_shown() -> None:
    traceback_util.show_flax_in_tracebacks()
    shown = _frames()
    traceback_util.hide_flax_in_tracebacks()
    hidden = _frames()
    assert _ours(shown) and not _ours(hidden)
    assert hidden.count(__file__) == shown.count(__file__) >= 3


@pytest.mark.usefixtures("filtered")
def test_other_files_can_be_hidden() -> None:
    assert _frames().count(__file__) > 1
    traceback_util.register_exclusion(__file__)
    try:
        files = _frames()
    finally:
        traceback_util.staging.show_frames(__file__)
    # The first frame is outside of what JAX filters.
    assert files.count(__file__) <= 1
