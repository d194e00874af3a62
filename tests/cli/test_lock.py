"""`shardflax lock` and the lock files behind it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from shardflax import partitioning as pt
from shardflax.cli import main
from shardflax.partitioning import LockDriftError, LockedLeaf, LockEntry, LockFileError
from shardflax.partitioning.lock_changes import changes_between
from shardflax.programs import layout_of, traced_step
from tests.cli import subjects
from tests.explain.states import RULES, boxed

SUBJECTS = "tests.cli.subjects"
MLP = f"{SUBJECTS}:program"


def run(capsys: pytest.CaptureFixture[str], file: Path, *args: str) -> tuple[int, str]:
    status = main(["lock", "--file", str(file), *args])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def layout(spec: str = "fsdp=4,tensor=2", rules: Any = RULES) -> pt.Layout:
    state = {"params": {"up": boxed((64, 96), "embed", "mlp"), "scale": boxed((64,), "norm")}}
    return pt.Layout(state, pt.make_abstract_mesh(spec), rules)


def sent(count: int = 2, size: int = 1024, kind: str = "all-gather") -> pt.Collective:
    return pt.Collective(kind, ("fsdp",), "ICI", size, count)


# --- the command


def test_entries_are_written_checked_and_renewed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "shardflax.lock"
    quick = ("--no-collectives", "--layers", "1")
    status, out = run(capsys, file, "tiny", "--mesh", "fsdp=4,tensor=2", *quick)
    assert status == 0 and "tiny fsdp=4,tensor=2 fsdp_tp: new" in out and f"wrote {file}" in out
    big = ("--mesh", "dcn(data=2) ici(fsdp=16)", "--preset", "fsdp", "--name", "big")
    assert run(capsys, file, MLP, *big, "--no-collectives")[0] == 0
    text = file.read_text("utf-8")
    assert list(json.loads(text)["entries"]) == ["big", "tiny fsdp=4,tensor=2 fsdp_tp"]
    assert max(map(len, text.splitlines())) < 200 and text.endswith("}\n")
    status, out = run(capsys, file, "--check")
    assert (status, out.count("as locked")) == (0, 2)
    # Nothing has changed: nothing is written.
    assert run(capsys, file) == (0, out) and file.read_text("utf-8") == text


def test_what_is_said_beside_the_mesh_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "shardflax.lock"
    mesh = ("--mesh", "dcn(tensor=-1) ici(fsdp=4)", "--devices", "8", "--across-dcn", "tensor")
    quick = ("--no-collectives", "--name", "mine")
    assert run(capsys, file, MLP, *mesh, *quick)[0] == 0
    entry = pt.read_lock(file)["mine"]
    assert entry.mesh == "fsdp=4, tensor=2"
    assert (entry.asked["devices"], entry.asked["across_dcn"]) == (8, ["tensor"])
    assert run(capsys, file, "--check") == run(capsys, file) == (0, "mine: as locked\n")


def test_drift_is_status_one_and_says_what_changed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "shardflax.lock"
    asked = (MLP, "--mesh", "fsdp=4", "--name", "mine", "--no-collectives")
    assert run(capsys, file, *asked, "--preset", "fsdp")[0] == 0
    before = file.read_text("utf-8")
    status, out = run(capsys, file, *asked, "--preset", "dp", "--check")
    assert status == 1 and file.read_text("utf-8") == before
    assert "mine: not as locked" in out and "rules: fsdp -> dp" in out
    assert "bytes per device: " in out and "(+" in out
    assert "~ spec (tensor, fsdp)" not in out and "spec (-, fsdp) -> (-, -)" in out
    # Renewed on purpose, it is as locked.
    assert run(capsys, file, *asked, "--preset", "dp")[0] == 0
    assert run(capsys, file, "--check") == (0, "mine: as locked\n")


def test_collectives_are_locked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of a train step of one's own, compiled for the eight devices of the tests."""
    file = tmp_path / "shardflax.lock"
    asked = ("--mesh", "fsdp=8", "--preset", f"{SUBJECTS}:RULES", "--name", "mine")
    assert run(capsys, file, MLP, *asked)[0] == 0
    entry = pt.read_lock(file)["mine"]
    kinds = {(one.kind, one.axes, one.network) for one in entry.collectives or ()}
    assert ("all-gather", "fsdp", "ICI") in kinds
    assert entry.compiler == f"jax {jax.__version__} for cpu"
    status, out = run(capsys, file, f"{SUBJECTS}:narrow", *asked, "--check")
    assert status == 1
    assert "float32[16,32] -> float32[16,16]" in out and "collectives: " in out
    assert "~ all-gather over fsdp (ICI)" in out


