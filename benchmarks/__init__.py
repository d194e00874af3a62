"""Benchmarks: what the library costs beside hand-written JAX, and beside Flax.

Importing this package sets up eight emulated CPU devices, so it comes before JAX.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
