"""Errors of the layers: one class per cause, each naming the module, the dim and both sizes.

They are also `ValueError`s (or `TypeError`s), as what Linen raises in these places is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardflax.core.errors import FlaxError, did_you_mean

__all__ = [
    "AttentionOptionsError",
    "AttentionShapeError",
    "AxesError",
    "CacheShapeError",
    "CarryShapeError",
    "ContainerError",
    "DropoutRateError",
    "DtypeError",
    "EinsumError",
    "EmbedLookupError",
    "EmptyParameterError",
    "GroupsError",
    "HeadsError",
    "InitializerError",
    "InputDtypeError",
    "InputRankError",
    "InputShapeError",
    "KernelMaskError",
    "MaskShapeError",
    "MergeParamError",
    "NNError",
    "PaddingError",
    "PolicyError",
    "RotaryError",
    "SequenceError",
    "SizeError",
    "WindowError",
    "where",
]


def where(module: Any) -> str:
    """How a message names a module: its class and its path.

    >>> import shardflax.nn as nn
    >>> where(nn.Dense(3))
    'Dense (unbound)'
    """
    kind = type(module).__name__
    if getattr(module, "scope", None) is None:
        return f"{kind} (unbound)"
    path = "/".join(module.path)
    return f"{kind} '{path}'" if path else f"{kind} (the root module)"


class NNError(FlaxError, ValueError):
    """The base of the errors of this package: what happened, and in which module.

    `place` is that module, or a text.

    >>> NNError("Dense 'mlp/up'", "something is wrong.").place
    "Dense 'mlp/up'"
    """

    def __init__(self, place: Any, message: str):
        self.place = place if isinstance(place, str) else where(place)
        super().__init__(f"{self.place}: {message}")


class InputRankError(NNError):
    """An input has fewer dims than the layer works on.

    >>> raise InputRankError("Dense 'mlp/up'", "inputs", "at least 1 dim", ())
    Traceback (most recent call last):
    shardflax.nn.errors.InputRankError: Dense 'mlp/up': inputs have shape () (0 dims), ...
    """

    def __init__(self, place: str, what: str, expected: str, shape: Sequence[int]):
        self.shape = tuple(shape)
        super().__init__(
            place,
            f"{what} have shape {self.shape} ({len(self.shape)} dims), expected {expected}.",
        )


class InputShapeError(NNError):
    """A dim of an input has another size than the layer was declared with.

    >>> raise InputShapeError("Embed", "query", dim=-1, expected=8, found=6, why="`features`")
    Traceback (most recent call last):
    shardflax.nn.errors.InputShapeError: Embed: dim -1 of query has size 6, expected 8 (`features`).
    """

    def __init__(self, place: str, what: str, *, dim: int, expected: int, found: int, why: str):
        self.dim, self.expected, self.found = dim, expected, found
        super().__init__(
            place, f"dim {dim} of {what} has size {found}, expected {expected} ({why})."
        )


class SizeError(NNError, TypeError):
    """A number of features, heads or rows is no whole number, or below zero.

    >>> raise SizeError("Dense 'mlp/up'", "features", None)
    Traceback (most recent call last):
    shardflax.nn.errors.SizeError: Dense 'mlp/up': features=None, expected a whole number of at ...
    """

    def __init__(self, place: str, field: str, found: Any):
        self.field, self.found = field, found
        super().__init__(place, f"{field}={found!r}, expected a whole number of at least 0.")


class EmptyParameterError(NNError, ZeroDivisionError):
    """A parameter without elements has an initializer that divides by one of its sizes.

    >>> raise EmptyParameterError("Dense 'mlp/up'", "kernel", (0, 4))
    Traceback (most recent call last):
    shardflax.nn.errors.EmptyParameterError: Dense 'mlp/up': parameter 'kernel' has shape (0, 4)...
    """

    def __init__(self, place: str, name: str, shape: Sequence[int]):
        self.shape = tuple(shape)
        empty = ", ".join(f"dim {d}" for d, size in enumerate(self.shape) if size == 0)
        super().__init__(
            place,
            f"parameter {name!r} has shape {self.shape}, and its initializer divides by the size "
            f"of {empty or 'a dim'}, 0. Give inputs and layer at least one feature, or an "
            "initializer that does not, `zeros` say.",
        )


class InitializerError(NNError):
    """The initializer of a parameter cannot draw its shape.

    >>> raise InitializerError("Einsum 'out'", "kernel", (8,), "too few dims.")
    Traceback (most recent call last):
    shardflax.nn.errors.InitializerError: Einsum 'out': parameter 'kernel' of shape (8,): too ...
    """

    def __init__(self, place: str, name: str, shape: Sequence[int], why: str):
        self.shape = tuple(shape)
        super().__init__(place, f"parameter {name!r} of shape {self.shape}: {why}")


class AxesError(NNError):
    """Dims given to a layer are not dims of its input, are given twice, or overlap.

    >>> raise AxesError("DenseGeneral", "axis", (7,), (2, 3), "dim 7 does not exist")
    Traceback (most recent call last):
    shardflax.nn.errors.AxesError: DenseGeneral: axis=(7,) for an input of shape (2, 3): ...
    """

    def __init__(self, place: Any, field: str, axes: Sequence[int], shape: Sequence[int], why: str):
        self.axes, self.shape = tuple(axes), tuple(shape)
        super().__init__(place, f"{field}={self.axes} for an input of shape {self.shape}: {why}.")


class EinsumError(NNError):
    """The equation of `Einsum` is missing, given twice, or not one for two operands.

    >>> raise EinsumError("Einsum", "no '->' in 'ab,bc'")
    Traceback (most recent call last):
    shardflax.nn.errors.EinsumError: Einsum: no '->' in 'ab,bc'
    """


class EmbedLookupError(NNError):
    """`Embed` was told of a way to look rows up that there is not.

    >>> raise EmbedLookupError("Embed 'tokens'", "onehot")
    Traceback (most recent call last):
    shardflax.nn.errors.EmbedLookupError: Embed 'tokens': lookup='onehot': did you mean 'one_hot'?
    """

    def __init__(self, place: str, lookup: Any):
        hint = did_you_mean(str(lookup), ["gather", "one_hot"])
        super().__init__(place, f"lookup={lookup!r}: {hint}")


class DtypeError(FlaxError, ValueError):
    """A computation that needs floating point was given an integer dtype.

    >>> raise DtypeError("int32")
    Traceback (most recent call last):
    shardflax.nn.errors.DtypeError: Dtype must be inexact, found int32; ...
    """

    def __init__(self, dtype: Any):
        super().__init__(
            f"Dtype must be inexact, found {dtype}; pass a floating or complex dtype, or "
            "`inexact=False` where integers are meant."
        )


class InputDtypeError(NNError):
    """The input of a layer has a dtype that it cannot use.

    >>> raise InputDtypeError("Embed 'tokens'", "an integer", "float32")
    Traceback (most recent call last):
    shardflax.nn.errors.InputDtypeError: Embed 'tokens': inputs have dtype float32, expected ...
    """

    def __init__(self, place: str, expected: str, found: Any):
        super().__init__(place, f"inputs have dtype {found}, expected {expected} dtype.")


class HeadsError(NNError):
    """Features do not divide into heads, or query heads into key/value heads.

    >>> raise HeadsError("GroupedQueryAttention 'attn'", num_heads=6, num_kv_heads=4)
    Traceback (most recent call last):
    shardflax.nn.errors.HeadsError: GroupedQueryAttention 'attn': num_heads=6 is not a multiple ...
    """

    def __init__(self, place: str, **sizes: int):
        self.sizes = sizes
        (name, size), (by, parts) = sizes.items()
        super().__init__(
            place,
            f"{name}={size} is not a multiple of {by}={parts}"
            + (f" (remainder {size % parts})." if parts > 0 else "; both must be positive."),
        )


class AttentionOptionsError(NNError):
    """Options of attention that exclude each other, or of which one is missing.

    >>> raise AttentionOptionsError("attention", "pass `dropout_rng`.")
    Traceback (most recent call last):
    shardflax.nn.errors.AttentionOptionsError: attention: pass `dropout_rng`.
    """


class AttentionShapeError(NNError):
    """Query, key and value do not fit together.

    >>> raise AttentionShapeError(
    ...     "attention", "heads (dim -2)", query=(1, 2, 4, 8), key=(1, 2, 3, 8)
    ... )
    Traceback (most recent call last):
    shardflax.nn.errors.AttentionShapeError: attention: heads (dim -2) must agree; query has ...
    """

    def __init__(self, place: str, what: str, **shapes: Sequence[int]):
        self.shapes = {k: tuple(v) for k, v in shapes.items()}
        found = ", ".join(f"{k} has shape {v}" for k, v in self.shapes.items())
        super().__init__(place, f"{what} must agree; {found}.")


class MaskShapeError(NNError):
    """A mask or bias does not broadcast to the attention weights.

    >>> raise MaskShapeError("attention", "mask", (2, 1, 3, 3), (2, 4, 5, 5))
    Traceback (most recent call last):
    shardflax.nn.errors.MaskShapeError: attention: mask of shape (2, 1, 3, 3) does not broadcast ...
    """

    def __init__(self, place: str, what: str, shape: Sequence[int], target: Sequence[int]):
        self.shape, self.target = tuple(shape), tuple(target)
        dims = range(-1, -min(len(shape), len(target)) - 1, -1)
        bad = [
            f"dim {d}: {shape[d]} against {target[d]}"
            for d in dims
            if shape[d] not in (1, target[d])
        ]
        if len(shape) > len(target):
            bad.append(f"{len(shape)} dims against {len(target)}")
        super().__init__(
            place,
            f"{what} of shape {self.shape} does not broadcast to {self.target} ({'; '.join(bad)}).",
        )


class CacheShapeError(NNError):
    """The input of a decoding step does not fit the cache.

    >>> raise CacheShapeError("MultiHeadAttention 'attn'", "5 tokens into a cache of 4")
    Traceback (most recent call last):
    shardflax.nn.errors.CacheShapeError: MultiHeadAttention 'attn': 5 tokens into a cache of 4
    """


class MergeParamError(FlaxError, ValueError):
    """An argument that the layer or the call must give was given by neither, or by both.

    >>> raise MergeParamError("deterministic", 0)
    Traceback (most recent call last):
    shardflax.nn.errors.MergeParamError: 'deterministic' was given neither to the layer nor the ...
    """

    def __init__(self, name: str, given: int):
        self.name = name
        how = "both to the layer and to the call" if given else "neither to the layer nor the call"
        super().__init__(f"{name!r} was given {how}: Parameter {name!r} must be given once.")


class DropoutRateError(NNError):
    """A dropout rate outside [0, 1].

    >>> raise DropoutRateError("Dropout", 1.5)
    Traceback (most recent call last):
    shardflax.nn.errors.DropoutRateError: Dropout: rate=1.5, expected a probability in [0, 1].
    """

    def __init__(self, place: str, rate: float):
        self.rate = rate
        super().__init__(place, f"rate={rate}, expected a probability in [0, 1].")


class RotaryError(NNError):
    """Rotary positions cannot be applied to this input.

    >>> raise RotaryError("apply_rotary", "head_dim=5 is odd; it is rotated in pairs.")
    Traceback (most recent call last):
    shardflax.nn.errors.RotaryError: apply_rotary: head_dim=5 is odd; it is rotated in pairs.
    """


class ContainerError(NNError):
    """`Sequential` was given no layers, or something that is not a sequence.

    >>> raise ContainerError("Sequential", "`layers` is empty.")
    Traceback (most recent call last):
    shardflax.nn.errors.ContainerError: Sequential: `layers` is empty.
    """


class CarryShapeError(NNError):
    """The state of a recurrent cell does not fit its inputs.

    >>> raise CarryShapeError("GRUCell 'cell'", "the carry", (2, 3), (4, 3), (4, 5))
    Traceback (most recent call last):
    shardflax.nn.errors.CarryShapeError: GRUCell 'cell': the carry has shape (2, 3), expected ...
    """

    def __init__(
        self,
        place: str,
        what: str,
        found: Sequence[int],
        expected: Sequence[int],
        inputs: Sequence[int],
    ):
        self.found, self.expected = tuple(found), tuple(expected)
        super().__init__(
            place,
            f"{what} has shape {self.found}, expected {self.expected} for inputs of shape "
            f"{tuple(inputs)} (dims before the features are the batch). Make it by "
            "`cell.initialize_carry(key, inputs.shape)`.",
        )


class SequenceError(NNError):
    """A sequence, its lengths or its cell are not what `RNN` works on.

    >>> raise SequenceError("RNN", "`seq_lengths` must be integers, found float32.")
    Traceback (most recent call last):
    shardflax.nn.errors.SequenceError: RNN: `seq_lengths` must be integers, found float32.
    """


class GroupsError(NNError):
    """Features do not divide into groups, or the groups are said twice or not at all.

    >>> raise GroupsError.indivisible("GroupNorm 'norm'", "dim -1 of inputs", 6, "num_groups", 4)
    Traceback (most recent call last):
    shardflax.nn.errors.GroupsError: GroupNorm 'norm': dim -1 of inputs has size 6, which is no ...
    """

    @classmethod
    def indivisible(cls, place: str, what: str, size: int, by: str, groups: int) -> GroupsError:
        """The error of `size` features for `groups` groups.

        >>> GroupsError.indivisible("Conv", "features", 6, "feature_group_count", 4).place
        'Conv'
        """
        rest = f" (remainder {size % groups})" if groups > 0 else ""
        return cls(place, f"{what} has size {size}, which is no multiple of {by}={groups}{rest}.")


class KernelMaskError(NNError):
    """The mask of a convolution has another shape than its kernel.

    >>> raise KernelMaskError("Conv", (3, 2), (3, 1, 2))
    Traceback (most recent call last):
    shardflax.nn.errors.KernelMaskError: Conv: mask has shape (3, 2), the kernel (3, 1, 2): ...
    """

    def __init__(self, place: str, found: Sequence[int], expected: Sequence[int]):
        self.found, self.expected = tuple(found), tuple(expected)
        super().__init__(
            place,
            f"mask has shape {self.found}, the kernel {self.expected}: they must be equal"
            + "".join(
                f"; dim {d}: {a} against {b}"
                for d, (a, b) in enumerate(zip(self.found, self.expected, strict=False))
                if a != b and len(self.found) == len(self.expected)
            )
            + ".",
        )


class PaddingError(NNError):
    """A padding that is misspelt, of another number of dims, or not possible here.

    >>> raise PaddingError("Conv 'stem'", "SAMME", ("SAME", "VALID"))
    Traceback (most recent call last):
    shardflax.nn.errors.PaddingError: Conv 'stem': padding='SAMME': did you mean 'SAME'? ...
    """

    def __init__(self, place: str, padding: Any, strings: Sequence[str], ndim: int | None = None):
        self.padding = padding
        hint = did_you_mean(padding.upper(), strings) if isinstance(padding, str) else ""
        many = "" if ndim is None else f" of {ndim}"
        super().__init__(
            place,
            f"padding={padding!r}: {hint}{' ' if hint else ''}Write one of "
            f"{', '.join(map(repr, strings))}, an int, or a sequence{many} with an int or a pair "
            "(low, high) for each windowed dim.",
        )


class WindowError(NNError):
    """Sizes, strides or dilations of a window that do not fit one another or the input.

    >>> raise WindowError("Conv 'stem'", "strides=(2, 2) has 2 entries, kernel_size has 1.")
    Traceback (most recent call last):
    shardflax.nn.errors.WindowError: Conv 'stem': strides=(2, 2) has 2 entries, kernel_size has 1.
    """


class PolicyError(FlaxError, ValueError):
    """A policy of dtypes has a part that does not exist, or that is no floating dtype.

    >>> raise PolicyError("compute=int32 is no floating dtype; write 'bfloat16', say.")
    Traceback (most recent call last):
    shardflax.nn.errors.PolicyError: compute=int32 is no floating dtype; write 'bfloat16', say.
    """
