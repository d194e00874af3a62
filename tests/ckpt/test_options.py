"""What a restore may do when it is asked to, and its report."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardflax import ckpt
from shardflax.partitioning import LogicallyPartitioned


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    with ckpt.CheckpointManager(tmp_path) as manager:
        yield manager


def save(manager: ckpt.CheckpointManager, state: Any) -> None:
    manager.save(1, state)


def test_a_dtype_is_cast_only_where_that_is_asked_for(manager: ckpt.CheckpointManager) -> None:
    w = jnp.arange(6.0).reshape(2, 3) / 7
    save(manager, {"a": w, "b": w, "n": jnp.arange(3)})
    target = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": w * 0, "n": jnp.zeros(3, jnp.int32)}
    restored = manager.restore(target, cast="a")
    assert restored.state["a"].tolist() == w.astype(jnp.bfloat16).tolist()
    assert restored.report.cast == ("a",) and str(restored.report) == "3 loaded, 1 cast"
    for cast in (False, "b", ["n", "*/a"]):
        with pytest.raises(ckpt.CheckpointMismatchError, match="dtype    a"):
            manager.restore(target, cast=cast)
    with pytest.raises(ckpt.CheckpointMismatchError, match="shape    b"):
        manager.restore({**target, "b": jnp.zeros(6)}, cast=True)


def test_missing_and_extra_leaves(manager: ckpt.CheckpointManager) -> None:
    save(manager, {"body": {"w": jnp.ones(3)}, "old_head": {"w": jnp.ones(2), "b": jnp.ones(1)}})
    target = {"body": {"w": jnp.zeros(3)}, "head": {"w": jnp.full(5, 7.0)}}
    restored = manager.restore(target, missing="head", extra="old_head")
    assert restored.state["body"]["w"].tolist() == [1, 1, 1]
    assert restored.state["head"]["w"] is target["head"]["w"]
    assert restored.report.kept == ("head/w",)
    assert restored.report.ignored == ("old_head/b", "old_head/w")
    with pytest.raises(ckpt.CheckpointMismatchError) as caught:
        manager.restore(target, extra="*/b")
    assert [line.split()[:2] for line in caught.value.differences] == [
        ["missing", "head/w"], ["extra", "old_head/w"]]  # fmt: skip
    shapes = jax.eval_shape(lambda: target)
    with pytest.raises(ckpt.CheckpointMismatchError, match="no value to keep"):
        manager.restore(shapes, missing=True, extra=True)


def test_include_reads_a_part_and_keeps_the_rest(manager: ckpt.CheckpointManager) -> None:
    save(manager, {"params": {"a": jnp.ones(2), "b": jnp.ones(2)}, "opt": jnp.ones(4)})
    target = {"params": {"a": jnp.zeros(2), "b": jnp.zeros(2)}}
    restored = manager.restore(target, include="params/a")
    assert restored.state["params"]["a"].tolist() == [1, 1]
    assert restored.state["params"]["b"] is target["params"]["b"]
    host = manager.restore(include="params").state
    assert sorted(host) == ["params"] and isinstance(host["params"]["b"], np.ndarray)
    for given in (target, None):  # nothing would be read, and nobody told
        with pytest.raises(ckpt.CheckpointMismatchError, match="parms/a  no leaf has a path like"):
            manager.restore(given, include=["params/b", "parms/a"])
    host = manager.restore(rename={"params": "weights"}, include="weights/*").state
    assert sorted(host) == ["weights"]
    with pytest.raises(ckpt.CheckpointMismatchError, match="rename nothing no saved leaf"):
        manager.restore(rename={"nothing": "x"})


def test_renamed_leaves_with_their_optimizer_state(manager: ckpt.CheckpointManager) -> None:
    def state(outer: str, inner: str, fill: float) -> Any:
        params = {outer: {f"{inner}_{i}": {"w": jnp.full((2, 3), fill + i)} for i in range(2)}}
        return {"params": params, "opt": optax.adam(0.1).init(params)}

    save(manager, state("encoder", "Block", 1))
    target = state("backbone", "layers", 0)
    restored = manager.restore(target, rename={"encoder": "backbone", "Block_*": "layers_*"})
    assert restored.state["params"]["backbone"]["layers_1"]["w"][0, 0] == 2
    assert jax.tree.structure(restored.state) == jax.tree.structure(target)
    assert len(restored.report.renamed) == 6
    with pytest.raises(ckpt.CheckpointMismatchError, match="no saved leaf has it in its path"):
        manager.restore(target, rename={"encodr": "backbone"})
    with pytest.raises(ckpt.CheckpointMismatchError, match="both become it"):
        manager.restore(target, rename={"Block_0": "Block_1"})


def test_rules_see_the_saved_names_alone(manager: ckpt.CheckpointManager) -> None:
    """So two names can be swapped, and a chain of names moves up by one."""
    save(manager, {"params": {f"l_{i}": {"w": jnp.full(2, i)} for i in range(3)}, "none": None})
    target = {"l_1": {"w": jnp.zeros(2, int)}, "l_2": {"w": jnp.zeros(2, int)},
              "l_0": {"w": jnp.zeros(2, int)}}  # fmt: skip
    rules = {"l_0": "l_1", "l_1": "l_2", "l_2": "l_0", "params/*": "*"}
    got = manager.restore(target, rename=rules).state
    assert [int(got[f"l_{i}"]["w"][0]) for i in range(3)] == [2, 0, 1]
    assert manager.restore(rename={"params": "none"}, include="none/l_0").state.keys() == {"none"}
    for rule, why in (
        ({"params": ""}, "an empty component; 'params/"),
        ({"params": "p_*"}, "has more .* than it"),
        ({"parms": "p"}, "no saved leaf has it in its path; did you mean 'params'"),
        ({"params/l_0/w": "x", "params/l_1": "x"}, "params/l_1/w would be inside of params/l_0/w"),
    ):
        with pytest.raises(ckpt.CheckpointMismatchError, match=why):
            manager.restore(rename=rule)


def test_a_pattern_that_nothing_is_like_is_named(manager: ckpt.CheckpointManager) -> None:
    """Of every option: it would allow nothing, or read nothing, and nobody would hear of it."""
    state = {"params": {"bias": jnp.ones(2), "w": jnp.ones(2)}}
    save(manager, state | {"old": jnp.ones(1)})
    assert manager.restore(state, extra="old", cast="*/bias", missing="params/w").step == 1
    for option in ("cast", "missing", "extra", "include"):
        for given in (state, None):
            pattern = "parms/bais"
            with pytest.raises(ckpt.CheckpointMismatchError) as caught:
                manager.restore(given, **{"extra": "old", option: ["*", pattern]})
            (line,) = caught.value.differences
            assert line.split()[:2] == [option, pattern]
            assert line.endswith("did you mean 'params/bias'?")
    with pytest.raises(ckpt.CheckpointMismatchError, match="paths begin with old, params"):
        manager.restore(include="params", cast="qqq")


LAYERS = 3
KERNELS = np.arange(LAYERS * 4 * 5, dtype=np.float32).reshape(LAYERS, 4, 5)


def scanned(dim: int, fill: float = 1.0) -> Any:
    """One leaf of stacked layers, with the optimizer's."""
    value = jnp.asarray(np.moveaxis(KERNELS, 0, dim) * fill)
    names = ["embed", "mlp"]
    names.insert(dim, "layers")
    kernel = LogicallyPartitioned(value, tuple(names))
    params: Any = {"decoder": {"layers": {"kernel": kernel}}}
    return {"params": params, "opt": optax.sgd(0.1, momentum=0.9).init(params)}


