"""Every test and doctest sees eight emulated CPU devices; set before anything imports JAX."""

import contextlib
import gc
import importlib
import os
from importlib.metadata import version
from pathlib import Path

# What was set outside, of JAX, of Flax, of a launcher and of a terminal, changes no test.
for _name in tuple(os.environ):
    if _name.startswith(
        ("JAX_", "FLAX_", "SHARDFLAX_P", "SHARDFLAX_NUM", "SHARDFLAX_COORDINATOR", "TTY_")
    ):
        del os.environ[_name]
for _name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm"

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


def pytest_collect_file(file_path: Path) -> None:
    """Imports the package of a module with doctests before the module.

    Else pytest makes the module a second time after its package has imported it, and tests would
    patch one while the library uses the other.
    """
    parts = file_path.relative_to(Path(__file__).parent).parts[:-1]
    if parts and parts[0] in ("launch", "shardflax"):
        with contextlib.suppress(Exception):  # pytest reports it in its place
            importlib.import_module(".".join(parts))
