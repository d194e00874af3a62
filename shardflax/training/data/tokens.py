"""Text as bytes: one token per byte of UTF-8, and byte 0 between documents."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["SEPARATOR", "VOCAB_SIZE", "decode", "encode", "join", "unigram_loss"]

VOCAB_SIZE = 256
SEPARATOR = 0


def encode(text: str) -> npt.NDArray[np.uint8]:
    """The tokens of a text: uint8, shape (bytes,).

    >>> encode("naïve").tolist()
    [110, 97, 195, 175, 118, 101]
    """
    return np.frombuffer(text.encode(), np.uint8)


def decode(tokens: npt.ArrayLike) -> str:
    r"""The text of some tokens, shape (n,), values 0..255.

    What is not UTF-8, such as a character cut at the end, becomes U+FFFD.

    >>> decode([110, 97, 195, 175, 118, 101])
    'naïve'
    >>> decode([104, 105, 0, 195])
    'hi\x00�'
    """
    return np.asarray(tokens).astype(np.uint8).tobytes().decode(errors="replace")


def join(documents: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """One stream of tokens, uint8, with a separator after each document.

    >>> join([b"ab", b"c"]).tolist()
    [97, 98, 0, 99, 0]
    """
    separator = bytes([SEPARATOR])
    return np.frombuffer(b"".join(d + separator for d in documents), np.uint8)


def unigram_loss(tokens: npt.ArrayLike) -> float:
    """The loss, in nats per token, of a model that knows only how frequent each token is.

    That is the entropy of the tokens' frequencies: -sum p log p (C. E. Shannon, "A Mathematical
    Theory of Communication", 1948).  A model that has learned something is below it.

    >>> round(unigram_loss([1, 1, 2, 2]), 6)  # a fair coin: log 2
    0.693147
    >>> unigram_loss([7, 7, 7])
    0.0
    """
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=VOCAB_SIZE)
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p))) + 0.0