def unrolled(fill: float = 1.0, as_list: bool = False) -> Any:
    """One leaf a layer."""
    layers = [{"kernel": jnp.asarray(KERNELS[i] * fill)} for i in range(LAYERS)]
    named = {"layers": layers} if as_list else {f"layers_{i}": x for i, x in enumerate(layers)}
    params = {"decoder": named}
    return {"params": params, "opt": optax.sgd(0.1, momentum=0.9).init(params)}


def equal(got: Any, want: Any) -> bool:
    return jax.tree.structure(got) == jax.tree.structure(want) and all(
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(got["params"]), jax.tree.leaves(want["params"]), strict=True
        )
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("as_list", [False, True], ids=["layers_0", "layers/0"])
def test_scanned_layers_become_unrolled_and_back(
    manager: ckpt.CheckpointManager, dim: int, as_list: bool
) -> None:
    save(manager, scanned(dim))
    restored = manager.restore(unrolled(0, as_list))
    assert equal(restored.state, unrolled(as_list=as_list))
    assert len(restored.report.restacked) == 2 * LAYERS
    manager.save(2, unrolled(as_list=as_list))
    restored = manager.restore(scanned(dim, fill=0))
    assert equal(restored.state, scanned(dim))
    assert len(restored.report.restacked) == 2


