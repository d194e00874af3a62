"""Flags by their names in Flax; see `shardflax.config`."""

from shardflax import config
from shardflax.config import define_bool_state, static_bool_env

__all__ = ["config", "define_bool_state", "static_bool_env"]
