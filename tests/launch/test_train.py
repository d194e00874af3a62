"""Wrong input of `launch.train` is answered before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.train import main
from tests.allocations import nothing_allocated

SMALL = ("--model", "tiny", "--layers", "1", "--seq-len", "32", "--batch", "8", "--steps", "30")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(f"{i} squared is {i * i}." for i in range(500)))
    return path


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What is said of a command line that cannot be."""
    with nothing_allocated(), pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ") and "Traceback" not in said
    # What to write are options.
    assert [words for words in ("make_", "jax.", "rules |", "may yield") if words in said] == []
    return said


WRONG = {
    "preset": (["--preset", "fsdp_pt"], ["fsdp_pt", "did you mean 'fsdp_tp'"]),
    "axis": (["--mesh", "data=4,tensr=2"], ["did you mean 'tensor'?", "--other-axes tensr."]),
    "dcn": (["--mesh", "dcn(tensor=2) ici(data=4)"], ["say --across-dcn tensor."]),
    "mesh": (["--mesh", "data=4,tensor=4"], ["16", "8"]),
    "fewer": (["--mesh", "data=4"], ["Write data=8, or -1 for one of the axes (what is left)."]),
    "mesh-syntax": (["--mesh", "data:8"], ["data:8"]),
    "batch": (["--mesh", "data=8", "--batch", "12"], ["batch", "12", "8"]),
    "heads": (
        ["--mesh", "tensor=8"],
        ["heads", "4", "8", "tensor", "rule 'heads': 'tensor').\nChoose another --mesh"],
    ),
    "claims": (
        ["--mesh", "expert=8", "--preset", "ep + ep_as_cp"],
        ["batch: dims 0 'batch' and 1 'length'", "both claim the axis 'expert'", "--preset or"],
    ),
    "model": (["--model", "smal"], ["smal", "did you mean 'small'"]),
    "remat": (["--remat", "dots_savable"], ["dots_savable", "did you mean"]),
    "accumulate": (["--accumulate", "3"], ["accumulate=3", "8"]),
    "accumulate-none": (["--accumulate", "0"], ["--accumulate 0: expected a number from 1"]),
    "save-minutes": (["--save-minutes", "0"], ["--save-minutes 0.0: expected a number above 0"]),
    "seq-len": (["--seq-len", "0"], ["seq_len=0: expected a number from 1"]),
    "prompt": (["--prompt", ""], ["--prompt ''", "or --sample 0"]),
    "sample": (["--sample", "2000"], ["at most 1020 bytes, after a prompt of 4"]),
    "held-out": (["--eval-batches", "1"], ["one batch of 8 held-out windows", "found 5 of them"]),
    "data": (["--data", "no/such/file"], ["no/such/file"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(
    case: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, expected = WRONG[case]
    run = tmp_path / "run"
    said = refused(capsys, *SMALL, "--data", corpus, "--run", run, *wrong)
    assert [part for part in expected if part not in said] == []
    assert not run.exists()


def test_empty_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    said = refused(capsys, *SMALL, "--data", empty, "--run", tmp_path / "run")
    assert "empty.txt" in said


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for option in ("--mesh", "--preset", "--data", "--steps", "--learning-rate", "--run"):
        assert option in said
