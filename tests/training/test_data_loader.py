"""Windows, layouts and the loader on one process."""

from __future__ import annotations

import itertools
import json
import threading

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from shardflax.training.data import (
    BatchLayout,
    BatchLayoutError,
    Corpus,
    DataStateError,
    Loader,
    ShortCorpusError,
    Windows,
    held_out_batches,
)

SEQ = 8
CORPUS = Corpus.of("digits", [f"document {i} " * 5 for i in range(100)])
P = jax.P


def mesh_of(**axes: int) -> Mesh:
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def layout(global_batch: int = 8, spec: P | None = None, **axes: int) -> BatchLayout:
    mesh = mesh_of(**(axes or {"data": 8}))
    return BatchLayout(global_batch, SEQ, NamedSharding(mesh, P("data") if spec is None else spec))


def loader(**kw: object) -> Loader:
    return Loader(Windows(CORPUS, SEQ), layout(), **kw)  # pyright: ignore[reportArgumentType]


def take(batches: Loader, n: int) -> np.ndarray:
    """The inputs of `n` batches: (n, global_batch, seq_len)."""
    return np.stack([np.asarray(b["inputs"]) for b in itertools.islice(batches, n)])


# Windows


@given(st.integers(1, 60), st.integers(2, 9), st.integers(20, 200))
def test_windows_predict_each_token_once(seq_len: int, every: int, length: int) -> None:
    corpus = Corpus.of("count", [bytes(1 + i % 255 for i in range(length))])
    if len(corpus.tokens) < 2 * seq_len + 1:
        with pytest.raises(ShortCorpusError, match=f"take {2 * seq_len + 1} tokens"):
            Windows(corpus, seq_len, every)
        return
    train = Windows(corpus, seq_len, every)
    windows = [*train, *train.held_out()]
    assert len(train) > 0
    assert len(train.held_out()) > 0
    assert all(w.shape == (seq_len + 1,) for w in windows)
    starts = sorted(int(w.__array_interface__["data"][0]) for w in windows)
    base = int(corpus.tokens.__array_interface__["data"][0])
    assert [s - base for s in starts] == list(range(0, len(windows) * seq_len, seq_len))
    assert len(corpus.tokens) - 1 - len(windows) * seq_len < seq_len


def test_windows_refuse_senseless_sizes() -> None:
    with pytest.raises(ValueError, match="expected seq_len >= 1 and every >= 2, found 0 and 64"):
        Windows(CORPUS, 0)
    with pytest.raises(ValueError, match="found 8 and 1"):
        Windows(CORPUS, 8, every=1)


# Layouts


@pytest.mark.parametrize(
    ("batch", "seq_len", "spec", "message"),
    [
        (6, 8, P("data"), r"global_batch=6: expected a multiple of 4 \(data=4\); write 4 or 8"),
        (4, 8, P(("data", "fsdp")), r"multiple of 8 \(data=4 x fsdp=2\); write 8"),
        (8, 7, P("data", "fsdp"), r"seq_len=7: expected a multiple of 2 \(fsdp=2\)"),
        (0, 8, P("data"), r"global_batch=0: expected a multiple of 4"),
        (0, 8, P(), r"global_batch=0: expected a number from 1; write 1"),
    ],
)
def test_batches_that_the_mesh_does_not_divide(
    batch: int, seq_len: int, spec: P, message: str
) -> None:
    sharding = NamedSharding(mesh_of(data=4, fsdp=2), spec)
    with pytest.raises(BatchLayoutError, match=message):
        BatchLayout(batch, seq_len, sharding)


def test_a_layout_has_two_dims() -> None:
    with pytest.raises(ValueError, match=r"\(batch, length\)"):
        layout(8, P("data", None, None))


@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        (P(), {"data": 8}),
        (P("data"), {"data": 8}),
        (P(("data", "fsdp")), {"data": 2, "fsdp": 2, "tensor": 2}),
        (P("data", "context"), {"data": 2, "context": 4}),
        (P(("fsdp", "data"), None), {"data": 2, "fsdp": 4}),
        (P(None, ("a", "b")), {"a": 2, "b": 4}),
    ],
)
def test_any_layout_holds_the_same_numbers(spec: P, axes: dict[str, int]) -> None:
    windows = np.arange(8 * (SEQ + 1), dtype=np.uint8).reshape(8, SEQ + 1)
    placed = layout(8, spec, **axes)
    batch = placed.assemble(placed.rows, windows)
    for name, expected in (("inputs", windows[:, :-1]), ("targets", windows[:, 1:])):
        assert batch[name].dtype == np.int32
        assert batch[name].sharding == placed.sharding
        np.testing.assert_array_equal(batch[name], expected)


# The loader


