"""Small leaves that are alike are copied many at once: when, and that they stay what they are."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax import ckpt
from shardflax.ckpt import packing
from shardflax.ckpt.packing import MANY, Row
from shardflax.ckpt.plan import Plan, make_plan
from shardflax.ckpt.staging import Staged, stage


def placed(value: Any, *spec: Any, explicit: bool = False) -> jax.Array:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


def bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """All that a dtype can hold, signalling NaNs too."""
    size = jnp.dtype(dtype).itemsize * int(np.prod(shape))
    return np.frombuffer(np.random.default_rng(seed).bytes(size), jnp.dtype(dtype)).reshape(shape)


def many(count: int, dtype: str, shape: tuple[int, ...], *spec: Any) -> list[jax.Array]:
    return [placed(bits(dtype, shape, n), *spec) for n in range(count)]


def a_state() -> dict[str, Any]:
    return {
        "w": many(MANY + 20, "float32", (4, 8), "a", "b"),
        "half": many(MANY, "bfloat16", (8,), ("b", "a")),
        "tiny": many(MANY + 3, "float8_e4m3fn", (3, 4), None, "b"),
        "steps": many(MANY, "int32", (), *()),
        "alone": [jnp.arange(n) for n in range(1, 4)],
        "host": np.arange(5),
        "n": 3,
    }


def packed(staged: list[Staged]) -> set[int]:
    """The leaves that were packed."""
    return {x.lot.leaf for x in staged if any(isinstance(value, Row) for value in x.values)}


def staged_of(plan: Plan, leaves: list[Any]) -> list[Staged]:
    return [staged for parcel in plan.parcels for staged in stage(parcel, leaves)]


def same(x: Any, y: Any) -> bool:
    return np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_from_the_third_save_on_they_are_packed_and_stay_what_they_are(tmp_path: Path) -> None:
    state = a_state()
    want = jax.tree.map(np.array, state)
    donate = jax.jit(lambda x: jax.tree.map(lambda a: a ^ a, x), donate_argnums=0)
    made: list[bool] = []
    with ckpt.CheckpointManager(tmp_path, keep=None) as manager:
        for step in range(1, 4):
            plan, _ = make_plan(state) if step > 1 else (None, None)
            manager.save(step, state)
            if step == 3:
                words = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in state["w"]]
                donate(words)
                donate(state["steps"])
                assert all(x.is_deleted() for x in state["steps"])
            manager.wait()
            made.append(plan is not None and all(kind.program for kind in plan.kinds))
        restored = manager.restore(step=3).state
    assert made == [False, True, True] and plan is not None and len(plan.kinds) == 4
    for name in ("w", "half", "tiny", "steps", "alone"):
        assert all(same(restored[name][str(i)], x) for i, x in enumerate(want[name])), name


def test_what_is_packed_outlives_a_donation() -> None:
    state = a_state()
    make_plan(state)
    plan, leaves = make_plan(state)
    plan.prepare()
    want = [np.array(x) for x in leaves]
    staged = staged_of(plan, leaves)
    # Of 52, those that are left over are still enough for a pack; of 35, they are not.
    assert len(packed(staged)) == (MANY + 20) + MANY + MANY + MANY
    jax.block_until_ready(
        jax.jit(lambda x: [a * 0 for a in x], donate_argnums=0)(state["steps"] + state["half"])
    )
    for item in staged:
        item.ready()
        one = item.lot.leaf in packed([item])
        assert item.moving is one
        boxes = [item.lot.box] if one else [piece.box for piece in item.lot.pieces]
        for box, array in zip(boxes, item.arrays(), strict=True):
            assert array.dtype == want[item.lot.leaf].dtype
            assert same(array, want[item.lot.leaf][box.slices])


def unlike() -> dict[str, list[Any]]:
    """Leaves of which there are many, and that are not packed."""
    one = jax.devices()[0]
    pinned = jax.sharding.SingleDeviceSharding(one, memory_kind="pinned_host")
    return {
        "bool": many(1, "bool", (4,)) * MANY,
        "int4": [jnp.zeros(4, jnp.int4)] * MANY,
        "keys": [jax.random.key(0)] * MANY,
        "numpy": [np.zeros(4, np.float32)] * MANY,
        "large": [jnp.zeros((1 << 14) + 1)] * MANY,
        "few": [jnp.zeros(4)] * (MANY - 1),
        "elsewhere": [jax.device_put(jnp.zeros(4), pinned)] * MANY,
        "python": [1.0] * MANY,
    }


def test_what_is_not_packed() -> None:
    for name, leaves in unlike().items():
        assert packing.kinds(leaves) == [None] * len(leaves), name
    explicit = [placed(np.zeros((4, 8)), "a", "b", explicit=True)] * MANY
    kind = packing.kinds(explicit)[0]
    assert kind is not None
    kind.compile()
    assert kind.program is not None and kind.program(explicit).shape == (MANY, 4, 8)


def test_a_program_that_does_not_take_them_or_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = [jnp.full((2, 3), n) for n in range(MANY)]
    plan, leaves = make_plan(state)
    (kind,) = plan.kinds

    def refuses(leaves: Any) -> Any:
        raise ValueError("another layout in memory")

    kind.program = refuses
    staged = staged_of(plan, leaves)
    assert not packed(staged) and all(same(x.arrays()[0], leaves[x.lot.leaf]) for x in staged)
    kind.program = None
    monkeypatch.setattr(packing, "_program", refuses)
    kind.compile()
    assert kind.failed and kind.program is None
    kind.failed = False


def test_debugging_modes_see_nothing_of_it() -> None:
    leaves = [jnp.full(2, jnp.nan)] * MANY
    kind = packing.kinds(leaves)[0]
    assert kind is not None
    kind.compile()
    assert kind.program is not None
    with jax.debug_nans(True):
        [(found, members)], rest = packing.pack(leaves, lambda _: kind, lambda x: x)
    assert len(members) == MANY and not rest
    assert same(found.rows, np.stack([np.asarray(x) for x in leaves]))
    with jax.disable_jit(), jax.transfer_guard("disallow"):  # no program runs: one by one
        assert packing.pack(leaves, lambda _: kind, lambda x: x) == ([], leaves)
