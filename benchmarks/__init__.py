"""Benchmarks: what the library costs beside hand-written JAX, and beside Flax.

Importing this package sets up eight emulated CPU devices, so it comes before JAX is used.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
if "jax" in sys.modules:  # has read the environment; with libtpu about, it would look for a TPU
    sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
