"""Checkpoints of Orbax and for Orbax: its standard and its new API, every format that it writes."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1

from shardflax import ckpt
from shardflax.partitioning import LogicallyPartitioned

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Orbax logs a lot."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def spread(value: Any, *spec: Any) -> jax.Array:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


def state() -> dict[str, Any]:
    """What both can hold: sharded, large and small, odd dtypes, an optimizer's, a key, scalars."""
    params = {
        "w": spread(jnp.arange(64.0).reshape(8, 8), "a", "b"),
        "half": jnp.ones(3, "bfloat16"),
    }
    return {
        "params": params,
        "opt": optax.adam(0.1).init(params),
        "large": spread(np.arange(2**19, dtype=np.float32).reshape(512, 1024), "b", "a"),
        "int4": jnp.arange(3, dtype=jnp.int4),
        "fp8": jnp.ones(2, jnp.float8_e4m3fn),
        "complex": jnp.ones(2, jnp.complex64) * 1j,
        "key": jax.random.key(3),
        "step": 5,
    }


def bits(tree: Any) -> list[tuple[Any, ...]]:
    """Dtype, shape and bytes of each leaf; keys as their words."""
    found: list[tuple[Any, ...]] = []
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        found.append((array.dtype.name, array.shape, array.tobytes()))
    return found


def nested(tree: Any) -> Any:
    """Nested dicts, as Orbax gives back what it has no target for."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    out: dict[str, Any] = {}
    for keys, leaf in paths:
        node = out
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None)))) for k in keys]
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = leaf
    return out


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of ours."""
    root = tmp_path_factory.mktemp("ours")
    with ckpt.CheckpointManager(root) as manager:
        manager.save(5, state() | {"name": "mlp"}, extras={"seen": 3})
    return root


READERS: dict[str, Callable[[Path], Any]] = {
    "PyTreeCheckpointer": lambda root: ocp.PyTreeCheckpointer().restore(root / "5/state"),
    "StandardCheckpointer": lambda root: ocp.StandardCheckpointer().restore(root / "5/state"),
    "v1.load_pytree": lambda root: v1.load_pytree(root / "5"),
    "v1.load_checkpointables": lambda root: v1.load_checkpointables(str(root / "5"))["state"],
}


@pytest.mark.parametrize("reader", READERS)
def test_orbax_reads_ours_without_a_target(ours: Path, reader: str) -> None:
    found = READERS[reader](ours)
    assert found.pop("name") == "mlp"
    assert bits(found) == bits(state())
    assert found["opt"][0]["count"] == 0 and found["opt"][1] is None  # as Orbax would have saved it


def test_orbax_reads_ours_into_a_layout(ours: Path) -> None:
    want = {"large": spread(np.asarray(state()["large"]), "a"), "key": jax.random.key(3)}
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state() | want) | {"name": ""}
    how = ocp.checkpoint_utils.construct_restore_args(target)
    arrays = ocp.args.PyTreeRestore(target, restore_args=how)
    args = {"state": arrays, "extras": ocp.args.JsonRestore()}
    with ocp.CheckpointManager(ours) as manager:
        got = manager.restore(5, args=ocp.args.Composite(**args))
    assert got["extras"] == {"seen": 3}
    assert got["state"]["large"].sharding == want["large"].sharding
    assert bits({k: got["state"][k] for k in want}) == bits(want)
    assert jax.tree.structure(got["state"]) == jax.tree.structure(target)


class Pair(NamedTuple):
    first: Any
    second: Any


def odd() -> dict[str, Any]:
    """Containers of every kind, with nothing in them, with None, and in each other."""
    w = jnp.arange(3.0)
    masked = optax.masked(optax.adam(0.1), {"w": True, "b": False}).init({"w": w, "b": w})
    return {
        "list": [None, w, [w, {"x": ({},)}]],
        "pair": Pair(w, Pair(None, 3)),
        "empty": {"dict": {}, "list": [], "tuple": (), "none": None, "named": optax.EmptyState()},
        "keys": (jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 2)),
        "masked": masked,
        "numbers": (jnp.float32(2), np.array(4), True, 2.5),
    }  # fmt: skip


