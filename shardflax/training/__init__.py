"""Training: state, losses, optimizers, steps, metrics, progress."""

from shardflax.training.errors import (
    BatchSplitError,
    GradientShapeError,
    LossInputError,
    MetricsError,
    OptimizerConfigError,
)
from shardflax.training.losses import cross_entropy, next_tokens
from shardflax.training.metrics import PEAK_FLOPS, Throughput, mfu, model_flops, peak_flops
from shardflax.training.optimizer import (
    OptimizerConfig,
    decay_mask,
    make_optimizer,
    make_schedule,
)
from shardflax.training.progress import Progress
from shardflax.training.step import (
    EvalStep,
    TrainStep,
    global_norm,
    make_eval_step,
    make_train_step,
)
from shardflax.training.train_state import TrainState

__all__ = [
    "PEAK_FLOPS",
    "BatchSplitError",
    "EvalStep",
    "GradientShapeError",
    "LossInputError",
    "MetricsError",
    "OptimizerConfig",
    "OptimizerConfigError",
    "Progress",
    "Throughput",
    "TrainState",
    "TrainStep",
    "cross_entropy",
    "decay_mask",
    "global_norm",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "mfu",
    "model_flops",
    "next_tokens",
    "peak_flops",
]
