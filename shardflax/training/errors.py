"""Errors of training: one class per cause."""

from __future__ import annotations

from shardflax.core.errors import FlaxError

__all__ = [
    "BatchSplitError",
    "GradientShapeError",
    "LossInputError",
    "MetricsError",
    "OptimizerConfigError",
]


class LossInputError(FlaxError):
    """Logits, targets or weights that do not belong together, or tokens that are none.

    >>> print(LossInputError("targets", "shape (2, 3)", "shape (2, 4)", "Shift them alike."))
    cross_entropy: targets have shape (2, 4), expected shape (2, 3). Shift them alike.
    """

    def __init__(
        self,
        argument: str,
        expected: str,
        found: str,
        advice: str,
        function: str = "cross_entropy",
    ) -> None:
        self.argument = argument
        super().__init__(f"{function}: {argument} have {found}, expected {expected}. {advice}")


class BatchSplitError(FlaxError):
    """A batch that cannot be split into equal microbatches.

    >>> print(BatchSplitError("tokens", 8, 3))
    Train step: accumulate=3 does not divide the 8 rows of batch leaf 'tokens'. ...
    """

    def __init__(self, leaf: str, rows: int, accumulate: int) -> None:
        self.leaf, self.rows, self.accumulate = leaf, rows, accumulate
        super().__init__(
            f"Train step: accumulate={accumulate} does not divide the {rows} rows of batch leaf "
            f"{leaf!r}. Choose a batch size that is a multiple of {accumulate}, and of "
            f"{accumulate} times the size of the batch axes to keep every device busy."
        )


class GradientShapeError(FlaxError):
    """An update would change the shape of a parameter: the gradient was another array's.

    >>> print(GradientShapeError("Dense_0/bias", (3,), (2, 3)))
    TrainState: the update of parameter 'Dense_0/bias' would make its shape (3,) into (2, 3). ...
    """

    def __init__(self, path: str, shape: tuple[int, ...], updated: tuple[int, ...]) -> None:
        self.path, self.shape, self.updated = path, shape, updated
        super().__init__(
            f"TrainState: the update of parameter {path!r} would make its shape {shape} into "
            f"{updated}. Give the gradients of these parameters, reduced over what they were "
            f"mapped over, such as a dim for replicas."
        )


class MetricsError(FlaxError):
    """What a loss function returned beside the loss is not a mapping of scalars.

    >>> print(MetricsError("aux['logits'] has shape (2, 3)"))
    Train step: aux['logits'] has shape (2, 3). ...
    """

    def __init__(self, found: str) -> None:
        super().__init__(
            f"Train step: {found}. The loss function returns (loss, aux) with a real scalar loss "
            f"and a dict of scalar metrics; 'loss', 'grad_norm' and 'learning_rate' are taken."
        )


class OptimizerConfigError(FlaxError):
    """A field of an `OptimizerConfig` that makes no sense.

    >>> OptimizerConfigError("b1", "1.5", "a number in [0, 1)").field
    'b1'
    """

    def __init__(self, field: str, found: str, expected: str) -> None:
        self.field = field
        super().__init__(f"OptimizerConfig: {field}={found}, expected {expected}")
