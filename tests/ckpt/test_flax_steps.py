"""What Flax's `training.checkpoints` left in a folder: listed, shown, restored, converted."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import config, linen
from flax.training import checkpoints

from shardflax import ckpt
from shardflax.ckpt.locate import find_checkpoint
from shardflax.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
PARAMS = {
    "layers": {
        "kernel": linen.LogicallyPartitioned(
            np.arange(24.0).reshape(3, 2, 4), ("layers", "embed", "mlp")
        ),
        "bias": np.arange(6.0).reshape(3, 2),
    },
    "value": {"head": np.ones(2)},
}


@pytest.fixture(scope="module", params=["msgpack", "orbax"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 2 and 10, in each format."""
    folder = tmp_path_factory.mktemp("run")
    before = config.flax_use_orbax_checkpointing  # type: ignore[attr-defined]
    config.update("flax_use_orbax_checkpointing", request.param == "orbax")
    try:
        for step in (2, 10):
            checkpoints.save_checkpoint(folder, {"params": PARAMS, "step": step}, step, keep=9)
    finally:
        config.update("flax_use_orbax_checkpointing", before)
    return folder


def test_steps_are_listed_in_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ckpt.list_steps(run)
    assert [(s.name, s.state) for s in steps] == [
        ("checkpoint_2", "committed"),
        ("checkpoint_10", "committed"),
    ]
    assert {s.format for s in steps} == {"flax msgpack" if steps[0].path.is_file() else "orbax"}
    assert main(["ckpt", "ls", str(run)]) == 0
    assert capsys.readouterr().out.count("committed") == 2
    assert [find_checkpoint(run, step).step for step in (None, 2)] == [10, 2]
    with pytest.raises(ckpt.CheckpointNotFoundError, match="it has: 2, 10"):
        find_checkpoint(run, 3)
    assert main(["ckpt", "show", str(run)]) == 0
    assert "step 10" in capsys.readouterr().out


def test_converted_into_a_run_and_restored_without_the_boxes(run: Path, tmp_path: Path) -> None:
    """Unrolled, too: `layers/kernel/value` into `layers_0/kernel`, ..."""
    done = ckpt.convert_checkpoint(run, tmp_path / "new", step=2)
    assert done.path.name == "2"
    kernel: Any = PARAMS["layers"]["kernel"].value  # type: ignore[union-attr]
    plain = {"kernel": jnp.zeros((3, 2, 4)), "bias": np.zeros((3, 2))}
    one = {"kernel": jnp.zeros((2, 4)), "bias": np.zeros(2)}
    source = run / "checkpoint_2"
    for layers in ({"layers": plain}, {f"layers_{i}": one for i in range(3)}):
        target = {"params": {**layers, "value": {"head": np.zeros(2)}}, "step": 0}
        load = ckpt.load_msgpack if source.is_file() else ckpt.load_checkpoint
        state = load(source, _double(target)).state["params"]
        found = state["layers"]["kernel"] if "layers" in state else [
            state[f"layers_{i}"]["kernel"] for i in range(3)
        ]  # fmt: skip
        np.testing.assert_array_equal(np.stack(found), kernel)
        np.testing.assert_array_equal(state["value"]["head"], 1)


def _double(target: Any) -> Any:
    """As numpy arrays of the dtypes that were saved."""
    if isinstance(target, dict):
        return {name: _double(value) for name, value in target.items()}
    return np.zeros(target.shape) if hasattr(target, "shape") else target


def test_the_data_iterators_of_processes_are_shown_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ckpt.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, {"w": np.ones(2)}, process_extras={"shard": 1, "at": [64, 2]})
    ckpt.convert_checkpoint(tmp_path / "run", tmp_path / "other", as_step=4)
    info = ckpt.inspect_checkpoint(tmp_path / "other")
    assert info.process_extras == ({"shard": 1, "at": [64, 2]},)
    assert ckpt.load_checkpoint(tmp_path / "other/4").process_extras == info.process_extras
    assert main(["ckpt", "show", str(tmp_path / "other")]) == 0
    assert "extras of each process: shard, at" in capsys.readouterr().out
    assert '"process_extras"' in info.to_json()
