"""Models: whole architectures, laid out by any preset."""

from shardflax.models.config import DECODERS, DecoderConfig, decoder_config
from shardflax.models.decoder import Decoder, DecoderBlock, FeedForward
from shardflax.models.errors import ModelConfigError, SampleError, UnknownModelError
from shardflax.models.generate import generate

__all__ = [
    "DECODERS",
    "Decoder",
    "DecoderBlock",
    "DecoderConfig",
    "FeedForward",
    "ModelConfigError",
    "SampleError",
    "UnknownModelError",
    "decoder_config",
    "generate",
]