def test_layers_that_do_not_fit_are_differences(manager: ckpt.CheckpointManager) -> None:
    save(manager, scanned(0))
    target = unrolled(0)
    target["params"]["decoder"]["layers_3"] = {"kernel": jnp.zeros((4, 5))}
    with pytest.raises(ckpt.CheckpointMismatchError, match="missing  params/decoder/layers_3"):
        manager.restore(target)
    del target["params"]["decoder"]["layers_3"]
    target["params"]["decoder"]["layers_1"] = {"kernel": jnp.zeros((5, 4))}
    with pytest.raises(ckpt.CheckpointMismatchError, match="missing  params/decoder/layers_1"):
        manager.restore(target)


def test_without_a_target_all_comes_to_the_host(manager: ckpt.CheckpointManager) -> None:
    save(manager, {"a": {"w": jnp.ones((2, 2), jnp.bfloat16)}, "n": 3, "none": None, "s": "x",
                   "key": jax.random.key(0), "empty": jnp.zeros((0, 2))})  # fmt: skip
    state = manager.restore().state
    assert state["a"]["w"].dtype == jnp.bfloat16 and isinstance(state["a"]["w"], np.ndarray)
    assert (state["n"], state["none"], state["s"]) == (3, None, "x")
    assert state["key"].tolist() == [0, 0] and state["empty"].shape == (0, 2)


def test_the_step_with_the_best_metric_stays(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 4.0}
    with ckpt.CheckpointManager(tmp_path, keep=2, best="loss") as manager:
        assert manager.best_step() is None
        for step, loss in losses.items():
            extras = {"epoch": step}
            manager.save(step, {"n": step}, metrics={"loss": loss}, process_extras=extras)
        manager.wait()
        assert (manager.all_steps(), manager.best_step()) == ([2, 4, 5], 2)
    with ckpt.CheckpointManager(tmp_path, keep=1, best="loss", best_is_max=True) as manager:
        assert manager.best_step() == 4
        restored = manager.restore({"n": 0}, step=2)
        assert restored.metrics == {"loss": 1.0} and restored.process_extras == ({"epoch": 2},)
        manager.save(6, {"n": 6})
        manager.wait()
        assert manager.all_steps() == [4, 6]


def test_staging_is_bounded_and_lets_one_large_leaf_pass(tmp_path: Path) -> None:
    state = {f"w{i}": np.full((300, 1000), i, np.float32) for i in range(4)}
    with ckpt.CheckpointManager(tmp_path, staging=1000) as manager:
        handle = manager.save(1, state)
        assert handle is not None
        handle.committed.result()
        assert handle.staged.done()
        restored = manager.restore(state)
    assert all((restored.state[k] == state[k]).all() for k in state)
