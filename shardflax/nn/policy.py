"""`Policy`: the dtypes of a model as one value, and the base of the layers that take it."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from shardflax.core import Module, nowrap
from shardflax.nn.errors import EmptyParameterError, InitializerError, PolicyError, where
from shardflax.nn.types import Dtype

__all__ = ["LayerBase", "Policy"]

_FORCED = ("force_fp32_for_softmax", "force_float32_reductions")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which dtype is for what: a value that every layer takes as its `dtype`.

    - `compute`: operands and results of the layers.  A policy *is* this dtype wherever JAX wants
      one: `x.astype(policy)`, `jnp.zeros(3, policy)`.
    - `param`: what parameters are made in.  A layer's own `param_dtype` comes first, unless it is
      the default.
    - `reduce`: sums over many numbers: statistics of norms, softmax.  Layers can do these in at
      least float32 or in their own dtype, so any wider dtype here means the former.
    - `output`: what the model returns, by default `compute`: models say
      `policy.cast_to_output(y)` at their end.

    A model with a field `dtype` that it passes to its layers takes a policy without a change.
    Dtypes that are not floating are a `PolicyError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> policy = nn.Policy("bfloat16", param="float32")
    >>> layer = nn.Dense(features=3, dtype=policy)
    >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 4)))
    >>> y.dtype, variables["params"]["kernel"].dtype
    (dtype(bfloat16), dtype('float32'))
    """

    compute: Dtype = "float32"
    param: Dtype = "float32"
    output: Dtype | None = None
    reduce: Dtype = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            given = self.compute if given is None else given
            object.__setattr__(self, field.name, _floating(field.name, given))

    @classmethod
    def parse(cls, text: str) -> Self:
        """A policy from a line of text: `"bfloat16"`, or any of its parts by name.

        Parts that are not given have their defaults.  A part that does not exist is a
        `PolicyError`.

        >>> Policy.parse("compute=bfloat16, output=float32").output
        dtype('float32')
        """
        if "=" not in text:
            return cls(text.strip())
        pairs = [part.partition("=") for part in text.split(",")]
        given = {name.strip(): value.strip() for name, _, value in pairs}
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise PolicyError(f"{unknown[0]!r} is no part of a policy; these are: {known}.")
        return cls(**given)

    def __str__(self) -> str:
        """What `parse` reads."""
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))

    @property
    def dtype(self) -> Any:
        """The dtype of computation, under the name by which JAX and NumPy ask for it."""
        return self.compute

    def options(self) -> dict[str, Any]:
        """The keyword arguments `dtype` and `param_dtype`, for layers that know no policies.

        >>> Policy("bfloat16").options()
        {'dtype': dtype(bfloat16), 'param_dtype': dtype('float32')}
        """
        return {"dtype": self.compute, "param_dtype": self.param}

    def cast_to_compute(self, tree: Any) -> Any:
        """`tree` with its floating arrays in `compute`.

        >>> Policy("bfloat16").cast_to_compute(jnp.ones(2)).dtype
        dtype(bfloat16)
        """
        return _cast(tree, self.compute)

    def cast_to_param(self, tree: Any) -> Any:
        """`tree` with its floating arrays in `param`.

        >>> Policy("bfloat16").cast_to_param(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
        """
        return _cast(tree, self.param)

    def cast_to_output(self, tree: Any) -> Any:
        """`tree` with its floating arrays in `output`.

        >>> Policy("bfloat16", output="float32").cast_to_output(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
        """
        return _cast(tree, self.output)

    def cast_to_reduce(self, tree: Any) -> Any:
        """`tree` with its floating arrays in `reduce`: before a loss or a mean, say.

        >>> Policy("bfloat16").cast_to_reduce(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
        """
        return _cast(tree, self.reduce)


def _floating(part: str, dtype: Any) -> np.dtype[Any]:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise PolicyError(f"{part}={dtype!r} is no dtype; write 'bfloat16', say.") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise PolicyError(f"{part}={found} is no floating dtype; write 'bfloat16', say.")
    return found


def _cast(tree: Any, dtype: Any) -> Any:
    def cast(x: Any) -> Any:
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, dtype) if floating else x

    return jax.tree.map(cast, tree)


class LayerBase(Module):
    """The base of layers with a `dtype`: a `Policy` given as such becomes the fields it means.

    >>> import shardflax.nn as nn
    >>> nn.LayerNorm(dtype=nn.Policy("bfloat16", param="float16")).param_dtype
    dtype('float16')
    """

    def __post_init__(self) -> None:
        fields = self.__dict__
        policy = fields.get("dtype")
        if isinstance(policy, Policy):
            fields["dtype"] = policy.compute
            default = getattr(type(self), "param_dtype", None)
            if "param_dtype" in fields and fields["param_dtype"] == default:
                fields["param_dtype"] = policy.param
            for name in _FORCED:
                if name in fields:
                    fields[name] = policy.reduce.itemsize >= 4
        super().__post_init__()

    @nowrap
    def param(self, name: str, init_fn: Any, *init_args: Any, **kwargs: Any) -> Any:
        """`Module.param`; what an initializer has against the shape is said with the module.

        Raises `EmptyParameterError` where it divides by an empty dim, else `InitializerError`.
        """
        try:
            return super().param(name, init_fn, *init_args, **kwargs)
        except (ZeroDivisionError, ValueError) as error:
            if type(error) not in (ZeroDivisionError, ValueError):
                raise  # what is said already, by us or by who wrote the initializer
            shape = init_args[0] if init_args else ()
            if isinstance(error, ZeroDivisionError):
                raise EmptyParameterError(where(self), name, shape) from error
            raise InitializerError(where(self), name, shape, str(error)) from error
