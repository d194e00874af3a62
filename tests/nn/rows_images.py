"""Rows of the matrix: convolutions, norms, and what else images are made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import numpy as np

from tests.nn.row import BATCH, WIDTH, Row, floats, hidden, maker

normal = flax.linen.initializers.normal


def images() -> tuple[Any, ...]:
    """`(batch, height, width, channels)`."""
    return (floats(BATCH, 4, 4, WIDTH),)


def wrapped(norm: str, layer: str, *args: Any, **options: Any) -> Callable[..., Any]:
    """A norm of the weights of another layer."""

    def make(namespace: Any, **dtypes: Any) -> Any:
        inner = getattr(namespace, layer)(*args, **dtypes)
        return getattr(namespace, norm)(inner, **options, **dtypes)

    return make


mask = np.random.RandomState(1).rand(BATCH, 4, 4, 1) > 0.3
masked = lambda: (*images(), {"mask": mask})  # noqa: E731
kernel_mask = np.random.RandomState(2).rand(3, WIDTH, 16) > 0.3
batch_norm = {"use_running_average": False, "momentum": 0.9}

ROWS: list[Row] = [
    Row("Conv", maker("Conv", 16, (3, 3)), images),
    Row(
        "Conv-groups",
        maker("Conv", 16, (2, 3), (2, 1), ((1, 0), 1), 1, (1, 2), 4, bias_init=normal(1.0)),
        images,
    ),
    Row("Conv-circular", maker("Conv", 16, 3, padding="CIRCULAR", use_bias=False), hidden),
    Row("Conv-causal", maker("Conv", 16, 3, padding="CAUSAL", mask=kernel_mask), hidden),
    Row("Conv-batch-dims", maker("Conv", 16, 3, padding="REFLECT"), images),
    Row("ConvTranspose", maker("ConvTranspose", 16, (3, 3), (2, 2)), images),
    Row(
        "ConvTranspose-circular",
        maker("ConvTranspose", 16, (4,), (2,), "CIRCULAR", bias_init=normal(1.0)),
        hidden,
    ),
    Row(
        "ConvTranspose-back",
        maker("ConvTranspose", 16, (3,), transpose_kernel=True, padding="VALID"),
        hidden,
    ),
    Row("ConvLocal", maker("ConvLocal", 16, (2, 2), bias_init=normal(1.0)), images),
    Row(
        "BatchNorm",
        maker("BatchNorm", **batch_norm),
        images,
        over_batch=True,
        in_parts={"axis_name": "data"},
    ),
    Row(
        "BatchNorm-mask",
        maker("BatchNorm", **batch_norm, axis=(1, -1), use_fast_variance=False),
        masked,
        over_batch=True,
        in_parts=None,  # the mean of the parts' means, however many elements each counts
    ),
    Row("BatchNorm-stored", maker("BatchNorm", True, bias_init=normal(1.0)), images),
    Row("GroupNorm", maker("GroupNorm", 4), images),
    Row(
        "GroupNorm-size",
        maker("GroupNorm", None, 2, scale_init=normal(1.0), use_fast_variance=False),
        images,
    ),
    Row("GroupNorm-dims", maker("GroupNorm", 2, reduction_axes=(2, -1), use_bias=False), images),
    Row("InstanceNorm", maker("InstanceNorm"), images),
    Row(
        "InstanceNorm-mask",
        maker("InstanceNorm", scale_init=normal(1.0), use_fast_variance=False),
        masked,
    ),
    Row(
        "SpectralNorm",
        wrapped("SpectralNorm", "Dense", 16),
        hidden,
        call={"update_stats": True},
        over_weights=True,
        rewrites=True,
    ),
    Row(
        "SpectralNorm-kept",
        wrapped("SpectralNorm", "Conv", 16, (3,), n_steps=2),
        hidden,
        call={"update_stats": False},
        rewrites=True,
    ),
    Row(
        "WeightNorm",
        wrapped("WeightNorm", "Dense", 16),
        hidden,
        over_weights=True,
        rewrites=True,
    ),
    Row("InstanceNorm-dims", maker("InstanceNorm", feature_axes=(1, -1)), images),
    Row(
        "WeightNorm-conv",
        wrapped("WeightNorm", "Conv", 16, (3,), feature_axes=(0, -1), scale_init=normal(1.0)),
        hidden,
        rewrites=True,
        over_weights=True,
    ),
    Row("PReLU", maker("PReLU"), images, typed=("param_dtype",)),
]
