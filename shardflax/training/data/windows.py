"""A corpus cut into windows, of which some are held out for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from shardflax.training.data.corpus import Corpus
from shardflax.training.data.errors import ShortCorpusError

__all__ = ["Windows"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `seq_len + 1` tokens: the inputs, and the same one token later as targets.

    Neighbours share one token, so that each token of the corpus but the first is predicted once.
    Every `every`-th window is held out: `part` says which of the two parts this is.  What is left
    over at the end of the corpus and fills no window is not used.

    >>> corpus = Corpus.of("alphabet", ["abcdefghijklm"])
    >>> train = Windows(corpus, seq_len=4, every=3)
    >>> [bytes(w) for w in train]
    [b'abcde', b'efghi']
    >>> [bytes(w) for w in train.held_out()]
    [b'ijklm']
    """

    corpus: Corpus
    seq_len: int
    every: int = 64
    part: Literal["train", "held_out"] = "train"
    _numbers: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.every < 2:
            raise ValueError(
                f"expected seq_len >= 1 and every >= 2, found {self.seq_len} and {self.every}"
            )
        found = (len(self.corpus.tokens) - 1) // self.seq_len
        if found < 2:
            needed = 2 * self.seq_len + 1
            raise ShortCorpusError(
                self.corpus.name,
                f"a window to train on and one to hold out take {needed} tokens with "
                f"seq_len={self.seq_len}",
                f"{len(self.corpus.tokens)} tokens",
            )
        numbers = np.arange(found)
        out = numbers % (every := min(self.every, found)) == every - 1
        object.__setattr__(self, "_numbers", numbers[out if self.part == "held_out" else ~out])

    def held_out(self) -> Windows:
        """The windows that are not trained on."""
        return Windows(self.corpus, self.seq_len, self.every, "held_out")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        """Window `index` of this part: uint8, shape (seq_len + 1,)."""
        start = int(self._numbers[index]) * self.seq_len
        return self.corpus.tokens[start : start + self.seq_len + 1]