def test_targets_are_inputs_one_later() -> None:
    batch = next(loader())
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_each_epoch_has_each_window_once_in_another_order() -> None:
    windows = Windows(CORPUS, SEQ)
    epoch = len(windows)
    rows = take(loader(), 2 * epoch // 8 + 1).reshape(-1, SEQ)
    expected = sorted(w[:-1].tolist() for w in windows)
    first, second = rows[:epoch].tolist(), rows[epoch : 2 * epoch].tolist()
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert first != [w[:-1].tolist() for w in windows]


def test_held_out_windows_are_never_trained_on() -> None:
    text = b"".join(b"%07d " % i for i in range(1000))  # each window of its own content
    windows = Windows(Corpus.of("unique", [text]), SEQ, every=10)
    trained = Loader(windows, layout())
    seen = {row.tobytes() for row in take(trained, len(windows) // 8 + 1).reshape(-1, SEQ)}
    held = list(held_out_batches(windows, layout(), limit=100))
    assert len(held) == len(windows.held_out()) // 8 > 0
    assert not seen & {row.tobytes() for b in held for row in np.asarray(b["inputs"])}


def test_held_out_batches_are_the_same_each_time_and_limited() -> None:
    windows = Windows(CORPUS, SEQ, every=4)
    one, two = (list(held_out_batches(windows, layout(), limit=2)) for _ in range(2))
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])


def test_too_few_windows_to_hold_out_are_named() -> None:
    with pytest.raises(ShortCorpusError, match=r"one batch of 1024 held-out windows .*found \d+"):
        held_out_batches(Windows(CORPUS, SEQ), layout(1024), limit=1)


def test_seeds_differ_and_repeat() -> None:
    a, again, b = (take(loader(seed=s), 4) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


def test_neighbouring_seeds_share_no_epoch() -> None:
    epoch = len(Windows(CORPUS, SEQ)) // 8 * 8
    rows = take(loader(seed=0), 2 * epoch // 8 + 1).reshape(-1, SEQ)
    second_epoch = rows[len(Windows(CORPUS, SEQ)) :][:64]
    assert (take(loader(seed=1), 8).reshape(-1, SEQ) != second_epoch).any()


def test_the_order_does_not_depend_on_the_mesh() -> None:
    layouts = [
        layout(8, P("data"), data=8),
        layout(8, P(("data", "fsdp")), data=2, fsdp=2, tensor=2),
        layout(8, P("data", "context"), data=2, context=4),
        layout(8, P(), tensor=8),
    ]
    results = [take(Loader(Windows(CORPUS, SEQ), each, seed=3), 5) for each in layouts]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_the_state_is_that_of_the_last_batch_handed_out(prefetch: int) -> None:
    reference = take(loader(), 9)
    reader = loader(prefetch=prefetch)
    for k in range(6):
        assert reader.get_state()["batches"] == k
        np.testing.assert_array_equal(take(reader, 1)[0], reference[k])
    state = json.loads(json.dumps(reader.get_state()))
    restored = loader(prefetch=2)
    restored.set_state(state)
    assert restored.get_state() == state
    np.testing.assert_array_equal(take(restored, 3), reference[6:])
    restored.set_state({**state, "batches": 1})  # back, with batches read ahead
    np.testing.assert_array_equal(take(restored, 3), reference[1:4])


def test_a_state_many_epochs_on_is_reached_at_once() -> None:
    reader = loader()
    reader.set_state({**reader.get_state(), "batches": 10**9})
    assert next(reader)["inputs"].shape == (8, SEQ)
    assert reader.get_state()["batches"] == 10**9 + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"seed: expected 0 \(this run's\), found 7 \(saved\)"),
        ({"global_batch": 16}, "global_batch: expected 8 .* found 16"),
        ({"seq_len": 9}, "seq_len: expected 8 .* found 9"),
        ({"corpus": "0" * 16}, "corpus: .* found '0000000000000000'"),
        ({"held_out_every": 3}, "held_out_every: expected 64 .* found 3"),
        ({"format": 2}, "format: expected 1 .* found 2"),
        ({"batches": -1}, "batches: .* found -1"),
        ({"batches": None}, "batches: .* found None"),
        ({"extra": 1}, "extra: expected None .* found 1"),
        ({"seed": 7, "seq_len": 9}, "seed: .*; seq_len: |seq_len: .*; seed: "),
    ],
)
def test_the_state_of_other_data_is_refused(change: dict[str, object], message: str) -> None:
    reader = loader()
    reference = take(reader, 1)
    with pytest.raises(DataStateError, match=message) as caught:
        reader.set_state({**reader.get_state(), **change})
    assert set(caught.value.differences) == set(change)
    np.testing.assert_array_equal(take(loader(), 1), reference)
    assert reader.get_state()["batches"] == 1  # a refused state changes nothing


def test_windows_and_layout_must_agree() -> None:
    with pytest.raises(ValueError, match="seq_len=8, found seq_len=16"):
        Loader(Windows(CORPUS, 16), layout())


def test_close_ends_the_thread() -> None:
    others = set(threading.enumerate())
    reader = loader()
    next(reader)
    mine = [t for t in threading.enumerate() if "grain" in t.name and t not in others]
    assert mine
    reader.close()
    for thread in mine:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in mine)