def test_odd_trees_go_both_ways(tmp_path: Path) -> None:
    tree = odd()
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, tree)
    host = ocp.StandardCheckpointer().restore(tmp_path / "1/state")
    assert host["empty"] == {"dict": {}, "list": [], "tuple": (), "none": None, "named": None}
    for got in (
        ocp.StandardCheckpointer().restore(tmp_path / "1/state", tree),
        v1.load_checkpointables(str(tmp_path / "1"), {"state": tree})["state"],
    ):
        assert bits(got) == bits(tree) and jax.tree.structure(got) == jax.tree.structure(tree)
    for write in (by_v1, WRITERS["zarr2"]):
        write(tmp_path / "2", tree)
        got = ckpt.load_checkpoint(tmp_path / "2", tree).state
        assert bits(got) == bits(tree) and jax.tree.structure(got) == jax.tree.structure(tree)
        shutil.rmtree(tmp_path / "2")


def test_what_orbax_cannot_hold_does_not_spoil_the_rest(tmp_path: Path) -> None:
    """Arrays without elements (a list that lacks one is no list), complex numbers, half a pair of
    surrogates."""
    tree = {"list": [np.zeros((0, 2)), np.ones(2)], "complex": 1 + 2j, "text": "\ud83d", "s": "x"}
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, tree)
        restored = manager.restore(tree).state
    assert restored["text"] == tree["text"] and restored["complex"] == 1 + 2j
    for read in (ocp.StandardCheckpointer().restore, ocp.PyTreeCheckpointer().restore):
        got = read(tmp_path / "1/state")
        assert sorted(got) == ["complex", "list", "s"] and got["complex"] == 1 + 2j
        assert got["list"]["1"].tolist() == [1, 1]


def test_a_state_that_is_one_array(tmp_path: Path) -> None:
    x = jnp.arange(3)
    for n, write in enumerate((by_v1, WRITERS["ocdbt, zarr3"], WRITERS["zarr2"])):
        write(tmp_path / str(n), x)
        assert ckpt.load_checkpoint(tmp_path / str(n), x).state.tolist() == [0, 1, 2]
        assert ckpt.load_checkpoint(tmp_path / str(n)).state["value"].tolist() == [0, 1, 2]


def by_pytree(path: Path, tree: Any, **options: Any) -> None:
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(path, tree)


