"""A clock that goes back, and folders of any age: what is newest is said by numbers alone."""

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from shardflax import ckpt


def age(root: Path, rng: random.Random) -> None:
    """Gives everything in a folder the times of some years before or after 1970."""
    for path in (root, *root.rglob("*")):
        then = rng.randrange(-(10**9), 10**10)
        os.utime(path, (then, then))


def test_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, now = random.Random(3), [2e9]

    def earlier() -> float:
        now[0] -= rng.choice([1.0, 86400.0, 3e6])
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", lambda: int(earlier() * 1e9))
    kept = {5: [5], 10: [5, 10], 15: [5, 10, 15], 20: [10, 15, 20], 25: [10, 20, 25]}
    kept |= {30: [10, 20, 25, 30], 35: [10, 20, 30, 35]}
    for step, steps in kept.items():
        # Each step by a run of its own: nothing is known but what the folder says.
        with ckpt.CheckpointManager(tmp_path, keep=2, keep_every=10, best="loss") as manager:
            manager.save(step, {"w": np.full(3, step)}, metrics={"loss": abs(step - 5) + 1})
            manager.wait()
            expected = sorted({*steps, 5})
            assert manager.all_steps() == expected and manager.latest_step() == step
            assert manager.restore().state["w"][0] == step
        age(tmp_path, rng)
    (tmp_path / "40.saving-0123-1").mkdir()
    age(tmp_path, rng)
    assert [x.path.name for x in ckpt.find_leftovers(tmp_path)] == ["40.saving-0123-1"]
    with ckpt.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == manager.restore().step == 35
    assert not (tmp_path / "40.saving-0123-1").exists()
