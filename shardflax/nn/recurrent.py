"""`RNN` runs a recurrent cell over a sequence; `Bidirectional` two, from both ends.

The cells are in this namespace too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.core import CollectionFilter, Module, compact, nowrap, scan
from shardflax.core.frozen_dict import FrozenDict
from shardflax.nn._manual import varying_axes
from shardflax.nn.errors import InputRankError, SequenceError, where
from shardflax.nn.recurrent_cells import GRUCell, MGUCell, RNNCellBase, SimpleCell
from shardflax.nn.recurrent_conv import ConvLSTMCell
from shardflax.nn.recurrent_lstm import LSTMCell, OptimizedLSTMCell
from shardflax.nn.types import Array
from shardflax.partitioning.explicit_out import InAuto, explicit_axes

__all__ = [
    "RNN",
    "Bidirectional",
    "ConvLSTMCell",
    "GRUCell",
    "LSTMCell",
    "MGUCell",
    "OptimizedLSTMCell",
    "RNNCellBase",
    "SharedParametersWarning",
    "SimpleCell",
    "flip_sequences",
]


class RNN(Module):
    """Runs `cell` over a sequence; its body is traced once, and compiled as a loop.

    Inputs `(*batch, time, *features)`, or `(time, *batch, *features)` with `time_major`, give the
    outputs of all steps in the same order; with `return_carry` a pair of the last carry and those.
    `seq_lengths` `(*batch)` says how many steps of each sequence count, at least one: the carry is
    then that of the last step that counts, while the outputs of the others are left as they are.

    With `reverse`, sequences run from their last step to their first (padding stays at the end),
    and the outputs are in the order of the run, or in that of the input with `keep_order`.

    The first carry is `initial_carry`, or else the cell's own, drawn from `init_key`.  The
    other fields are those of `nn.scan`.  Arguments of the call come before fields.  A cell with
    products in eight bits has a state for each step, so sequences are of one length:
    `variable_axes={"_overwrite_with_gradient": 0}`.

    Raises `InputRankError` for inputs without a time dim and `SequenceError` for `seq_lengths` of
    another shape than the batch, or that are not integers.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.RNN(nn.GRUCell(features=3)), jnp.ones((2, 7, 5))
    >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
    >>> run = lambda v: layer.apply(v, x, seq_lengths=jnp.array([7, 4]), return_carry=True)
    >>> carry, y = jax.jit(run)(variables)
    >>> y.shape, bool((carry[1] == y[1, 3]).all())
    ((2, 7, 3), True)
    """

    cell: Any
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    variable_axes: Mapping[CollectionFilter, Any] = FrozenDict()
    variable_broadcast: CollectionFilter = "params"
    variable_carry: CollectionFilter = False
    split_rngs: Mapping[CollectionFilter, bool] = FrozenDict({"params": False})

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        init_key: Array | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order

        batch_dims = self._batch_dims(inputs)
        time = 0 if time_major else batch_dims
        batch = tuple(n for d, n in enumerate(inputs.shape[: batch_dims + 1]) if d != time)
        _check_lengths(where(self), seq_lengths, batch)
        if reverse:
            inputs = flip_sequences(inputs, seq_lengths, batch_dims, time_major)
        if initial_carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            step = (*batch, *inputs.shape[batch_dims + 1 :])
            initial_carry = self.cell.initialize_carry(key, step)
        all_carries = return_carry and seq_lengths is not None
        initial_carry = jax.tree.map(partial(_varying_as, inputs), initial_carry)
        carry, (carries, outputs) = self._scan(inputs, initial_carry, time, all_carries)
        if reverse and keep_order:
            outputs = flip_sequences(outputs, seq_lengths, batch_dims, time_major)
        if all_carries:
            carry = _last_that_count(carries, seq_lengths)
        return (carry, outputs) if return_carry else outputs

    @nowrap
    def _batch_dims(self, inputs: Array) -> int:
        features = self.cell.num_feature_axes
        if jnp.ndim(inputs) <= features:
            raise InputRankError(
                where(self),
                "inputs",
                f"(*batch, time, *features) with {features} dims of features, as "
                f"{type(self.cell).__name__} has them",
                jnp.shape(inputs),
            )
        return jnp.ndim(inputs) - features - 1

    @nowrap
    def _scan(self, inputs: Array, carry: Any, time: int, all_carries: bool) -> Any:
        """The last carry, and what all steps gave: carries (if wanted) and outputs."""
        step = _step_with_carry if all_carries else _step
        run = scan(
            step,
            in_axes=time,
            out_axes=(0, time),
            unroll=self.unroll,
            variable_axes=self.variable_axes,
            variable_broadcast=self.variable_broadcast,
            variable_carry=self.variable_carry,
            split_rngs=self.split_rngs,
        )
        return run(self.cell, carry, _whole_in_time(inputs, time))


def _whole_in_time(inputs: Array, time: int) -> Array:
    """Steps come one after the other: on explicit axes a loop refuses to run over a spread dim."""
    if not explicit_axes():
        return inputs
    spec = [*jax.typeof(inputs).sharding.spec]
    if spec[time] is None:
        return inputs
    spec[time] = None
    return jax.sharding.reshard(inputs, jax.P(*spec))


def _step(cell: Any, carry: Any, x: Any) -> Any:
    after, y = cell(carry, x)
    return _laid_out_as(carry, after), (None, y)


def _step_with_carry(cell: Any, carry: Any, x: Any) -> Any:
    after, y = cell(carry, x)
    after = _laid_out_as(carry, after)
    return after, (after, y)


def _laid_out_as(before: Any, after: Any) -> Any:
    """A carry in the layout of the one before: on explicit axes it is a part of the type."""
    if not explicit_axes() or jax.tree.structure(before) != jax.tree.structure(after):
        return after

    def reshard(old: Any, new: Any) -> Any:
        spec = jax.typeof(old).sharding.spec
        same = jnp.ndim(old) != jnp.ndim(new) or jax.typeof(new).sharding.spec == spec
        return new if same else jax.sharding.reshard(new, spec)

    return jax.tree.map(reshard, before, after)


def _varying_as(inputs: Any, state: Any) -> Any:
    """Inside `shard_map`: a first carry that differs between devices where the inputs do.

    The carries that follow do, and a loop wants all of one type.
    """
    missing = tuple(sorted(varying_axes(inputs) - varying_axes(state)))
    return jax.lax.pcast(state, missing, to="varying") if missing else state


def _check_lengths(place: str, lengths: Any, batch: tuple[int, ...]) -> None:
    if lengths is None:
        return
    if jnp.shape(lengths) != batch:
        raise SequenceError(
            place,
            f"`seq_lengths` has shape {jnp.shape(lengths)}, the batch dims of the inputs are "
            f"{batch}: give one length for each sequence.",
        )
    found = jnp.asarray(lengths).dtype
    if not jnp.issubdtype(found, jnp.integer):
        raise SequenceError(place, f"`seq_lengths` must be integers, found {found}.")


def _last_that_count(carries: Any, lengths: Any) -> Any:
    """Of `(time, *batch, ...)`, for each sequence its last step: `(*batch, ...)`."""

    def last(x: Array, lengths: Array) -> Array:
        # Not by indices of the batch, which would be sent around where the batch is spread.
        # A length beyond the end (of what was cut off, say) means all steps, as in Linen.
        at = jnp.minimum(_wide(lengths), x.shape[0]) - 1
        at = jnp.reshape(at, (1, *lengths.shape, *(1,) * (x.ndim - lengths.ndim - 1)))
        return jnp.squeeze(jnp.take_along_axis(x, at, axis=0), 0)

    lengths = jnp.asarray(lengths)
    return jax.tree.map(lambda x: _gathered(last, x, lengths, without_time=True), carries)


def _gathered(fn: Any, x: Array, lengths: Array, without_time: bool = False) -> Array:
    """`fn(x, lengths)`; on explicit axes laid out as `x` is, its first dim perhaps gone."""
    if not explicit_axes():
        return fn(x, lengths)
    spec = jax.typeof(x).sharding.spec
    return InAuto(fn, jax.P(*spec[1:]) if without_time else spec)(x, lengths)


def _wide(lengths: Array) -> Array:
    """Lengths in a dtype that their sums fit into, and numbers below zero."""
    return lengths.astype(jnp.int32) if lengths.dtype.itemsize < 4 else lengths


def flip_sequences(
    inputs: Array, seq_lengths: Array | None, num_batch_dims: int, time_major: bool
) -> Array:
    """Sequences from their last step to their first; padding stays where it is, at the end.

    `inputs` is `(*batch, time, ...)`, or `(time, *batch, ...)` with `time_major`, with
    `num_batch_dims` batch dims; `seq_lengths` `(*batch)` or `None`, where all steps count.

    >>> import jax.numpy as jnp
    >>> flip_sequences(jnp.array([[1, 2, 3, 0, 0]]), jnp.array([3]), 1, False).tolist()
    [[3, 2, 1, 0, 0]]
    """
    time = 0 if time_major else num_batch_dims
    if seq_lengths is None:
        return jnp.flip(inputs, axis=time)

    def flip(inputs: Array, lengths: Array) -> Array:
        steps, lengths = inputs.shape[time], _wide(lengths)
        ends = jnp.expand_dims(lengths, time)
        backwards = jnp.arange(steps - 1, -1, -1, dtype=ends.dtype)
        order = [1] * ends.ndim
        order[time] = steps
        # Where the run has passed the first step, it goes on with the last one: the padding.
        at = (jnp.reshape(backwards, order) + ends) % steps
        at = jnp.expand_dims(at, tuple(range(at.ndim, inputs.ndim)))
        return jnp.take_along_axis(inputs, at, axis=time)

    return _gathered(flip, inputs, jnp.asarray(seq_lengths))


_SHARED = (
    "{}: forward_rnn and backward_rnn are one object, so both directions have the same parameters. "
    "Give two RNNs, or filter this warning if that is meant."
)


class SharedParametersWarning(UserWarning):
    """Two parts of a layer are one object: they have the same parameters.

    >>> import shardflax.nn as nn
    >>> from shardflax.nn.recurrent import SharedParametersWarning
    >>> issubclass(SharedParametersWarning, UserWarning)
    True
    """


def _concatenate(a: Array, b: Array) -> Array:
    """Joins the features of both directions."""
    return jnp.concatenate([a, b], axis=-1)


class Bidirectional(Module):
    """Runs `forward_rnn` from the start, `backward_rnn` from the end, and joins their outputs.

    Both are `RNN`s, or have their call.  `merge_fn` joins the outputs of each step; by default the
    features of both stand side by side.  Padding (`seq_lengths`) stays at the end.  With
    `return_carry` the result is a pair of both last carries, and the outputs; `initial_carry` is
    a pair too.  One `RNN` given for both directions shares its parameters between them, with a
    `SharedParametersWarning`: make two, unless that is meant.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.Bidirectional(nn.RNN(nn.GRUCell(3)), nn.RNN(nn.GRUCell(4)))
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 7, 5)))[0].shape
    (2, 7, 7)
    """

    forward_rnn: Any
    backward_rnn: Any
    merge_fn: Callable[[Array, Array], Array] = _concatenate
    time_major: bool = False
    return_carry: bool = False

    @compact
    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        init_key: Array | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """`reverse` and `keep_order` are there for the sake of the call of `RNN`, and ignored."""
        if self.forward_rnn is self.backward_rnn:
            warnings.warn(_SHARED.format(where(self)), SharedParametersWarning, stacklevel=2)
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        keys = (None, None) if init_key is None else jax.random.split(init_key)
        carries = (None, None) if initial_carry is None else initial_carry

        def run(rnn: Any, direction: int, backwards: bool) -> Any:
            return rnn(
                inputs,
                initial_carry=carries[direction],
                init_key=keys[direction],
                seq_lengths=seq_lengths,
                return_carry=True,
                time_major=time_major,
                reverse=backwards,
                keep_order=backwards,
            )

        forward, y = run(self.forward_rnn, 0, False)
        backward, z = run(self.backward_rnn, 1, True)
        outputs = jax.tree.map(self.merge_fn, y, z)
        return ((forward, backward), outputs) if return_carry else outputs