def by_standard(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def by_manager(path: Path, tree: Any) -> None:
    with ocp.CheckpointManager(path.parent) as manager:
        manager.save(int(path.name), args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()


def by_v1(path: Path, tree: Any) -> None:
    v1.save_pytree(path, tree)


WRITERS: dict[str, Callable[[Path, Any], None]] = {
    "ocdbt, zarr2": lambda p, t: by_pytree(p, t, use_ocdbt=True, use_zarr3=False),
    "ocdbt, zarr3": lambda p, t: by_pytree(p, t, use_ocdbt=True, use_zarr3=True),
    "zarr3": lambda p, t: by_pytree(p, t, use_ocdbt=False, use_zarr3=True),
    "zarr2": lambda p, t: by_pytree(p, t, use_ocdbt=False, use_zarr3=False),
    "StandardCheckpointer": by_standard,
    "CheckpointManager": by_manager,
    "v1": by_v1,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_ours_reads_orbaxs(tmp_path: Path, writer: str) -> None:
    WRITERS[writer](tmp_path / "7", state())
    with ckpt.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() == [7]
        restored = manager.restore(state())
    assert bits(restored.state) == bits(state())
    assert jax.tree.structure(restored.state) == jax.tree.structure(state())
    assert restored.state["large"].sharding == state()["large"].sharding
    host = ckpt.load_checkpoint(tmp_path / "7").state
    assert bits(host) == bits(nested(state()))
    with pytest.raises(ckpt.CheckpointMismatchError, match="missing  more"):
        ckpt.load_checkpoint(tmp_path / "7", state() | {"more": 1})


def test_several_trees_beside_each_other(tmp_path: Path) -> None:
    """Which of them is the state is said by its name, or by whoever reads it."""
    trees = {"model": {"w": jnp.arange(3.0)}, "moments": {"w": jnp.ones(3)}, "json": {"seen": 1}}
    v1.save_checkpointables(str(tmp_path / "7"), trees)
    with pytest.raises(ckpt.CheckpointReadError, match="several trees, json, model, moments"):
        ckpt.load_checkpoint(tmp_path / "7")
    for name in ("model", "moments"):
        assert bits(ckpt.load_checkpoint(tmp_path / "7" / name).state) == bits(trees[name])
    v1.save_checkpointables(str(tmp_path / "8"), {"state": trees["model"], "json": trees["json"]})
    got = ckpt.load_checkpoint(tmp_path / "8", {"w": jnp.zeros(3)})
    assert bits(got.state) == bits(trees["model"])


@pytest.mark.parametrize("writer", ["ocdbt, zarr2", "zarr3", "StandardCheckpointer", "v1"])
def test_boxes_that_orbax_saved_as_nodes_of_the_tree(tmp_path: Path, writer: str) -> None:
    kernel = jnp.arange(6.0).reshape(2, 3)
    boxed = {"w": meta.Partitioned(kernel, ("a", None)), "b": kernel}
    WRITERS[writer](tmp_path / "1", boxed)
    ours = {"w": LogicallyPartitioned(kernel * 0, ("a", None)), "b": kernel * 0}
    for target in ({"w": kernel * 0, "b": kernel * 0}, ours):
        got = ckpt.load_checkpoint(tmp_path / "1", target)
        assert bits(got.state) == bits({"w": kernel, "b": kernel})
        assert jax.tree.structure(got.state) == jax.tree.structure(target)


def test_boxes_of_ours_are_not_in_the_tree_that_orbax_reads(tmp_path: Path) -> None:
    kernel = jnp.arange(6.0).reshape(2, 3)
    with ckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": LogicallyPartitioned(kernel, ("a", None)), "b": kernel})
    for read in (ocp.StandardCheckpointer().restore, v1.load_pytree):
        path = tmp_path / "1" if read is v1.load_pytree else tmp_path / "1/state"
        assert bits(read(path)) == bits({"w": kernel, "b": kernel})
        target = {"w": kernel * 0, "b": kernel * 0}
        assert bits(read(path, target)) == bits({"w": kernel, "b": kernel})


def test_the_first_format_of_this_library_is_still_read(tmp_path: Path) -> None:
    """Written here as it was then: Orbax's items beside a manifest."""
    leaves = [
        {"path": ["w"], "kind": "array", "shape": [2, 3], "dtype": "float32"},
        {"path": ["empty"], "kind": "array", "shape": [0], "dtype": "int32"},
        {"path": ["key"], "kind": "key", "shape": [], "dtype": "key<fry>", "impl": "threefry2x32"},
        {"path": ["rate"], "kind": "python", "shape": [], "dtype": "complex", "value": [1.0, 2.0]},
        {"path": ["big"], "kind": "python", "shape": [], "dtype": "int", "value": 2**70},
    ]
    want = {
        "w": jnp.arange(6.0).reshape(2, 3), "empty": jnp.zeros(0, jnp.int32),
        "key": jax.random.key(4), "rate": 1 + 2j, "big": 2**70,
    }  # fmt: skip
    arrays = {"w": want["w"], "key": jax.random.key_data(want["key"]), "rate": np.array(1 + 2j)}
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False),
        manifest=ocp.JsonCheckpointHandler(filename="manifest.json"),
        extras=ocp.JsonCheckpointHandler(filename="extras.json"),
    )
    manifest = {"format": "shardflax.ckpt", "version": 1, "leaves": leaves}
    ocp.Checkpointer(handler).save(
        tmp_path / "3",
        args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            manifest=ocp.args.JsonSave(manifest),
            extras=ocp.args.JsonSave({"seen": 1}),
        ),
    )
    with ckpt.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(want)
    assert (restored.step, restored.extras) == (3, {"seen": 1})
    assert restored.state["rate"] == 1 + 2j and restored.state["big"] == 2**70
    arrays_of = [{k: t[k] for k in ("w", "empty", "key")} for t in (restored.state, want)]
    assert bits(arrays_of[0]) == bits(arrays_of[1])
    (tmp_path / "3/manifest/manifest.json").write_text(json.dumps(manifest | {"version": 9}))
    with pytest.raises(ckpt.CheckpointReadError, match="version 9"):
        ckpt.load_checkpoint(tmp_path / "3", want)
