"""What layers ask XLA to compute: what the same functions ask for that are written by hand."""

from __future__ import annotations

import pytest

import shardflax.nn as nn
from benchmarks.layers import CASES, SMALL, Case, figures
from tests.nn.row import layers_of

SAME = [of for of in CASES if of.same_program]


def test_every_layer_is_measured() -> None:
    assert layers_of(nn) - {of.name for of in CASES} == set()


@pytest.mark.parametrize("of", SAME, ids=[of.name for of in SAME])
def test_a_layer_costs_what_it_costs_by_hand(of: Case) -> None:
    for which, (ours, by_hand) in figures(of, SMALL).items():
        assert ours == by_hand, which
