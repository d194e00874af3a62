"""Throughput by a fake clock, FLOPs of known models, and MFU."""

import dataclasses

import pytest

from shardflax.training.metrics import PEAK_FLOPS, Throughput, mfu, model_flops


@dataclasses.dataclass
class Device:
    """A device as far as its kind goes."""

    device_kind: str


def test_the_median_ignores_a_save_and_old_steps() -> None:
    now = 0.0
    rate = Throughput(tokens_per_step=1000, window=5, clock=lambda: now)
    assert rate.step_time is None and rate.tokens_per_second is None
    for step, seconds in enumerate([9, 9, 9, 2, 2, 60, 2, 2]):
        now += seconds
        rate.tick(step)
    assert (rate.step_time, rate.tokens_per_second) == (2.0, 500.0)


def test_steps_that_were_not_ticked_count() -> None:
    now = 0.0
    rate = Throughput(tokens_per_step=100, clock=lambda: now)
    rate.tick(10)
    now = 8.0
    rate.tick(14)
    rate.tick(14)
    assert rate.step_time == 2.0


def test_flops_of_palm_540b() -> None:
    """Table 3 and appendix B of the PaLM paper: 46.2 % MFU at 238.3k tokens/s on 6144 TPU v4."""
    flops = model_flops(
        n_params=540_350_000_000, n_layers=118, n_heads=48, head_dim=256, seq_len=2048
    )
    share = mfu(238.3e3, flops, [Device("TPU v4")] * 6144)
    assert share == pytest.approx(0.462, abs=0.002)


def test_mfu_is_unknown_where_the_peak_or_the_rate_is() -> None:
    tpu, cpu = Device("TPU v5p"), Device("cpu")
    assert mfu(459e12 / 6, 6.0, [tpu]) == pytest.approx(1.0)
    assert mfu(1.0, 6.0, [cpu]) is None
    assert mfu(1.0, 6.0, [tpu, cpu]) is None
    assert mfu(None, 6.0, [tpu]) is None
    assert mfu(1.0, 6.0, []) is None
    assert PEAK_FLOPS["TPU v6e"] == 918e12
