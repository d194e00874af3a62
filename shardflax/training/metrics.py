"""How fast a run is: step time, tokens per second, and what share of the chips' peak that is."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["PEAK_FLOPS", "Throughput", "mfu", "model_flops", "peak_flops"]

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}
"""Published dense bf16 FLOP/s of a chip, by the `device_kind` that JAX reports."""


class Throughput:
    """The median step time of the last `window` steps, and the tokens per second from it.

    Call `tick` after each step; a step that took unusually long (a compilation, a save) hardly
    moves the median.  Both properties are None until two ticks were seen.

    >>> times = iter([0.0, 1.0, 3.0, 4.0])
    >>> rate = Throughput(tokens_per_step=500, clock=lambda: next(times))
    >>> for step in (0, 1, 2, 3):
    ...     rate.tick(step)
    >>> rate.step_time, rate.tokens_per_second
    (1.0, 500.0)
    """

    def __init__(
        self,
        tokens_per_step: int,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self._times: deque[float] = deque(maxlen=window)
        self._clock = clock
        self._last: tuple[int, float] | None = None

    def tick(self, step: int) -> None:
        """Notes that `step` steps are done by now; steps may be left out, not taken back."""
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            self._times.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)

    @property
    def step_time(self) -> float | None:
        """Seconds for one step."""
        return statistics.median(self._times) if self._times else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens for one second, over all devices."""
        seconds = self.step_time
        return self.tokens_per_step / seconds if seconds else None


def model_flops(*, n_params: int, n_layers: int, n_heads: int, head_dim: int, seq_len: int) -> int:
    """FLOPs that training needs for one token: 6 N + 12 L H Q T.

    N parameters (of a mixture of experts, the active ones), L layers, H query heads of Q dims, T
    tokens of context.  The formula of PaLM (Chowdhery et al. 2022, appendix B), whose first term
    is from Kaplan et al. 2020, section 2.1; recomputation is not counted, a causal mask not taken
    off.

    >>> shape = dict(n_layers=32, n_heads=32, head_dim=128, seq_len=8192)
    >>> f"{model_flops(n_params=8_000_000_000, **shape):.3g}"
    '6.09e+10'
    """
    return 6 * n_params + 12 * n_layers * n_heads * head_dim * seq_len


def peak_flops(device: Any) -> float | None:
    """The peak bf16 FLOP/s of a JAX device, or None where it is not known (a CPU).

    >>> import jax
    >>> peak_flops(jax.devices()[0]) is None
    True
    """
    return PEAK_FLOPS.get(device.device_kind)


def mfu(
    tokens_per_second: float | None, flops_per_token: float, devices: Sequence[Any]
) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that goes into model FLOPs.

    None if the rate is, or if the peak of some device is not known.

    >>> import jax
    >>> mfu(1e6, 6e9, jax.devices())
    """
    peaks = [peak_flops(device) for device in devices]
    if tokens_per_second is None or not peaks or None in peaks:
        return None
    return tokens_per_second * flops_per_token / sum(peak for peak in peaks if peak)
