"""Neural networks for JAX in which the layout over a device mesh is checked before anything runs.

`shardflax.nn` has modules, layers and lifted transforms, `shardflax.partitioning` meshes, rules and
layouts, `shardflax.training` steps and data, `shardflax.ckpt` checkpoints, `shardflax.models` whole
architectures.  `shardflax.core` is what they stand on.

After `import shardflax` each of them is there, and is imported when it is first used.

>>> import shardflax
>>> shardflax.core.freeze({"a": 1}).unfreeze()
{'a': 1}
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardflax import (
        ckpt,
        config,
        configurations,
        core,
        cursor,
        errors,
        jax_utils,
        models,
        nn,
        partitioning,
        serialization,
        struct,
        traceback_util,
        training,
        traverse_util,
    )

__all__ = [
    "ckpt",
    "config",
    "configurations",
    "core",
    "cursor",
    "errors",
    "jax_utils",
    "models",
    "nn",
    "partitioning",
    "serialization",
    "struct",
    "traceback_util",
    "training",
    "traverse_util",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A module of `__all__`, imported now."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
