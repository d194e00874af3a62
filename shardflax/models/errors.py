"""Errors of the models."""

from __future__ import annotations

from shardflax.core.errors import FlaxError

__all__ = ["ModelConfigError", "SampleError", "UnknownModelError"]


class ModelConfigError(FlaxError):
    """A model's options do not fit together.

    >>> from shardflax.models import DecoderConfig
    >>> DecoderConfig(num_heads=6, num_kv_heads=4)
    Traceback (most recent call last):
        ...
    shardflax.models.errors.ModelConfigError: DecoderConfig: ...
    """

    def __init__(self, config: str, problem: str, cure: str) -> None:
        super().__init__(f"{config}: {problem}. {cure}")


class SampleError(FlaxError, ValueError):
    """An argument of `generate` that nothing can be sampled with.

    >>> print(SampleError("top_k=0", "None, or a number from 1 to 256 (vocab_size)"))
    generate: top_k=0, expected None, or a number from 1 to 256 (vocab_size).
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"generate: {found}, expected {expected}.")


class UnknownModelError(FlaxError):
    """There is no model of this name.

    >>> from shardflax.models import decoder_config
    >>> decoder_config("smal")
    Traceback (most recent call last):
        ...
    shardflax.models.errors.UnknownModelError: no decoder 'smal': did you mean 'small'?
    """