WRONG = {
    "mesh": (["tiny"], "say the mesh"),
    "open": (["tiny", "--mesh", "fsdp=-1"], "or --devices 256"),
    "dcn": (["tiny", "--mesh", "dcn(tensor=2)"], "say --across-dcn tensor"),
    "model": (["--mesh", "fsdp=4"], "--mesh goes with a model"),
    "file": (["--check"], "there is no such file"),
    "step": ([f"{SUBJECTS}:stateless", "--mesh", "fsdp=4"], "has no train step"),
    "devices": (["tiny", "--mesh", "fsdp=64"], "64 are needed"),
    "problems": ([MLP, "--mesh", "tensor=64", "--no-collectives"], "is not divisible by 64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args, expected = WRONG[case]
    status, out = run(capsys, tmp_path / "shardflax.lock", *args)
    assert status == 2 and out.startswith("error: ") and expected in out
    assert not (tmp_path / "shardflax.lock").exists()


def test_entries_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = pt.write_lock(tmp_path / "shardflax.lock", {"mine": pt.lock(layout())})
    status, out = run(capsys, file, "--check", "--name", "mien")
    assert status == 2 and "did you mean 'mine'?" in out
    status, out = run(capsys, file, "--check")
    assert status == 2 and "does not say what it was made from" in out
    pt.write_lock(file, {})  # nothing to compare is nothing that passes
    status, out = run(capsys, file, "--check")
    assert status == 2 and "has no entry: shardflax lock MODEL" in out


# --- the file


def test_files_are_stable_and_come_back_as_they_were(tmp_path: Path) -> None:
    found = [sent(), sent(3, 64), dataclasses.replace(sent(), path="up"), sent(1, 8, "all-reduce")]
    entry = pt.lock(layout(), found, asked={"model": "mine"})
    first = pt.write_lock(tmp_path / "a", {"b": entry, "a": entry}).read_text("utf-8")
    back = pt.read_lock(tmp_path / "a")
    assert back == {"a": entry, "b": entry}
    again = {name: pt.lock(layout(), found[::-1], asked={"model": "mine"}) for name in ("b", "a")}
    assert pt.write_lock(tmp_path / "b", again).read_text("utf-8") == first
    assert [(one.bytes, one.count) for one in entry.collectives or ()] == [
        (1024, 4),
        (64, 3),
        (8, 1),
    ]
    leaf = '"params/up": {"array": "float32[64,96]", "names": "embed, mlp", "spec": "fsdp, tensor"'
    assert leaf in first


def test_the_memory_of_a_step_is_kept_and_compared(tmp_path: Path) -> None:
    analysis = SimpleNamespace(
        argument_size_in_bytes=4096,
        output_size_in_bytes=4096,
        alias_size_in_bytes=3072,
        temp_size_in_bytes=512,
    )
    entry = pt.lock(layout(), [sent()], memory=analysis)
    assert entry.memory == {"arguments": 4096, "outputs": 1024, "temporary": 512}
    assert pt.read_lock(pt.write_lock(tmp_path / "a", {"a": entry}))["a"] == entry
    pt.check_lock(entry, layout(), [sent()], analysis)
    pt.check_lock(entry, layout(), [sent()])  # not compared if it is not given
    analysis.temp_size_in_bytes = 1536
    with pytest.raises(LockDriftError) as error:
        pt.check_lock(entry, layout(), [sent()], analysis)
    assert error.value.changes == ("memory of the step, temporary: 512 B -> 1.5 KiB (+1.0 KiB)",)
    other = dataclasses.replace(entry, memory=None, compiler="another")
    assert changes_between(entry, other) == [
        "memory of the step: recorded -> not recorded",
        f"compiled by {entry.compiler}, now by another",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "shardflax.lock"
    whole = pt.write_lock(file, {"mine": pt.lock(layout())}).read_text("utf-8")
    assert ": 3072}" in whole
    for text, expected in (
        ("{", "it cannot be read: .*Take it from version control again"),
        ("[" * 100_000, "it cannot be read: "),
        ("[]", "it is no lock file"),
        ('{\n<<<<<<< HEAD\n"a": 1\n=======', "line 2 is a mark of a merge .* shardflax lock"),
        ('{"format": 1, "format": 2}', "it cannot be read: 'format' stands there twice"),
        ('{"format": "shardflax.lock", "version": 2}', "version 2, and this library reads .* 1"),
        ('{"format": "shardflax.lock", "version": 1}', 'it has no "entries"'),
        ('{"format": "shardflax.lock", "version": 1, "entries": {"a": {}}}', "'a' lacks 'leaves'"),
        ('{"format": "shardflax.lock", "version": 1, "entries": {"a": 1}}', "something else"),
        (whole.replace(": 3072}", ': "64"}'), "'mine' holds something else than was written"),
    ):
        file.write_text(text)
        with pytest.raises(LockFileError, match=expected):
            pt.read_lock(file)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(LockFileError, match="it cannot be written: No such file or directory"):
        pt.write_lock(tmp_path / "no" / "shardflax.lock", {})
    pt.write_lock(tmp_path / "shardflax.lock", {"mine": pt.lock(layout())})
    assert [path.name for path in tmp_path.iterdir()] == ["shardflax.lock"]


def test_check_lock_says_what_changed() -> None:
    entry = pt.lock(layout(), [sent()])
    pt.check_lock(entry, layout(), [sent()])
    pt.check_lock(entry, layout())  # collectives are not given, and not compared
    with pytest.raises(LockDriftError) as error:
        pt.check_lock(entry, layout(rules=RULES | {"mlp": None}), [sent(3), sent(1, 64)])
    assert error.value.changes == (
        "rules: mine -> mine | overrides",
        "bytes per device: 3.2 KiB -> 6.2 KiB (+3.0 KiB)",
        "~ spec (fsdp, tensor) -> (fsdp, -), +3.0 KiB a leaf: params/up",
        "collectives: 2.0 KiB -> 3.1 KiB a step (+1.1 KiB)",
        "  ~ all-gather over fsdp (ICI): 2 x, 2.0 KiB -> 4 x, 3.1 KiB (+1.1 KiB): "
        "2 -> 3 x 1.0 KiB, 0 -> 1 x 64 B",
    )


def test_problems_cannot_be_locked() -> None:
    with pytest.raises(pt.IndivisibleDimError):
        pt.lock(layout("fsdp=5"))


def test_changes_of_every_kind() -> None:
    leaf = LockedLeaf("float32[64]", "embed", "fsdp", 64)
    old = LockEntry("fsdp=4", "fsdp", 128, {"a": leaf, "gone": leaf})
    renamed = dataclasses.replace(leaf, names="mlp")
    new = dataclasses.replace(old, leaves={"a": renamed, "new": leaf})
    assert changes_between(old, new) == [
        "~ names (embed) -> (mlp): a",
        "- float32[64] (embed) lies as (fsdp), -64 B a leaf: gone",
        "+ float32[64] (embed) lies as (fsdp), +64 B a leaf: new",
    ]
    many = {f"layers_{i}": leaf for i in range(5)}
    whole = {path: dataclasses.replace(leaf, spec="-", bytes_per_device=256) for path in many}
    (line,) = changes_between(
        dataclasses.replace(old, leaves=many), dataclasses.replace(old, leaves=whole)
    )
    assert line.endswith("+192 B a leaf: layers_0, layers_1, layers_2 and 2 more")
    gathered = pt.lock(layout(), [sent()])
    loop = pt.lock(layout(), [dataclasses.replace(sent(), exact=False), sent(1, 8, "all-reduce")])
    assert changes_between(gathered, loop)[1:] == [
        "  ~ all-gather over fsdp (ICI): 2 x, 2.0 KiB -> 2 x, 2.0 KiB (+0 B): "
        "2 -> 0 x 1.0 KiB, 0 -> 2 x 1.0 KiB in each step of a loop",
        "  + all-reduce over fsdp (ICI): 1 x, 8 B (+8 B)",
    ]
    assert changes_between(pt.lock(layout()), gathered) == ["collectives: not recorded -> 1 kinds"]
    other = dataclasses.replace(gathered, compiler="jax 9", collectives=())
    assert changes_between(gathered, other)[-1].endswith("now by jax 9")


def test_a_program_of_ones_own_can_be_checked_in_a_test() -> None:
    """As a user's test would: nothing of the command line in it."""
    mesh, rules = pt.make_mesh("data=8"), pt.preset("dp")
    found = layout_of(subjects.program, mesh, rules)
    compiled = traced_step(subjects.program, found, rules).lower().compile()
    entry = pt.lock(found, pt.collectives(compiled))
    assert {one.kind for one in entry.collectives or ()} == {"all-reduce"}
    pt.check_lock(entry, found, pt.collectives(compiled))
