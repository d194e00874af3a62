"""What a launched process is told, and what it makes of it."""

from __future__ import annotations

import os

import pytest

from launch.distributed import Cluster, cluster_from_env
from launch.errors import LaunchEnvironmentError
from launch.local import _parse, child_environ
from shardflax.training import Progress

PLACE = Cluster("127.0.0.1:1234", num_processes=2, process_id=1)


def test_a_child_reads_what_the_launcher_wrote() -> None:
    assert cluster_from_env(child_environ(PLACE, devices=4)) == PLACE


def test_a_single_process_is_told_that_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", PLACE.environ())  # a launcher inside a launched process
    assert cluster_from_env() == PLACE
    own = child_environ(Cluster("127.0.0.1:1", 1, 0), devices=4)
    assert cluster_from_env({**os.environ, **own}) is None


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SHARDFLAX_PROCESS_ID", None, "expected a number, found it unset"),
        ("SHARDFLAX_PROCESS_ID", "2", "expected a number below SHARDFLAX_NUM_PROCESSES=2"),
        ("SHARDFLAX_PROCESS_ID", "-1", "expected a number, found '-1'"),
        ("SHARDFLAX_NUM_PROCESSES", "two", "expected a number, found 'two'"),
        ("SHARDFLAX_NUM_PROCESSES", "0", "expected a number from 1, found '0'"),
        ("SHARDFLAX_COORDINATOR", "localhost", "expected host:port, found 'localhost'"),
        ("SHARDFLAX_COORDINATOR", "1234", "expected host:port"),
    ],
)
def test_nonsense_is_named(variable: str, value: str | None, message: str) -> None:
    environ = {**PLACE.environ(), variable: value}
    with pytest.raises(LaunchEnvironmentError, match=message) as caught:
        cluster_from_env({k: v for k, v in environ.items() if v is not None})
    assert caught.value.variable == variable


def test_xla_flags_are_merged() -> None:
    given = "--xla_dump_to=/d --xla_force_host_platform_device_count=8"
    flags = child_environ(PLACE, 4, xla_flags=given)["XLA_FLAGS"].split()
    assert "--xla_dump_to=/d" in flags
    assert [f for f in flags if "device_count" in f] == ["--xla_force_host_platform_device_count=4"]
    mine = "--xla_cpu_collective_call_terminate_timeout_seconds=1"
    flags = child_environ(PLACE, 4, xla_flags=mine)["XLA_FLAGS"].split()
    assert [f for f in flags if "terminate_timeout" in f] == [mine]


@pytest.mark.parametrize(("columns", "mode"), [(None, "lines"), (70, "bar")])
def test_bars_only_where_the_launcher_says_so(
    monkeypatch: pytest.MonkeyPatch, columns: int | None, mode: str
) -> None:
    for name, value in child_environ(PLACE, 4, columns).items():
        monkeypatch.setenv(name, value)
    assert Progress(9, tokens_per_step=1, shown=True).mode == mode
    assert columns is None or os.environ["COLUMNS"] == str(columns)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes", "2"], "say after -- what to run"),
        (["--processes", "2", "--", "-m"], "say after -- what to run"),
        (["--processes", "0", "--", "-m", "x"], "expected a whole number from 1, found '0'"),
        (["--devices", "many", "--", "-m", "x"], "expected a whole number from 1, found 'many'"),
        (["--", "no/such/script.py"], "found 'no/such/script.py'"),
    ],
)
def test_wrong_command_lines(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_keeps_its_own_options() -> None:
    options, command = _parse(["--devices", "4", "--", "-m", "a.b", "--devices", "8", "--", "x"])
    assert options.devices == 4
    assert command == ["-m", "a.b", "--devices", "8", "--", "x"]
