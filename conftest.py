"""Every test and doctest sees eight emulated CPU devices; set before anything imports JAX."""

import gc
import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if version("jaxlib").startswith("0.10."):
    # The older emitters of fusions compile in a third of the time; later versions lack them.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Two workers have a core each.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# Tests compile thousands of programs and run each of them once or twice: compiling takes the time.
# Processes that tests start inherit it.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Tracing makes many objects and few cycles: looking for them as often as Python does takes a tenth
# of the time.
gc.set_threshold(20_000, 20, 100)
