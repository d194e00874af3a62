"""Every test and doctest sees eight emulated CPU devices; set before anything imports JAX."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Tests compile thousands of programs and run each of them once or twice: compiling takes the time.
# Processes that tests start inherit it.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
