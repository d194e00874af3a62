"""`Embed`: rows of a table by integer id, and its transpose as an output projection."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardflax import partitioning
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import dtypes, initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn.errors import (
    EmbedLookupError,
    InputDtypeError,
    InputRankError,
    InputShapeError,
    where,
)
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Dtype, Initializer, Names
from shardflax.partitioning import default_names
from shardflax.partitioning.alike import laid_out_like
from shardflax.partitioning.explicit_out import explicit_axes
from shardflax.partitioning.spec_check import spec_axes

__all__ = ["Embed"]

_ROWS = default_names("batch", "length", "act_embed")


class Embed(LayerBase):
    """A table of `num_embeddings` rows of `features`, looked up by integer ids.

    Ids `(...)` give `(..., features)` in `dtype`, by default the table's.  Negative ids count
    from the end; ids out of range give NaN.  Ids that are not integers are an `InputDtypeError`, a
    `lookup` of another name an `EmbedLookupError`.

    `lookup="gather"` indexes the table, `lookup="one_hot"` multiplies it by one-hot rows: the
    same numbers (up to the precision of the product), which a table sharded over its vocabulary
    computes as a local product and a sum instead of a gather of rows from other devices.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> table = nn.Embed(num_embeddings=5, features=3)
    >>> ids = jnp.array([[0, 4]])
    >>> y, variables = table.init_with_output(jax.random.key(0), ids)
    >>> y.shape
    (1, 2, 3)
    >>> table.apply(variables, y, method="attend").shape
    (1, 2, 5)
    """

    num_embeddings: int
    features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    embedding_init: Initializer = initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    promote_dtype: Any = dtypes.promote_dtype
    lookup: Literal["gather", "one_hot"] = field(default="gather", kw_only=True)
    embedding_axes: Names = field(default=default_names("vocab", "vocab_embed"), kw_only=True)
    out_axes: Names | None = field(default=names.RESIDUAL, kw_only=True)
    attend_axes: Names | None = field(
        default=default_names("vocab_batch", ..., "act_vocab"), kw_only=True
    )

    def setup(self) -> None:
        check_sizes(self, num_embeddings=self.num_embeddings, features=self.features)
        self.embedding = self.param(
            "embedding",
            partitioning.named(self.embedding_init, self.embedding_axes),
            (self.num_embeddings, self.features),
            self.param_dtype,
        )

    def __call__(self, inputs: Array) -> Array:
        ids = jnp.asarray(inputs)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputDtypeError(where(self), "an integer", ids.dtype)
        if self.lookup not in ("gather", "one_hot"):
            raise EmbedLookupError(where(self), self.lookup)
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        if self.num_embeddings == 1:
            # Linen's answer: a single row is every row, whatever the id.
            y = jnp.broadcast_to(jnp.squeeze(table, 0), (*ids.shape, self.features))
        elif self.lookup == "one_hot":
            stored = weights.stored_names(self.embedding_init, self.embedding_axes)
            y = weights.product(_one_hot_rows, ids, table, stored, self._rows(ids))
        else:
            stored = weights.stored_names(self.embedding_init, self.embedding_axes)
            spec = self._rows(ids).spec(ids, table, stored)
            y = _gathered(partitioning.at_use(table, stored), ids, spec)
        return names.output(names.output(y, self._looked_up()), self.out_axes)

    def attend(self, query: Array) -> Array:
        """Scores of `query` `(..., features)` against every row: `(..., num_embeddings)`."""
        if jnp.ndim(query) == 0:
            raise InputRankError(where(self), "query", "at least 1 dim", ())
        if jnp.shape(query)[-1] != self.features:
            raise InputShapeError(
                where(self),
                "query",
                dim=-1,
                expected=self.features,
                found=jnp.shape(query)[-1],
                why="`features`",
            )
        query, table = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        stored = weights.stored_names(self.embedding_init, self.embedding_axes)
        mapped = tuple(range(query.ndim - 1))
        dims = weights.Contraction((*mapped, "d"), "vd", (*mapped, "v"), self.attend_axes)
        return names.output(weights.product(_scores, query, table, stored, dims), self.attend_axes)

    def _rows(self, ids: Array) -> weights.Contraction:
        """The dims of a lookup: each id is replaced by the dim of a row."""
        mapped = tuple(range(ids.ndim))
        return weights.Contraction(mapped, "vd", (*mapped, "d"), self._looked_up())

    def _looked_up(self) -> Names | None:
        """How rows are laid out first: the length of the residual stream may lie over `tensor`,
        as the vocabulary does, and no device then has what it needs: XLA gathers the table.
        """
        return _ROWS if names.is_default(self.out_axes) else self.out_axes


def _scores(query: Array, table: Array, out_sharding: Any = None) -> Array:
    return jnp.dot(query, table.T, out_sharding=out_sharding)


def _gathered(table: Array, ids: Array, out_sharding: Any) -> Array:
    """Rows of `table`: NaN for ids outside of it (or the least integer)."""
    if out_sharding is None:
        return jnp.take(table, ids, axis=0)
    return table.at[ids].get(mode="fill", out_sharding=out_sharding)


def _one_hot_rows(ids: Array, table: Array, out_sharding: Any = None) -> Array:
    """Rows of `table` as a product, with the gather's answers for ids outside of it."""
    count = table.shape[0]
    ids = jnp.where(ids < 0, ids + count, ids)
    one_hot = _cut_as(table, jax.nn.one_hot(ids, count, dtype=table.dtype))
    rows = jnp.matmul(one_hot, table, out_sharding=out_sharding)
    if not jnp.issubdtype(table.dtype, jnp.inexact):
        return rows
    inside = (ids >= 0) & (ids < count)
    inside = laid_out_like(inside, rows)
    return jnp.where(inside[..., None], rows, jnp.asarray(jnp.nan, table.dtype))


def _cut_as(table: Array, one_hot: Array) -> Array:
    """One-hot rows cut as the vocabulary is: on explicit axes JAX would gather the table."""
    if not explicit_axes():
        return one_hot
    of_table, spec = (jax.typeof(x).sharding.spec for x in (table, one_hot))
    taken = {axis for entry in spec for axis in spec_axes(entry)}
    if taken & {*spec_axes(of_table[0])}:
        return one_hot
    return jax.sharding.reshard(one_hot, PartitionSpec(*spec[:-1], of_table[0]))
