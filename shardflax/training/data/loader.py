"""Batches without end, in an order that does not depend on who reads them.

Example j of a run is window `order[j]`, where `order` goes through all windows once per epoch, each
epoch shuffled anew.  Row i of batch k is example `k * global_batch + i`: on any mesh, and for any
number of processes.  So the position is one number, k, and is the same for all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import grain
import jax
import numpy as np
import numpy.typing as npt

from shardflax.training.data.corpus import Corpus
from shardflax.training.data.errors import (
    CorpusMismatchError,
    DataStateError,
    ShortCorpusError,
)
from shardflax.training.data.rows import Batch, BatchLayout
from shardflax.training.data.windows import Windows

__all__ = ["Loader", "held_out_batches"]

_FORMAT = 1
_ENDLESS = 1 << 48  # batches


class _Examples(Protocol):
    """Windows by number."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class _ReadRows:
    """Some rows of batch k, as one array; runs on the prefetch thread."""

    order: grain.MapDataset[npt.NDArray[np.uint8]]
    layout: BatchLayout
    rows: tuple[int, ...]

    def __call__(self, k: int) -> npt.NDArray[np.uint8]:
        return _stack(self.order, self.layout, k, self.rows)


def _stack(
    examples: _Examples, layout: BatchLayout, k: int, rows: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """Rows of batch k; of shape (0, seq_len + 1) for a process that holds none."""
    local = [examples[k * layout.global_batch + row] for row in rows]
    return np.array(local, np.uint8).reshape(len(rows), layout.seq_len + 1)


class Loader(Iterator[Batch]):
    """Batches of training windows, shuffled per epoch, without end.

    Each process reads only the rows that its own devices hold, `prefetch` batches ahead on a
    background thread; each batch is one global array over all processes.  The same seed gives the
    same batches for any mesh and any number of processes.

    With several processes, raises `CorpusMismatchError` unless all have read the same corpus.

    >>> corpus = Corpus.of("numbers", [" ".join(map(str, range(1000)))])
    >>> mesh = jax.make_mesh((8,), ("data",))
    >>> layout = BatchLayout(8, 16, jax.NamedSharding(mesh, jax.P("data")))
    >>> loader = Loader(Windows(corpus, seq_len=16), layout, seed=0)
    >>> batch = next(loader)
    >>> batch["inputs"].shape, batch["inputs"].dtype
    ((8, 16), dtype('int32'))
    >>> state = loader.get_state()
    >>> batch = next(loader)
    >>> loader.set_state(state)
    >>> bool((next(loader)["inputs"] == batch["inputs"]).all())
    True
    >>> loader.close()
    """

    def __init__(
        self, windows: Windows, layout: BatchLayout, *, seed: int = 0, prefetch: int = 2
    ) -> None:
        if windows.seq_len != layout.seq_len:
            raise ValueError(
                f"expected windows of the layout's seq_len={layout.seq_len}, "
                f"found seq_len={windows.seq_len}"
            )
        _check_same_corpus(windows.corpus)
        self._layout, self._rows = layout, layout.rows
        self._identity: dict[str, Any] = {
            "format": _FORMAT,
            "corpus": windows.corpus.fingerprint,
            "seq_len": layout.seq_len,
            "held_out_every": windows.every,
            "global_batch": layout.global_batch,
            "seed": seed,
        }
        # grain adds the epoch to the seed; spread seeds so that 0 and 1 do not share epochs.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        order = grain.MapDataset.source(windows).shuffle(seed=spread).repeat()
        batches = grain.MapDataset.range(_ENDLESS).map(_ReadRows(order, layout, self._rows))
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        self._batches = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self._layout.assemble(self._rows, next(self._batches))

    def get_state(self) -> dict[str, Any]:
        """The position after the batch last handed out, and what it is a position in.

        A small dict for JSON, the same on every process; batches read ahead do not count.
        """
        return {**self._identity, "batches": int(self._batches.get_state()["next_index"])}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved position.

        Raises `DataStateError` if it was saved for another corpus, seq_len, batch or seed.
        """
        state = dict(state)
        batches = state.pop("batches", None)
        differences = {
            k: (self._identity.get(k), state.get(k))
            for k in sorted({*self._identity, *state})
            if self._identity.get(k) != state.get(k)
        }
        if not isinstance(batches, int) or not 0 <= batches <= _ENDLESS:
            differences["batches"] = ("a number from 0", batches)
        if differences:
            raise DataStateError(differences)
        self._batches.set_state({"next_index": batches})

    def close(self) -> None:
        """Ends the background thread; no batch can be had after it."""
        self._batches.close()


def held_out_batches(windows: Windows, layout: BatchLayout, limit: int) -> Iterator[Batch]:
    """At most `limit` batches of the held-out windows, in order; the same ones each time.

    Windows that fill no batch at the end are left out.  Raises `ShortCorpusError` if there are not
    enough of them for a single batch.

    >>> corpus = Corpus.of("numbers", [" ".join(map(str, range(1000)))])
    >>> mesh = jax.make_mesh((8,), ("data",))
    >>> layout = BatchLayout(8, 16, jax.NamedSharding(mesh, jax.P("data")))
    >>> len(list(held_out_batches(Windows(corpus, seq_len=16, every=8), layout, limit=10)))
    3
    """
    held_out = windows.held_out()
    count = min(limit, len(held_out) // layout.global_batch)
    if limit > 0 and count == 0:
        raise ShortCorpusError(
            windows.corpus.name,
            f"evaluation takes one batch of {layout.global_batch} held-out windows "
            f"(seq_len={layout.seq_len}, every {windows.every}th window)",
            f"{len(held_out)} of them; use a smaller batch, seq_len or `every`",
        )
    return _held_out(held_out, layout, count)


def _held_out(windows: Windows, layout: BatchLayout, count: int) -> Iterator[Batch]:
    rows = layout.rows
    for k in range(count):
        yield layout.assemble(rows, _stack(windows, layout, k, rows))


def _check_same_corpus(corpus: Corpus) -> None:
    """All processes compare fingerprints: a different Python has a different standard library."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = np.frombuffer(bytes.fromhex(corpus.fingerprint), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own))
    differing = [i for i in range(len(every)) if not np.array_equal(every[i], every[0])]
    if differing:
        raise CorpusMismatchError(corpus.name, differing)
