"""Real text as batches: corpora, byte tokens, and a loader that any mesh reads alike."""

from shardflax.training.data.corpus import Corpus, open_corpus
from shardflax.training.data.errors import (
    BatchLayoutError,
    CorpusMismatchError,
    DataError,
    DataStateError,
    EmptyCorpusError,
    InvalidRecordError,
    MissingExtraError,
    MissingFieldError,
    ShortCorpusError,
    UndecodableTextError,
    UnreadableFileError,
)
from shardflax.training.data.loader import Loader, held_out_batches
from shardflax.training.data.readers import read_documents
from shardflax.training.data.rows import Batch, BatchLayout
from shardflax.training.data.tokens import SEPARATOR, VOCAB_SIZE, decode, encode, join, unigram_loss
from shardflax.training.data.windows import Windows

__all__ = [
    "SEPARATOR",
    "VOCAB_SIZE",
    "Batch",
    "BatchLayout",
    "BatchLayoutError",
    "Corpus",
    "CorpusMismatchError",
    "DataError",
    "DataStateError",
    "EmptyCorpusError",
    "InvalidRecordError",
    "Loader",
    "MissingExtraError",
    "MissingFieldError",
    "ShortCorpusError",
    "UndecodableTextError",
    "UnreadableFileError",
    "Windows",
    "decode",
    "encode",
    "held_out_batches",
    "join",
    "open_corpus",
    "read_documents",
    "unigram_loss",
]
