"""Errors of the models."""

from __future__ import annotations

from shardflax.core.errors import FlaxError

__all__ = ["ModelConfigError", "UnknownModelError"]


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


class UnknownModelError(FlaxError):
    """There is no model of this name.

    >>> from shardflax.models import decoder_config
    >>> decoder_config("smal")
    Traceback (most recent call last):
        ...
    shardflax.models.errors.UnknownModelError: no decoder 'smal': did you mean 'small'?
    """
